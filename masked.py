"""
Masked (absorbing-state) diffusion:
tokens turn into [MASK] one by one; a transformer learns to put them back.

Forward process, t in [0, 1]: each token of x0 is still clean with probability alpha(t), else it is [MASK];
alpha(0) = 1, alpha(1) = 0; below, m(t) = 1 - alpha(t). The network sees xt and predicts x0 at every
position. Negative ELBO in nats per token (MDLM arXiv 2406.07524, MD4 2406.04329):

    E_t [ m'(t) / m(t) * sum over masked i of loss_i(xt) ] / (B T),     m'(t) / m(t) = -alpha' / (1 - alpha)

Divided by B T, never by the number of masked tokens: that quotient is not a bound. Substituting m for t
leaves 1/m and no schedule: schedules differ in how often they visit a noise level, not in the bound. The
integral over m can be done by hand too: mask exactly k of T tokens, k uniform on 1..T, and weigh by T/k
(LLaDA 2502.09992, 2409.02908). The level is then the k-th smallest of T uniform numbers. `nats` uses that
form, whose variance is far lower.

Three parameterizations, three losses of a masked token (l the network's output, v its true token):

    SUBS  -log softmax(l)_v                       clean tokens are copied, [MASK] is never predicted (MDLM)
    SEDD  sum_y e^(l_y) - 1 - l_v                 score entropy of s_y = e^(l_y) alpha / m (2310.16834)
    D3PM  KL(q(xs | xt, x0) || p(xs | xt))        T steps, [MASK] is predicted, nothing copied (2107.03006)

If e^l adds up to 1, SEDD is SUBS; for any other sum Z it is worse by Z - 1 - log Z: it pays for learning to
normalise. D3PM without probability on [MASK] is SUBS in T steps; it pays for that probability and for what
it does not copy, both in the bound alone: sampling leaves [MASK] out and copies, as with SUBS.
The number of masks tells the network what t is, so none has to be told (RADD 2406.03736); SEDD as published
is (`time_input`).

An autoregressive model becomes a denoiser by going on with its training here (DiffuGPT 2410.17891). Two
things may ease the way. `shift`: the network reads [BOS] xt, and position i goes on predicting token i + 1,
the last position nothing. `anneal_iters`: every query sees the past and, with probability r, each later
token, one draw a step; r rises to 1 in so many steps. Likelihoods and samples always see all. `given` tokens
(a prompt) are neither masked nor scored.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import ar
from parts import lora
import model
from ar import token_nats
from text.packing import counted, keep_apart as apart
from unmask import RULES, unmask  # noqa: F401


def of_text(value, segment, given=None):
    return value * counted(value, segment, given)


@dataclass
class Config(ar.Config):
    parameterization: str = 'subs'  # subs | d3pm | sedd
    T: int = 0                   # steps of the diffusion; 0: continuous time
    schedule: str = 'linear'     # linear | cosine | cosine_sqr | geometric | polynomial | log_uniform
    time_input: bool = False     # tell the network the noise level; sedd needs it
    masking: str = 'bernoulli'   # training only: bernoulli (each token by itself) | count (exactly k of T)
    loss_weight: str = 'flat'    # training only: elbo (the bound's weights) | flat (all masked tokens alike)
    t_law: str = 'bell'          # training only: uniform | bell, m = sigmoid(N(bell_center, bell_width^2))
    bell_center: float = -0.5    # of the bell; 0 is m = 0.5
    bell_width: float = 0.4      # of the bell
    copy_weight: float = 0.1     # training only: of the loss at clean tokens, which d3pm must learn to copy
    random_length: float = 0.0   # training only: share of rows cut to a random length (LLaDA: 0.01)
    shift: bool = False          # position i predicts token i + 1, as in an autoregressive model
    anneal_iters: int = 0        # training only: steps until every token sees all others; 0: from the start

    def __post_init__(self):
        super().__post_init__()
        for name, known in (('loss_weight', ('elbo', 'flat')), ('t_law', ('uniform', 'bell')),
                            ('parameterization', PARAMETERIZATIONS), ('schedule', SCHEDULES),
                            ('masking', ('bernoulli', 'count'))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: {', '.join(known)}")
        if not 0 <= self.random_length <= 1:
            raise ValueError(f"random_length={self.random_length} must be in [0, 1]")
        if self.bell_width <= 0:
            raise ValueError(f"bell_width={self.bell_width} must be positive")
        if self.T < 0 or self.copy_weight < 0 or self.anneal_iters < 0:
            raise ValueError(f"T={self.T}, copy_weight={self.copy_weight} and "
                             f"anneal_iters={self.anneal_iters} must not be negative")
        if self.parameterization == 'd3pm' and not self.T:
            raise ValueError("d3pm is a diffusion in steps: give it some, for example T=1000")
        if self.parameterization == 'sedd' and self.T:
            raise ValueError(f"sedd is a diffusion in continuous time: T={self.T} must be 0")
        if self.parameterization == 'sedd' and not self.time_input:
            raise ValueError("sedd needs time_input=True: a score depends on the time")
        if self.masking == 'count' and self.T:
            raise ValueError(f"masking=count is an integral over continuous time: T={self.T} must be 0")
        if self.t_law == 'bell' and (self.schedule != 'linear' or self.loss_weight == 'elbo'):
            raise ValueError(f"schedule={self.schedule}, loss_weight={self.loss_weight}: the bell says "
                             f"itself which noise levels training visits; take t_law=uniform")


# ---- schedules: f with f(0) = 0 and its derivative; m(t) = f(t) / f(1) reaches 0 and 1 exactly ------------

def linear(t):
    """m = t (log-linear in MDLM's terms)."""
    return t, torch.ones_like(t)


def cosine(t):
    """m = 1 - cos(pi t / 2)."""
    return (math.pi / 4 * t).sin() ** 2, math.pi / 4 * (math.pi / 2 * t).sin()


def cosine_sqr(t):
    """m = 1 - cos(pi t / 2)^2."""
    return (math.pi / 2 * t).sin() ** 2, math.pi / 2 * (math.pi * t).sin()


def geometric(t, low=1e-4, high=20.0):
    """m = 1 - exp(-sigma), sigma = low^(1-t) high^t, shifted and stretched to reach both ends."""
    rate = math.log(high / low)
    sigma = low * torch.expm1(rate * t)  # less sigma(0)
    return -torch.expm1(-sigma), rate * low * torch.exp(rate * t - sigma)


def polynomial(t, a=-3.0, b=5.0, c=-4.0):
    """m ~ the integral of (a s^2 + b s + c)^2 from 0 to t (MuLAN arXiv 2312.13236)."""
    f = a * a * t ** 4 / 5 + a * b * t ** 3 / 2 + (b * b + 2 * a * c) * t ** 2 / 3 + b * c * t + c * c
    return t * f, (a * t ** 2 + b * t + c) ** 2


def log_uniform(t, least=1e-3):
    """log m is nearly uniform, so the weight m'/m is nearly constant.

    This is the change of variables, and the importance sampling of t by its weight, of MDLM at once.
    """
    rate = -math.log(least)
    return torch.expm1(rate * t), rate * torch.exp(rate * t)


SCHEDULES = {f.__name__: f for f in (linear, cosine, cosine_sqr, geometric, polynomial, log_uniform)}


def noise(schedule, t):
    """(m(t), m'(t)) of a schedule, the probability of a mask and its derivative: alpha = 1 - m."""
    f, slope = schedule(t)
    end = schedule(torch.ones_like(t))[0]
    return f / end, slope / end


# ---- which times training visits --------------------------------------------------------------------------

def low_discrepancy(u, B):
    """B points (u + i/B) mod 1 from one uniform u, (B,):
    each is uniform, together they cover [0, 1] evenly."""
    return (u + torch.arange(B, device=u.device) / B) % 1


def uniform(u):
    """t = u, kept off 0, where the weight 1/t has no limit."""
    return 1e-3 + (1 - 1e-3) * u


def bell(u, center, width):
    """t = sigmoid(N(center, width^2)) by its inverse distribution function."""
    normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-4, 1 - 1e-4) - 1)
    return (center + width * normal).sigmoid()


