"""
Score-based diffusion over token embeddings: tokens are points, noise moves them, a transformer says which
token a point has been. Every token may have a noise level of its own.

Token v is the point e_v, of norm sqrt(d), learned; the forward process is x = e + sigma eps. The network
predicts p(v | x) at every position, trained by cross-entropy; the denoised point is the mean of embeddings
D(x) = sum_v p(v | x) e_v, and (D - x) / sigma^2 the score (score interpolation, CDCD arXiv 2211.15089).
Bayes splits the prediction into what a noisy point says of its own token and what the other points say:

    p(v | x)  ~  N(x_i; e_v, sigma_i^2) p(v | the others),   log N(x; e_v, sigma^2) = x.e_v / sigma^2 + const

(all norms are equal). The first factor is known (Plaid 2305.18619), so the network only adds the second.
That is EDM's skip connection (2206.00364), e_v.(c_skip x + c_out F) / c_out^2 = x.e_v / sigma^2 + e_v.F /
c_out, where F is the network. A bound as for any diffusion (VDM 2107.00630), for every path on which the
noise of all tokens falls from sigma_max to sigma_min:

    -log p(x0) <= T d/2 log(1 + 1 / sigma_max^2) + E int sum_i |e_i - D_i|^2 / 2 d(1 / sigma_i^2)
                  + E sum_i -log p(x0_i | x at sigma_min)

Given tokens have sigma = 0. Quantiles u in [0, 1] of the noise become sigmas by a learned time warp, under
which the cross-entropy rises evenly with u (CDCD); that makes the bound's integrand nearly constant, too.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from ar import token_nats
from masked import low_discrepancy
from text.packing import apart, of_text
from unmask import ranks, truncate


@dataclass
class Config(model.Config):
    d_embed: int = 64            # d, width of the embeddings
    sigma_min: float = 1.5       # the least noise; for other d in proportion to sqrt(d)
    sigma_max: float = 60.0      # the most
    rho: float = 7.0             # sigma(t)^(1/rho) is linear in t; 1: sigma is
    time_warp: bool = True       # learn how often to visit a noise level from the loss there
    tilt: float = 1.7            # training only: quantiles u^tilt; above 1, clean tokens are more common
    per_token: float = 1.0       # training only: share of rows whose tokens have noise levels of their own
    given: float = 0.1           # training only: share of rows with given tokens, in one span or scattered
    self_condition: bool = False  # the network sees its last guess; in training half of the rows do
    reads: str = 'soft'          # the network sees: soft (what x.e_v / sigma^2 makes of x) | scaled (c_in x)
    loss_weight: str = 'flat'    # training only: flat | edm, (sigma^2 + 1) / sigma^2
    mse: float = 0.0             # training only: weight of the squared error of D = c_skip x + c_out F
    bound_stagger: float = 8.0   # of the bound: how far apart tokens lose their noise; 0: all together

    def __post_init__(self):
        super().__post_init__()
        if not LEAST <= self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must be "
                             f"{LEAST} <= sigma_min < sigma_max")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: a text of one character has nothing to tell")
        for name in ('d_embed', 'rho', 'tilt'):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ('per_token', 'given'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name in ('mse', 'bound_stagger'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name, known in (('reads', ('soft', 'scaled')), ('loss_weight', ('flat', 'edm'))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: {', '.join(known)}")


# ---- embeddings -------------------------------------------------------------------------------------------

def on_sphere(weight):
    """Embeddings of norm sqrt(d), so of unit variance per dimension: (V, d) -> (V, d)."""
    return weight.size(-1) ** 0.5 * F.normalize(weight, dim=-1)


def denoised(logits, E):
    """D, the mean of the embeddings E (V, d) under logits (B, T, V): (B, T, d), never in half precision."""
    with torch.autocast(E.device.type, enabled=False):
        return logits.softmax(-1) @ E


def anisotropy(E):
    """Mean cosine between two different embeddings (V, d): 0 if orthogonal, 1 if all are the same."""
    unit = F.normalize(E, dim=-1)
    V = len(E)
    return (unit.sum(0).square().sum() - V) / (V * (V - 1))


# ---- noise ------------------------------------------------------------------------------------------------

LEAST = 0.01  # sigma of given tokens where it is divided by; it leaves no doubt
BINS = 100    # of the time warp
FLOOR = 0.1   # share of the time warp's law that is uniform in t, so that no noise level is forgotten


def precondition(sigma):
    """EDM's c_in, c_skip, c_out (arXiv 2206.00364) for data of unit variance; any shape."""
    c_in = (sigma * sigma + 1).rsqrt()
    return c_in, c_in * c_in, sigma * c_in


