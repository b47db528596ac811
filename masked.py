"""
Masked diffusion as MDLM and LLaDA have it: tokens turn into [MASK] one by one; a transformer learns to put
them back.

Forward process, t in [0, 1]. Each token of x0 is still itself with probability alpha(t), else it is [MASK];
alpha(0) = 1, alpha(1) = 0; below, m(t) = 1 - alpha(t). The network sees xt and predicts x0 at every position.

Bound. The negative ELBO of a batch in nats per token (MDLM arXiv 2406.07524, MD4 2406.04329):

    E_t [ sum over masked tokens of m'(t) / m(t) * -log p(x0_i | xt) ] / (B T),  m'/m = -alpha' / (1 - alpha)

The weighted sum is divided by B T, all tokens but padding and prompts, which are not scored. Divided by the
number of masked tokens it is another quantity: with t uniform half of the tokens are masked, so the figure
about doubles. (The weight averages already: T / k times a sum over k masked tokens, / T, is their mean.)

Training loss. What is trained differs from the bound in two ways, because it then learns faster (NOTES.md,
"The recipe of masked diffusion"). Every masked token counts alike (`loss_weight='flat'`): with m(t) = t the
bound's weight is 1 / t, so a few nearly clean texts drown all others. And t comes from a bell around m = 0.4
(`t_law='bell'`). The best network is the same. Validation always prints the bound, `Model.nats`;
`--loss_weight=elbo --t_law=uniform` trains on it.

Estimating the bound. With m in place of t the weight is 1 / m and the schedule is gone: a schedule decides
how often training visits a noise level, not what the bound is. The integral over m can be done by hand, too:
mask exactly k of T tokens, k uniform on 1..T, and weigh by T / k (LLaDA 2502.09992, 2409.02908). `nats` does
that; its variance is far lower.

SUBS, MDLM's parameterization, is two substitutions in the network's output: [MASK] is never predicted (the
head has no row for it), and clean tokens are carried over (`denoise`). sedd.py keeps both and changes the
loss. d3pm.py gives up both in its loss and its bound (unless `carry_over`), but not in sampling.
Given xt, the distribution of the hidden tokens does not depend on t, so the network needs no time input
(RADD 2406.03736).
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from ar import token_nats
from configurator import Natural
from parts import adapted
from parts.cached import Cached
from parts.schedules import SCHEDULES, noise
from text.packing import counted, keep_apart
from unmask import RULES, unmask  # noqa: F401  RULES: what sample.py may ask for, see ar.py


@dataclass
class Config(adapted.Config):
    # masked diffusion
    schedule: Literal[tuple(SCHEDULES)] = 'linear'  # of m(t), parts/schedules.py
    time_input: bool = False  # tell the network the noise level
    # masked diffusion, training only
    t_law: Literal['bell', 'uniform'] = 'bell'  # of t: uniform | bell, m = sigmoid(N(-0.5, 0.4^2))
    loss_weight: Literal['flat', 'elbo'] = 'flat'  # flat, all masked tokens alike | elbo, the bound's weights
    masking: Literal['bernoulli', 'count'] = 'bernoulli'  # bernoulli, each token by itself | count, exactly k

    def __post_init__(self):
        super().__post_init__()
        if self.t_law == 'bell' and (self.schedule != 'linear' or self.loss_weight == 'elbo'):
            raise ValueError(f"t_law=bell decides which noise levels training visits: with "
                             f"schedule={self.schedule}, loss_weight={self.loss_weight} take t_law=uniform")


# ---- the forward process ----------------------------------------------------------------------------------

def low_discrepancy(u, B):
    """B points (u + i/B) mod 1 from one uniform u, (B,): each is uniform, together they cover [0, 1]."""
    return (u + torch.arange(B, device=u.device) / B) % 1


def uniform(u):
    """t = u, kept off 0, where the weight 1/t has no limit."""
    return 1e-3 + (1 - 1e-3) * u


def bell(u, center=-0.5, width=0.4):
    """t = sigmoid(N(center, width^2)), by its inverse distribution function."""
    normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-4, 1 - 1e-4) - 1)
    return (center + width * normal).sigmoid()


T_LAWS = dict(uniform=uniform, bell=bell)


def exactly(k, u):
    """Mask the k[b] positions of row b with the lowest u: (B, T) bool. k (B,), u (B, T)."""
    return u.argsort(-1).argsort(-1) < k[:, None]


def level_of(k, u):
    """The noise level at which just k[b] tokens of row b are masked: the k-th smallest of its uniform numbers
    u (B, T). k (B,) -> (B,)."""
    return u.sort(-1).values.gather(1, k[:, None] - 1)[:, 0]


class Model(nn.Module):
    bound, takes, revises, any_length = 'upper', ('windows', 'lines', 'pairs'), False, False
    orders, base, selects, measures = ('left',), '', True, False
    reading, verbs = dict(rule='confidence', apart=True, temperature=0.5), ('denoise', 'scores')

    def __init__(self, config, outputs=0):
        super().__init__()
        self.config, self.mask_id = config, config.vocab_size
        self.gpt = adapted.network(config, timed=config.time_input, outputs=outputs)
        if config.shift:  # the first token of a text would be predicted from another text's last
            self.takes = ('windows', 'pairs')
        self.t_law = T_LAWS[config.t_law]
        # flat is 1 / E[m]: as with the bound's weights, weight times m averages to 1, and the loss of a
        # fresh model to ln V
        middles = (torch.arange(1000, device='cpu') + 0.5) / 1000
        self.flat = 1 / noise(config.schedule, self.t_law(middles))[0].mean().item()

    # ---- the loss ----

    def forward(self, x, segment=None, given=None, t=None, u=None):
        """x (B, T) -> (loss in nats per token, metrics). segment (B, T): of packed texts, see packing.py;
        given (B, T) bool: a prompt, neither masked nor scored. Noise may be given: t (B,), u (B, T)."""
        t, u, scored = self.draw_noise(x, segment, given, t, u)
        m, slope = noise(self.config.schedule, t)
        masked, weight = u < m[:, None], slope / m
        if self.config.masking == 'count':  # mask exactly ceil(m T) tokens, and correct the weight
            length = scored.sum(-1)
            k = (m * length).ceil().long().clamp(min=1)
            masked, weight = exactly(k, u) & scored, weight * (m * length / k)
            m = level_of(k, u)
        if self.config.loss_weight == 'flat':
            weight = torch.full_like(t, self.flat)
        nats = self.masked_nats(x, masked, segment, m)
        return (weight * nats).sum() / scored.sum().clamp(min=1), {
            'loss_per_masked': nats.detach().sum() / masked.sum().clamp(min=1)}

    def draw_noise(self, x, segment, given, t=None, u=None):
        """Times t (B,); a uniform number for each token, u (B, T), masked once m(t) exceeds it; which tokens
        are scored (B, T) bool. Padding and prompts have u = 2: they are never masked."""
        if t is None:
            t = self.t_law(low_discrepancy(torch.rand((), device=x.device), len(x)))
        u = torch.rand(x.shape, device=x.device) if u is None else u
        scored = counted(x, segment, given)
        return t, u.where(scored, 2.0), scored

    def masked_nats(self, x, masked, segment=None, m=None):
        """Sum over the masked positions of -log p(x0_i | xt) in nats, (B,). x (B, T), masked (B, T) bool,
        segment (B, T): of packed texts; m (B,): the noise level, if the network is told."""
        out = self.network(x.where(~masked, self.mask_id), m, segment)
        return (self.token_loss(out, x) * masked).sum(-1)  # clean tokens cost nothing: they are carried over

    def token_loss(self, out, x):
        """-log p(x0_i | xt) of every token, (B, T), from the network's output (B, T, V)."""
        return token_nats(out, x)

    def network(self, xt, m=None, segment=None, only=None):
        """The network's output at xt (B, T), (B, T, V), or at its N tokens `only` (B, T) bool, (N, V);
        m (B,): the noise level, if it is told."""
        return self.gpt(xt, time=m if self.config.time_input else None, only=only, **keep_apart(segment))

    # ---- the bound ----

    def nats(self, x, n=1, segment=None, given=None):
        """An estimate, with n draws, of the upper bound on -log p(x | given) in nats: (B,). Draw i takes its
        level from the i-th of n equal strata. Arguments: see `forward`."""
        total = 0
        for i in range(n):
            v = (i + torch.rand(len(x), device=x.device)) / n
            total = total + self.count_nats(x, v, segment, given) / n
        return total

    def count_nats(self, x, v, segment=None, given=None, u=None):
        """The bound's term at the fraction v (B,) in [0, 1) of all counts: k of T tokens are masked, k
        uniform on 1..T, and the weight is T / k. u (B, T): noise, drawn unless given."""
        _, u, scored = self.draw_noise(x, segment, given, v, u)
        length = scored.sum(-1)
        k = torch.minimum((v * length).long() + 1, length.clamp(min=1))
        return length / k * self.masked_nats(x, exactly(k, u), segment, level_of(k, u))

    def nats_left(self, x):
        """-log p(x) in nats of the same network writing left to right, exact, (B,); T forwards. Position i is
        predicted from x[:i] and T - i masks: another order of writing, so another model than `nats`."""
        position, total = torch.arange(x.size(1), device=x.device), 0
        for i in range(x.size(1)):
            logits = self.logits(x.where(position < i, self.mask_id))[:, i:i + 1]
            total = total + token_nats(logits, x[:, i:i + 1])[:, 0]
        return total

    # ---- for samplers ----

    def logits(self, xt, t=None, only=None):
        """Unnormalised log p(x0 | xt), (B, T, V), or (N, V) as in `network`. t (B,): the noise level m, or
        None, the share of masks."""
        t = (xt == self.mask_id).float().mean(-1) if t is None else t
        return self.network(xt, t, only=only)[..., :self.mask_id]  # d3pm's head has a row for [MASK], too

    def denoise(self, xt, t=None):
        """log p(x0 | xt), (B, T, V) float32, normalised. Carry-over: a clean token is itself."""
        masked, token = xt == self.mask_id, xt.clamp(max=self.mask_id - 1)
        itself = torch.full((*xt.shape, self.mask_id), -torch.inf, device=xt.device)
        itself.scatter_(-1, token[..., None], 0.0)
        if xt.device.type != 'cpu' or torch.compiler.is_compiling():  # to select would wait for the device
            logp = adapted.normalised(self.logits(xt, t), self.config)
            return torch.where(masked[..., None], logp, itself)
        if (rows := masked.any(-1)).any():  # finished texts need no network, clean tokens no head
            logits = self.logits(xt[rows], None if t is None else t[rows], masked[rows])
            itself[masked] = adapted.normalised(logits, self.config)
        return itself

    scores = denoise  # for rule=analytic; normalised here, not in sedd.py

    @torch.no_grad()
    def sample(self, xt, steps, rule='', temperature=1.0, top_k=0, top_p=1.0, *,
               cache: Literal['', 'prefix', 'dual'] = '',  # keep keys, values: prefix | dual, behind too
               refresh: Natural = 0,  # calls after which the cache is read anew; 0: at every part
               **own):
        """Generator of canvases (B, T), one per network call; xt holds V where tokens are to be drawn. The
        rules and their own knobs are those of unmask.py, cache and refresh those of parts/cached.py."""
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, **own)
        ask = self.scores if rule == 'analytic' else self.denoise
        if cache or refresh:
            ask = Cached(self, xt, cache, refresh, own)
        yield from unmask(ask, xt, self.mask_id, steps, rule or 'ancestral', **how)