def exactly(k, u):
    """Mask the k[b] positions of row b with the lowest u: (B, T) bool. k (B,), u (B, T)."""
    return u.argsort(-1).argsort(-1) < k[:, None]


def count_text(x, u, segment, given=None):
    """(tokens to score in every row, (B, 1); u (B, T) with the others, padding and what is given, at 2,
    where nothing is masked)."""
    if segment is None and given is None:
        return torch.full_like(x[:, :1], x.size(1)), u
    scored = of_text(torch.ones_like(x), segment, given).bool()
    return scored.sum(-1, keepdim=True), u.where(scored, 2.0)


def partly_causal(T, r):
    """Who sees whom: the past always, each later token with probability r: (T, T) bool. r: 0-d tensor."""
    past = torch.ones(T, T, dtype=torch.bool, device=r.device).tril()
    return past | (torch.rand(T, T, device=r.device) < r)


# ---- the loss of a masked token in nats, (B, T) -----------------------------------------------------------
# out (B, T, V), x (B, T); m and m_before (B, 1): noise levels of this step and of the next on the way to
# clean text. Times the weight of the step (`Model.levels`) they are terms of the negative ELBO.

def subs(out, x, m=None, m_before=None):
    """-log p(x0_i | xt): the cross-entropy."""
    return token_nats(out, x)