def noise_level(t, low, high, rho):
    """sigma(t), t in [0, 1] from low to high, and its derivative."""
    a, b = low ** (1 / rho), high ** (1 / rho)
    root = a + t * (b - a)
    return root ** rho, rho * root ** (rho - 1) * (b - a)


def warped_loss(slopes, t):
    """The loss as the time warp has it: piecewise linear in t, rising. slopes (BINS,) are logarithms."""
    rise = slopes.exp()
    i = (t * BINS).long().clamp(0, BINS - 1)
    return F.pad(rise.cumsum(0), (1, 0))[i] + (t * BINS - i) * rise[i]


def warp_cdf(slopes):
    """The law of t under which the loss rises evenly, with a little of the uniform law: its CDF at the ends
    of the bins, (BINS + 1,)."""
    law = (1 - FLOOR) * slopes.softmax(0) + FLOOR / BINS
    cdf = F.pad(law.cumsum(0), (1, 0))
    return cdf / cdf[-1]


def quantile(cdf, u):
    """t with CDF u, and the density of the law there. u of any shape, in [0, 1]."""
    i = (torch.searchsorted(cdf, u.contiguous(), right=True) - 1).clamp(0, BINS - 1)
    law = cdf[i + 1] - cdf[i]
    return (i + (u - cdf[i]) / law) / BINS, law * BINS


def staggered(tau, order, stagger):
    """Quantiles u of the noise when a share tau of the way is left: all go from 1 to 0, order 0 first and
    order 1 last, each in 1 / (1 + stagger) of the way. tau, order in [0, 1], broadcast."""
    return (tau * (1 + stagger) - (1 - order) * stagger).clamp(0, 1)


def spans(B, T, device=None):
    """Given tokens for training, (B, T) bool: a span of any length of a row, packed or not; in half of the
    rows shuffled."""
    length = (torch.rand(B, 1, device=device) * T).long()
    start = (torch.rand(B, 1, device=device) * (T - length + 1)).long()
    place = torch.arange(T, device=device).expand(B, T)
    shuffled = torch.rand(B, T, device=device).argsort(-1)
    place = torch.where(torch.rand(B, 1, device=device) < 0.5, place, shuffled)
    return (place >= start) & (place < start + length)


# ---- samplers: generators of log p (B, T, V), one a network call ------------------------------------------
# denoise (x, sigma) -> log p, D; x (B, T, d), sigma (B, T). path (k, log p, sigma) -> the levels after step
# k of `steps`, not above sigma, 0 after the last. A token whose level does not change does not move. With the
# true posterior and many steps the first three draw from the law of the text, if the path does not look at
# log p; renoise does not.

def ratio(lower, sigma):
    """lower / sigma, 1 where both are 0: (B, T, 1)."""
    return torch.where(sigma > 0, lower / sigma.clamp(min=1e-12), 1.0)[..., None]


def euler(denoise, x, sigma, path, steps):
    """The probability flow dx = (x - D) / sigma dsigma, straight to the next level (CDCD)."""
    for k in range(1, steps + 1):
        logp, D = denoise(x, sigma)
        yield logp
        lower = path(k, logp, sigma)
        x, sigma = D + ratio(lower, sigma) * (x - D), lower


def heun(denoise, x, sigma, path, steps):
    """The same with the mean slope of both ends (EDM): two calls a step but the last."""
    for k in range(1, steps + 1):
        logp, D = denoise(x, sigma)
        yield logp
        lower = path(k, logp, sigma)
        ahead = D + ratio(lower, sigma) * (x - D)
        if k < steps:
            logp, D_ahead = denoise(ahead, lower)
            yield logp
            here, there = (s.clamp(min=1e-12)[..., None] for s in (sigma, lower))
            ahead = x + (lower - sigma)[..., None] * ((x - D) / here + (ahead - D_ahead) / there) / 2
        x, sigma = ahead, lower


