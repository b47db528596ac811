"""
Score-based diffusion over token embeddings: tokens are points, noise moves them, and a transformer says
which tokens they were.

Token v has a learned embedding e_v of norm sqrt(d). The forward process adds Gaussian noise,
x = e + sigma eps, where every token may have a noise level sigma of its own; given tokens have sigma = 0.
The network predicts p(v | x) at every position and is trained by cross-entropy. The denoised point is the
mean of the embeddings, D(x) = sum_v p(v | x) e_v, and (D - x) / sigma^2 is the score (score interpolation,
CDCD arXiv 2211.15089).

Bayes' rule splits p(v | x) into what a noisy point says about its own token and what the others say:

    p(v | x)  ~  N(x_i; e_v, sigma_i^2) p(v | the others),   log N(x; e_v, sigma^2) = x.e_v / sigma^2 + const

(all norms are equal). The first factor is known (Plaid 2305.18619), so the network F only adds the second.
This is EDM's skip connection (2206.00364):

    log p(v | x) + const = x.e_v / sigma^2 + e_v.F / c_out = e_v.(c_skip x + c_out F) / c_out^2

The bound is that of any diffusion (VDM 2107.00630), for every path on which the noise of all tokens falls
from sigma_max to sigma_min:

    -log p(x0) <= T d/2 log(1 + 1 / sigma_max^2) + E int sum_i |e_i - D_i|^2 / 2 d(1 / sigma_i^2)
                  + E sum_i -log p(x0_i | x at sigma_min)

Noise levels are drawn as quantiles u in [0, 1]. A learned time warp turns them into sigmas such that the
cross-entropy rises evenly with u (CDCD); the integrand of the bound is then nearly constant, too.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from ar import token_nats
from configurator import Count, NonNegative, Positive, Share
from masked import low_discrepancy
from parts.gaussian import dpmpp_2m, euler, full_precision, heun, noise_level, precondition, renoise
from parts.warp import BINS, quantile, warp_cdf, warped_loss
from text.packing import counted, keep_apart
from unmask import ranks, truncate


@dataclass
class Config(model.Config):
    # score-based diffusion
    d_embed: Count = 64           # d, width of the embeddings
    sigma_min: Positive = 1.5     # the least noise; for other d in proportion to sqrt(d)
    sigma_max: Positive = 60.0    # the most
    rho: Positive = 7.0           # sigma(t)^(1/rho) is linear in t; 1: sigma is
    time_warp: bool = True        # learn how often to visit a noise level from the loss there
    reads: Literal['soft', 'scaled'] = 'soft'  # network input: soft, D by x.e_v / sigma^2 | scaled, c_in x
    self_condition: bool = False  # the network sees its last guess; in training half of the rows do
    bound_stagger: NonNegative = 8.0  # of the bound: how far apart tokens lose their noise; 0: all together
    # score-based diffusion, training only
    tilt: Positive = 1.7          # quantiles u^tilt; above 1, clean tokens are more common
    per_token: Share = 1.0        # share of rows whose tokens have noise levels of their own
    given_share: Share = 0.1      # share of rows with given tokens, in one span or scattered
    loss_weight: Literal['flat', 'edm'] = 'flat'  # flat, 1 | edm, (sigma^2 + 1) / sigma^2
    mse: NonNegative = 0.0        # weight of the squared error of D = c_skip x + c_out F

    def __post_init__(self):
        super().__post_init__()
        if not LEAST <= self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must be "
                             f"{LEAST} <= sigma_min < sigma_max")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: there is nothing to learn about one character")


# ---- embeddings -------------------------------------------------------------------------------------------

def on_sphere(weight):
    """Embeddings of norm sqrt(d), so of unit variance per dimension: (V, d) -> (V, d)."""
    return weight.size(-1) ** 0.5 * F.normalize(weight, dim=-1)


def denoised(logits, E):
    """D, the mean of the embeddings E (V, d) under logits (B, T, V): (B, T, d)."""
    with full_precision(E):
        return logits.softmax(-1) @ E


def anisotropy(E):
    """Mean cosine between two different embeddings (V, d): 0 if orthogonal, 1 if all are the same."""
    unit = F.normalize(E, dim=-1)
    V = len(E)
    return (unit.sum(0).square().sum() - V) / (V * (V - 1))


# ---- noise ------------------------------------------------------------------------------------------------

LEAST = 0.01  # stands for the sigma of given tokens where it divides; it leaves no doubt about the token


def staggered(left, order, stagger):
    """Quantiles u of the noise when a share `left` of the way is left. Each token goes from 1 to 0 in
    1 / (1 + stagger) of the way, order 0 first and order 1 last. left, order in [0, 1], broadcast."""
    return (left * (1 + stagger) - (1 - order) * stagger).clamp(0, 1)


def spans(B, T, device=None):
    """Given tokens for training, (B, T) bool: a span of any length in every row, its places shuffled in half
    of the rows."""
    length = (torch.rand(B, 1, device=device) * T).long()
    start = (torch.rand(B, 1, device=device) * (T - length + 1)).long()
    place = torch.arange(T, device=device).expand(B, T)
    shuffled = torch.rand(B, T, device=device).argsort(-1)
    place = torch.where(torch.rand(B, 1, device=device) < 0.5, place, shuffled)
    return (place >= start) & (place < start + length)


# ---- samplers --------------------------------------------------------------------------------------------

RULES = {f.__name__: f for f in (euler, heun, dpmpp_2m, renoise)}

# Which tokens lose their noise first: (log p (B, T, V), a uniform number per token) -> score, highest first.
ORDERS = {
    'sure': lambda logp, chance: logp.amax(-1),  # the path depends on log p: not exact
    'random': lambda logp, chance: chance,
    'left': lambda logp, chance: -torch.ones_like(chance).cumsum(-1),  # AR-Diffusion 2305.09515
    'together': lambda logp, chance: chance,  # all at once, see `sample`
}


class Model(nn.Module):
    bound, takes, revises, any_length = 'upper', ('windows', 'lines'), True, False
    orders, base, selects, measures = ('left',), '', True, False
    reading, verbs = dict(temperature=0.7), ('logits',)

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id = config, config.vocab_size
        V, d, C = config.vocab_size, config.d_embed, config.n_embd
        self.gpt = model.GPT(config, causal=False, timed=True, tokens=False)
        self.embed = nn.Embedding(V, d)
        self.read = nn.Linear(d * (1 + config.self_condition), C, bias=False)
        self.head = nn.Linear(C, d, bias=False)
        self.slopes = nn.Parameter(torch.full((BINS,), math.log(math.log(V) / BINS)))  # of the time warp
        nn.init.normal_(self.read.weight, std=d ** -0.5)
        nn.init.zeros_(self.head.weight)

    def level(self, u):
        """Quantiles u of the noise -> sigma, -d(1 / sigma^2) / du, t; of the shape of u."""
        c = self.config
        cdf = warp_cdf(self.slopes.detach() if c.time_warp else torch.zeros_like(self.slopes))
        t, density = quantile(cdf, u)
        sigma, slope = noise_level(t, c.sigma_min, c.sigma_max, c.rho)
        return sigma, 2 * sigma ** -3 * slope / density, t

    def logits(self, x, sigma, E, guess=None, segment=None):
        """Unnormalised log p(x0 | x), (B, T, V) float32, and the network's F (B, T, d). x (B, T, d), sigma
        (B, T), E (V, d); guess (B, T, d): the last D, if the model is self-conditioned."""
        with full_precision(x):
            E = E.to(torch.promote_types(E.dtype, torch.float32))
            c_in, c_skip, c_out = precondition(sigma.clamp(min=LEAST)[..., None])
            evidence = (c_skip * x) @ E.T / c_out ** 2
        seen = evidence.softmax(-1) @ E if self.config.reads == 'soft' else c_in * x
        if self.config.self_condition:
            seen = torch.cat([seen, torch.zeros_like(x) if guess is None else guess], -1)
        time = torch.atan(sigma) * (2 / math.pi)
        out = self.head(self.gpt.trunk(self.read(seen), time=time, **keep_apart(segment)))
        with full_precision(x):
            return evidence + out.to(E.dtype) @ E.T / c_out, out

    # ---- training ----

    def forward(self, x, segment=None, u=None, noise=None):
        """x (B, T) -> (loss in nats per token, metrics). segment (B, T): of packed texts (text/packing.py).
        A test may set the noise: its quantiles u (B, T) in [0, 1] and noise (B, T, d)."""
        c, E, scored = self.config, on_sphere(self.embed.weight), counted(x, segment)
        sigma, _, t = self.level(self.draw_quantiles(*x.shape, x.device) if u is None else u)
        if c.given_share:
            given = spans(*x.shape, x.device) & (torch.rand(len(x), 1, device=x.device) < c.given_share)
            sigma, scored = sigma.masked_fill(given, 0), scored & ~given
        e = E[x]
        noisy = e + sigma[..., None] * (torch.randn_like(e) if noise is None else noise)
        guess = self.first_guess(noisy, sigma, E, segment) if c.self_condition else None
        logits, out = self.logits(noisy, sigma, E, guess, segment)
        nats = token_nats(logits, x)
        mean = lambda value: (value * scored).sum() / scored.sum().clamp(min=1)
        _, c_skip, c_out = precondition(sigma.clamp(min=LEAST))
        loss = mean(nats / c_out ** 2 if c.loss_weight == 'edm' else nats)
        if c.mse:
            D = c_skip[..., None] * noisy + c_out[..., None] * out
            loss = loss + c.mse * mean((D - e).square().mean(-1) / c_out ** 2)
        warp_loss = mean((warped_loss(self.slopes, t) - nats.detach()) ** 2)
        loss = loss + warp_loss - warp_loss.detach()  # its gradient alone: the printed loss does not change
        return loss, {'cross_entropy': mean(nats).detach(), 'anisotropy': anisotropy(E).detach(),
                      'variance': E.var(0, correction=0).mean().detach()}

    def draw_quantiles(self, B, T, device):
        """The noise of a batch, (B, T) in [0, 1]: one for each token, or one for all tokens of a row."""
        row = low_discrepancy(torch.rand((), device=device), B)[:, None].expand(B, T)
        own = torch.rand(B, 1, device=device) < self.config.per_token
        return torch.where(own, torch.rand(B, T, device=device), row) ** self.config.tilt

    def first_guess(self, noisy, sigma, E, segment):
        """D (B, T, d) without self-conditioning, in the first half of the rows; 0 in the others."""
        half = len(noisy) // 2
        segment = None if segment is None else segment[:half]
        with torch.no_grad():
            logits, _ = self.logits(noisy[:half], sigma[:half], E, None, segment)
            return F.pad(denoised(logits, E), (0, 0, 0, 0, 0, len(noisy) - half))

    # ---- likelihood ----

    def nats(self, x, n=1, segment=None):
        """An estimate, with n draws, of the upper bound on -log p(x) in nats: (B,). x, segment (B, T).

        Tokens lose their noise in a random order, config.bound_stagger apart; draw i is at a random place in
        the i-th n-th of the way.
        """
        E = on_sphere(self.embed.weight)
        c, e, ones = self.config, E[x], torch.ones(x.shape, device=x.device)

        def noised(sigma):
            return self.logits(e + sigma[..., None] * torch.randn_like(e), sigma, E, None, segment)[0]
        total = c.d_embed / 2 * math.log1p(c.sigma_max ** -2) * ones
        total = total + token_nats(noised(c.sigma_min * ones), x)
        for i in range(n):
            left = (i + torch.rand(len(x), 1, device=x.device)) / n
            order = torch.rand(x.shape, device=x.device).argsort(-1).argsort(-1) / max(1, x.size(1) - 1)
            u = staggered(left, order, c.bound_stagger)
            sigma, rate, _ = self.level(u)
            error = (e - denoised(noised(sigma), E)).square().sum(-1)
            moving = (u > 0) & (u < 1)
            total = total + rate * (1 + c.bound_stagger) * error / 2 * moving / n
        return (total * counted(x, segment)).sum(-1)

    def nats_left(self, x):
        """-log p(x) in nats of the same network writing left to right, exact, (B,); T forwards. The tokens
        before i are given; 0, the mean of noise, stands for i and those after it."""
        E = on_sphere(self.embed.weight)
        e, place, total = E[x], torch.arange(x.size(1), device=x.device), 0
        for i in range(x.size(1)):
            sigma = torch.where(place < i, 0.0, self.config.sigma_max).expand(x.shape).to(e.dtype)
            logits, _ = self.logits(e * (place < i)[:, None], sigma, E)
            total = total + token_nats(logits[:, i:i + 1], x[:, i:i + 1])[:, 0]
        return total

    # ---- samples ----

    @torch.no_grad()
    def sample(self, xt, steps, rule='', temperature=1.0, top_k=0, top_p=1.0, *,
               first: Literal[tuple(ORDERS)] = 'sure',  # to lose its noise: sure | random | left | together
               stagger: NonNegative = 3.0):  # how far apart: each token takes 1 / (1 + stagger) of the steps
        """Generator of canvases (B, T), one per network call: the likeliest tokens so far. xt (B, T) holds V
        where tokens are to be written; the given ones are clean points all along. rule: one of RULES ('':
        renoise). temperature, top_k, top_p change p(v | x), of which D is the mean. Raises ValueError."""
        rule = rule or 'renoise'
        for name, value, known in (('rule', rule, RULES), ('first', first, ORDERS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of: {', '.join(known)}")
        E, free = on_sphere(self.embed.weight), xt == self.mask_id
        if not free.any():
            return
        tie_break = torch.rand(xt.shape, device=xt.device)
        top_rank = (free.sum(-1, keepdim=True) - 1).clamp(min=1)
        stagger, guess = stagger if first != 'together' else 0.0, None

        def denoise(x, sigma):
            nonlocal guess
            logits, _ = self.logits(x, sigma, E, guess)
            guess = denoised(truncate(logits / max(temperature, 1e-4), top_k, top_p), E)
            return logits.log_softmax(-1), guess

        def path(k, logp, sigma):
            if k == steps:
                return torch.zeros_like(sigma)
            order = ranks(ORDERS[first](logp, tie_break), free) / top_rank
            level, _, _ = self.level(staggered(1 - k / (steps - 1), order, stagger))
            return torch.minimum(sigma, level)

        sigma = self.level(torch.ones(xt.shape, device=xt.device))[0].masked_fill(~free, 0)
        points = E[xt.clamp(max=self.mask_id - 1)]
        pure = math.hypot(self.config.sigma_max, 1) * torch.randn_like(points)
        x = torch.where(free[..., None], pure, points)
        for logp in RULES[rule](denoise, x, sigma, path, steps):
            yield torch.where(free, logp.argmax(-1), xt)