def sedd(out, x, m=None, m_before=None):
    """Score entropy (arXiv 2310.16834) of the scores e^l (1 - m) / m, divided by (1 - m) / m: Z - 1 - l_v.

    l = out - log V, so that a network of zeros starts at Z = 1. Cross-entropy if Z = 1.
    """
    logs = sedd_logs(out)
    return logs.exp().sum(-1) - 1 - logs.gather(-1, x[..., None])[..., 0]


def sedd_logs(out):
    """Network output -> l (B, T, V), at least float32."""
    return out.to(torch.promote_types(out.dtype, torch.float32)) - math.log(out.size(-1))


def d3pm(out, x, m, m_before):
    """KL of a step of D3PM in absorbing states (arXiv 2107.03006), divided by the chance of a reveal in it.

    out (B, T, V + 1): the network may predict [MASK], with probability p_mask. With
    e(m) = log(1 + (1 - m) / m p_mask) the step reveals v with probability (m - m_before) / m p_v / e^e(m):
    KL = reveal (e(m) - log p_v) + stay (e(m) - e(m_before)), reveal = (m - m_before) / m, stay = 1 - reveal.
    """
    logp = out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(-1)
    p_mask = logp[..., -1].exp()
    excess = torch.log1p((1 - m) / m * p_mask)
    # the clamps keep 0 * inf from being NaN: the step to m_before = 0 is never stayed in, and steps in which
    # m does not change have weight 0
    before = torch.log1p((1 - m_before) / m_before.clamp(min=1e-12) * p_mask)
    stay_to_reveal = m_before / (m - m_before).clamp(min=1e-12)
    return excess - logp.gather(-1, x[..., None])[..., 0] + stay_to_reveal * (excess - before)


PARAMETERIZATIONS = {'subs': subs, 'd3pm': d3pm, 'sedd': sedd}