def dpmpp_2m(denoise, x, sigma, path, steps):
    """DPM-Solver++(2M) (arXiv 2211.01095): D extrapolated from the last two, in log sigma."""
    D_before, h_before = 0, torch.zeros_like(sigma)
    for k in range(1, steps + 1):
        logp, D = denoise(x, sigma)
        yield logp
        lower = path(k, logp, sigma)
        h = -ratio(lower, sigma)[..., 0].log()
        # a token that has hardly moved before has no slope to go by
        share = torch.where((h_before > 0) & h.isfinite(), h / (2 * h_before), 0.0).clamp(max=1)[..., None]
        point = D + share * (D - D_before)
        x, sigma, D_before, h_before = point + ratio(lower, sigma) * (x - point), lower, D, h


def renoise(denoise, x, sigma, path, steps):
    """D with fresh noise of the next level."""
    for k in range(1, steps + 1):
        logp, D = denoise(x, sigma)
        yield logp
        lower = path(k, logp, sigma)
        fresh = D + lower[..., None] * torch.randn_like(D)
        x, sigma = torch.where((lower < sigma)[..., None], fresh, x), lower


RULES = {f.__name__: f for f in (euler, heun, dpmpp_2m, renoise)}


# which tokens lose their noise first: (log p (B, T, V), u (B, T) drawn once) -> score, the highest is first

def left(logp, u):
    """From left to right (AR-Diffusion arXiv 2305.09515)."""
    return -torch.arange(u.size(1), dtype=u.dtype, device=u.device).expand_as(u)


def random(logp, u):
    """In a random order."""
    return u


def sure(logp, u):
    """Those that the network is surest of. (Not exact, however good it is: the order is no accident.)"""
    return logp.amax(-1)


def together(logp, u):
    """All alike: there is no first one."""
    return u


ORDERS = {f.__name__: f for f in (sure, random, left, together)}


class Model(nn.Module):
    bound, packs, revises, any_length = 'upper', True, True, False

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
        with torch.autocast(x.device.type, enabled=False):  # large numbers of which differences count
            E = E.to(torch.promote_types(E.dtype, torch.float32))
            c_in, c_skip, c_out = precondition(sigma.clamp(min=LEAST)[..., None])
            evidence = (c_skip * x) @ E.T / c_out ** 2
        seen = evidence.softmax(-1) @ E if self.config.reads == 'soft' else c_in * x
        if self.config.self_condition:
            seen = torch.cat([seen, torch.zeros_like(x) if guess is None else guess], -1)
        h = self.gpt.trunk(self.read(seen), time=torch.atan(sigma) * (2 / math.pi), **apart(segment))
        out = self.head(h)
        with torch.autocast(x.device.type, enabled=False):
            return evidence + out.to(E.dtype) @ E.T / c_out, out

    def forward(self, x, segment=None, u=None, noise=None):
        """x (B, T) -> (loss in nats per token, metrics). segment (B, T): of packed texts, see packing.py.
        Noise may be given: its quantiles u (B, T) in [0, 1] and noise (B, T, d)."""
        E = on_sphere(self.embed.weight)
        if u is None:
            u = self.draw_quantiles(*x.shape, x.device)
        sigma, _, t = self.level(u)
        scored = of_text(torch.ones_like(x, dtype=torch.bool), segment)
        if self.config.given:
            held = spans(*x.shape, x.device) & (torch.rand(len(x), 1, device=x.device) < self.config.given)
            sigma, scored = sigma.masked_fill(held, 0), scored & ~held
        e = E[x]
        noisy = e + sigma[..., None] * (torch.randn_like(e) if noise is None else noise)
        guess = self.first_guess(noisy, sigma, E, segment) if self.config.self_condition else None
        logits, out = self.logits(noisy, sigma, E, guess, segment)
        nats = token_nats(logits, x)
        mean = lambda value: (value * scored).sum() / scored.sum().clamp(min=1)
        _, c_skip, c_out = precondition(sigma.clamp(min=LEAST))
        loss = mean(nats / c_out ** 2 if self.config.loss_weight == 'edm' else nats)
        if self.config.mse:
            D = c_skip[..., None] * noisy + c_out[..., None] * out
            loss = loss + self.config.mse * mean((D - e).square().mean(-1) / c_out ** 2)
        fit = mean((warped_loss(self.slopes, t) - nats.detach()) ** 2)
        loss = loss + fit - fit.detach()  # a gradient for the time warp, no part of the loss that is printed
        return loss, {'cross_entropy': mean(nats).detach(), 'anisotropy': anisotropy(E).detach(),
                      'variance': E.var(0, correction=0).mean().detach()}

    def draw_quantiles(self, B, T, device):
        """The noise of a batch, (B, T) in [0, 1]: of each token its own or of all tokens of a row."""
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

    def nats(self, x, n=1, segment=None):
        """An estimate, with n draws, of the upper bound on -log p(x) in nats: (B,). x, segment (B, T).

        Tokens lose their noise in a random order, config.bound_stagger apart; of n draws, one is in each
        n-th of the way.
        """
        E = on_sphere(self.embed.weight)
        d, e, ones = self.config.d_embed, E[x], torch.ones(x.shape, device=x.device)

        def noised(sigma):
            return self.logits(e + sigma[..., None] * torch.randn_like(e), sigma, E, None, segment)[0]
        total = d / 2 * math.log1p(self.config.sigma_max ** -2) * ones
        total = total + token_nats(noised(self.config.sigma_min * ones), x)
        for i in range(n):
            tau = (i + torch.rand(len(x), 1, device=x.device)) / n
            order = torch.rand(x.shape, device=x.device).argsort(-1).argsort(-1) / max(1, x.size(1) - 1)
            u = staggered(tau, order, self.config.bound_stagger)
            sigma, rate, _ = self.level(u)
            error = (e - denoised(noised(sigma), E)).square().sum(-1)
            moving = (u > 0) & (u < 1)
            total = total + rate * (1 + self.config.bound_stagger) * error / 2 * moving / n
        return of_text(total, segment).sum(-1)

    def nats_left(self, x):
        """-log p(x) in nats of the same network writing left to right, exact, (B,); T forwards. The tokens
        before i are given; for i and those behind it stands 0, the mean of noise."""
        E = on_sphere(self.embed.weight)
        e, place, total = E[x], torch.arange(x.size(1), device=x.device), 0
        for i in range(x.size(1)):
            sigma = torch.where(place < i, 0.0, self.config.sigma_max).expand(x.shape).to(e.dtype)
            logits, _ = self.logits(e * (place < i)[:, None], sigma, E)
            total = total + token_nats(logits[:, i:i + 1], x[:, i:i + 1])[:, 0]
        return total

    @torch.no_grad()
    def sample(self, xt, steps, rule='', temperature=1.0, top_k=0, top_p=1.0, first='', stagger=3.0,
               **others):
        """Generator of canvases (B, T), one a network call: the likeliest tokens so far. xt (B, T) holds V
        where tokens are to be written; the given ones are clean points all along.

        rule: one of RULES; first: one of ORDERS, in which tokens lose their noise, each in 1 / (1 + stagger)
        of the steps. temperature, top_k, top_p change p(v | x), of which D is the mean. Raises ValueError.
        """
        rule, first = rule or 'renoise', first or 'sure'
        for name, value, known in (('rule', rule, RULES), ('first', first, ORDERS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of: {', '.join(known)}")
        if others:
            raise ValueError(f"{', '.join(others)} is not for score-based diffusion")
        E, free = on_sphere(self.embed.weight), xt == self.mask_id
        if not free.any():
            return
        once, last = torch.rand(xt.shape, device=xt.device), (free.sum(-1, keepdim=True) - 1).clamp(min=1)
        stagger, guess = stagger if first != 'together' else 0.0, None

        def denoise(x, sigma):
            nonlocal guess
            logits, _ = self.logits(x, sigma, E, guess)
            guess = denoised(truncate(logits / max(temperature, 1e-4), top_k, top_p), E)
            return logits.log_softmax(-1), guess

        def path(k, logp, sigma):
            if k == steps:
                return torch.zeros_like(sigma)
            order = ranks(ORDERS[first](logp, once), free) / last
            level, _, _ = self.level(staggered(1 - k / (steps - 1), order, stagger))
            return torch.minimum(sigma, level)

        sigma = self.level(torch.ones(xt.shape, device=xt.device))[0].masked_fill(~free, 0)
        points = E[xt.clamp(max=self.mask_id - 1)]
        pure = math.hypot(self.config.sigma_max, 1) * torch.randn_like(points)
        x = torch.where(free[..., None], pure, points)
        for logp in RULES[rule](denoise, x, sigma, path, steps):
            yield torch.where(free, logp.argmax(-1), xt)