class Model(nn.Module):
    bound, packs, revises, any_length = 'upper', True, False, False

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id = config, config.vocab_size
        self.copies = config.parameterization != 'd3pm'  # are clean tokens copied, or predicted too?
        self.packs = not config.shift  # the first token of a text would be predicted from another's
        shape = dataclasses.replace(config, block_size=config.block_size + config.shift)
        gpt = model.GPT(shape, causal=False, timed=config.time_input, marks=1 + config.shift,
                        outputs=config.vocab_size + (not self.copies))
        self.gpt = lora.by_config(gpt, config)
        if config.anneal_iters:  # of the optimizer so far, see train.py
            self.register_buffer('steps', torch.zeros(()), persistent=False)
        self.token_loss = PARAMETERIZATIONS[config.parameterization]
        self.noise = functools.partial(noise, SCHEDULES[config.schedule])
        self.time = uniform
        if config.t_law == 'bell':
            self.time = functools.partial(bell, center=config.bell_center, width=config.bell_width)
        # flat is 1 / E[m]: as with the bound's weights, weight times m averages to 1, and the loss of a
        # fresh model to ln V
        self.flat = 1 / self.noise(self.time((torch.arange(1000) + 0.5) / 1000))[0].mean().item()

    def levels(self, t):
        """Times (B,) -> noise levels m, m_before (B,) and the bound's weight (B,).

        In T steps, t is rounded up to i / T; m_before is the level at (i - 1) / T, the weight
        T (m - m_before) / m. In continuous time m_before is m and the weight m' / m.
        """
        if not self.config.T:
            m, slope = self.noise(t)
            return m, m, slope / m
        i = (t * self.config.T).ceil().clamp(1, self.config.T)
        m, m_before = self.noise(i / self.config.T)[0], self.noise((i - 1) / self.config.T)[0]
        return m, m_before, self.config.T * (m - m_before) / m

    def forward(self, x, segment=None, given=None, t=None, u=None):
        """x (B, T) -> (loss in nats per token, metrics). segment (B, T): of packed texts, see packing.py;
        given (B, T) bool: tokens that are neither masked nor scored. Noise may be told: times t (B,),
        u (B, T)."""
        B, T = x.shape
        if t is None:
            t = self.time(low_discrepancy(torch.rand((), device=x.device), B))
        if u is None:
            u = torch.rand(B, T, device=x.device)
        m, m_before, weight = self.levels(t)
        if self.config.random_length:  # the same shapes whatever the length: what is cut is padding
            cut = torch.rand(B, 1, device=x.device) < self.config.random_length
            kept = torch.where(cut, torch.randint(1, T + 1, (B, 1), device=x.device), T)
            segment = torch.zeros_like(x) if segment is None else segment
            segment = segment.where(torch.arange(T, device=x.device) < kept, -1)
        length, u = count_text(x, u, segment, given)
        if self.config.masking == 'count':
            k = (m[:, None] * length).ceil().long().clamp(min=1)
            masked, weight = exactly(k[:, 0], u) & (u < 2), weight * (m[:, None] * length / k)[:, 0]
            m = u.sort(-1).values.gather(1, k - 1)[:, 0]  # the level at which just these k are masked
        else:
            masked = u < m[:, None]
        if self.config.loss_weight == 'flat':
            weight = torch.full_like(t, self.flat)
        seen = None
        if self.config.anneal_iters:
            r = ((self.steps + 1) / self.config.anneal_iters).clamp(max=1)
            seen = partly_causal(T + self.config.shift, r)
        loss = self.masked_nats(x, masked, segment, m, m_before, self.config.copy_weight, seen)
        return (weight * loss).sum() / length.sum().clamp(min=1), {
            'loss_per_masked': loss.detach().sum() / masked.sum().clamp(min=1)}

    def masked_nats(self, x, masked, segment=None, m=None, m_before=None, copy_weight=0.0, seen=None):
        """Sum of the loss over the masked positions, (B,). x (B, T), masked (B, T) bool, segment (B, T): of
        packed texts; noise levels m, m_before (B,). copy_weight: of the clean positions, where they are not
        copied; seen: see `network`."""
        out = self.network(x.where(~masked, self.mask_id), m, segment, seen)
        columns = (m[:, None], m_before[:, None]) if m is not None else ()
        loss = (self.token_loss(out, x, *columns) * masked).sum(-1)
        if self.copies or not copy_weight:
            return loss
        return loss + copy_weight * of_text(token_nats(out, x) * ~masked, segment).sum(-1)

    def network(self, xt, m=None, segment=None, seen=None):
        """The network's output at xt (B, T), (B, T, outputs); m (B,) if it is told the noise level. seen
        (T, T) bool: who sees whom while attention is annealed; with shift [BOS] is first, so T + 1."""
        shift = self.config.shift
        if shift:
            xt = F.pad(xt, (1, 0), value=self.mask_id + 1)
            segment = None if segment is None else F.pad(segment, (1, 0), value=0)
        how = apart(segment)
        if seen is not None:
            how['mask'] = seen & how.get('mask', True)
        out = self.gpt(xt, time=m if self.config.time_input else None, **how)
        return out[:, :-1] if shift else out

    def nats(self, x, n=1, segment=None, given=None):
        """An estimate, with n draws, of the upper bound on -log p(x | given) in nats: (B,). x, segment,
        given (B, T).

        Draw i has a noise level from the i-th n-th of all (the draws together are stratified).
        """
        draw = self.step_nats if self.config.T else self.count_nats
        total = self.copy_nats(x, segment, given)
        for i in range(n):
            total = total + draw(x, (i + torch.rand(x.size(0), device=x.device)) / n, segment, given) / n
        return total

    def count_nats(self, x, v, segment=None, given=None, u=None):
        """The bound's term at the fraction v (B,) in [0, 1) of all counts: mask exactly k tokens, k uniform
        on 1..T. The noise level is the k-th smallest of T uniform numbers, u (B, T)."""
        u = torch.rand(x.shape, device=x.device) if u is None else u
        length, u = count_text(x, u, segment, given)
        k = torch.minimum((v[:, None] * length).long() + 1, length.clamp(min=1))
        m = u.sort(-1).values.gather(1, k - 1)[:, 0]
        return (length / k)[:, 0] * self.masked_nats(x, exactly(k[:, 0], u), segment, m, m)

    def step_nats(self, x, v, segment=None, given=None):
        """The bound's term at the fraction v (B,) in [0, 1) of the T steps."""
        m, m_before, weight = self.levels(v)
        _, u = count_text(x, torch.rand(x.shape, device=x.device), segment, given)
        return weight * self.masked_nats(x, u < m[:, None], segment, m, m_before)

    def copy_nats(self, x, segment=None, given=None):
        """The bound's reconstruction term -log p(x0 | x0), (B,): zero where clean tokens are copied."""
        none = torch.zeros(x.size(0), device=x.device)
        if self.copies:
            return none
        return of_text(token_nats(self.network(x, none, segment), x), segment, given).sum(-1)

    def nats_left(self, x):
        """-log p(x) in nats of the same network writing left to right, exact, (B,); T forwards.

        Position i is predicted from x[:i] and T - i masks: another generation order,
        hence another model than `nats`.
        """
        position = torch.arange(x.size(1), device=x.device)
        total = 0
        for i in range(x.size(1)):
            logp = self.logp(x.where(position < i, self.mask_id))[:, i]
            total = total - logp.gather(-1, x[:, i:i + 1])[:, 0]
        return total

    def logs(self, xt, t=None):
        """Unnormalised log p(x0 | xt), (B, T, V), at least float32; [MASK] left out. t (B,) is the noise
        level, by default the share of masks."""
        if t is None:
            t = (xt == self.mask_id).float().mean(-1)
        out = self.network(xt, t)[..., :self.config.vocab_size]
        return sedd_logs(out)

    def logp(self, xt, t=None):
        """log p(x0 | xt), (B, T, V), normalised: `logs` with the sum of SEDD's scores divided out."""
        return self.logs(xt, t).log_softmax(-1)

    def denoise(self, xt, t=None):
        """log p(x0 | xt), (B, T, V) float32, normalised. A clean token is copied. t (B,): noise level."""
        logp = self.logp(xt, t).float()
        copied = torch.full_like(logp, -torch.inf).scatter(-1, xt.clamp(max=self.mask_id - 1)[..., None], 0.0)
        return torch.where((xt == self.mask_id)[..., None], logp, copied)

    @torch.no_grad()
    def sample(self, xt, steps, rule='', **how):
        """Generator of canvases (B, T), one a network call;
        xt holds V where tokens are to be drawn (see unmask.py)."""
        if rule == 'analytic' and not self.copies:
            raise ValueError("rule=analytic is for scores (sedd) and for subs, not for d3pm")
        analytic = rule == 'analytic' and self.token_loss is sedd
        denoise = self.logs if analytic else self.denoise
        yield from unmask(denoise, xt, self.mask_id, steps, rule or 'ancestral', **how)
