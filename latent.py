"""
Latent diffusion of text: the next window's latents, given those of the windows before it.

A frozen sentence VAE (vae.py) turns a window of text into n vectors z, of unit variance in each dimension.
The forward process is x = z + sigma eps. A small transformer F over [time, z of the windows before, x]
predicts z with EDM's preconditioning (arXiv 2206.00364), c_in = sqrt(c_skip) = 1 / sqrt(sigma^2 + 1) and
c_out = sigma c_in:

    D(x, sigma) = c_skip x + c_out F(c_in x, sigma, before),     loss  E lambda(sigma) |D - z|^2.

sigma = tan(pi u / 2) with u uniform visits log-SNR as a cosine schedule does (2202.00512). In a fifth of the
rows F does not see the windows before, so that it learns the unconditional law for classifier-free guidance
(2207.12598) too. A new text: encode the end of the prompt, sample the next latents, decode them, and so on.

The bound is that of any diffusion (VDM 2107.00630); the decoder reads z at the first noise level, sigma_0:

    -log p(x) <= E -log p(x | z + sigma_0 eps) + E int_{sigma_0} |z - D|^2 / sigma^3 d sigma + KL at the end
"""
import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
import vae
from configurator import Count, Filename, Fixed, Natural, NonNegative, Positive, Share, knobs_of
from masked import low_discrepancy
from parts.gaussian import dpmpp_2m, dpmpp_2m_sde, euler, heun, karras, precondition
from text.latents import Latents, cached

RULES = {f.__name__: f for f in (dpmpp_2m_sde, dpmpp_2m, euler, heun)}
LOW, HIGH = 0.01, 100.0  # noise levels of a sampler, unless training stays within
DECODER_NOISE = 3.0      # what the decoder is told of sampled latents (NOTES.md), if training went so far
FOURIER = 64             # random Fourier features of the noise level


@dataclass
class Config(model.Config):
    # latent diffusion
    base: Filename = ''         # the sentence VAE to build on: a folder or a file
    vae: Fixed[str] = ''        # its config, JSON
    n_prev: Count = 1           # windows before that the network sees
    decode_sigma: Positive = 1.0  # sigma_0 of the bound
    # latent diffusion, training only
    sigma_law: Literal['tan', 'lognormal'] = 'tan'  # which noise levels are visited
    sigma_low: Positive = 1e-3  # the lowest
    sigma_high: Positive = 1e3  # the highest; the bound begins there
    error_weight: Literal['edm', 'eps', 'x0'] = 'edm'  # lambda: edm, (s^2 + 1) / s^2 | eps, 1 / s^2 | x0, 1
    condition_drop: Share = 0.2  # share of rows that do not see the windows before
    stride: Count = 12          # tokens between the starts of windows; not for sentences

    def __post_init__(self):
        super().__post_init__()
        if not self.sigma_low < self.sigma_high:
            raise ValueError(f"sigma_low={self.sigma_low} must be below sigma_high={self.sigma_high}")
        if not self.decode_sigma < self.sigma_high:
            raise ValueError(f"decode_sigma={self.decode_sigma} must be below sigma_high={self.sigma_high}")
        if self.vae and not json.loads(self.vae)['sentences'] and self.block_size % self.stride:
            raise ValueError(f"stride={self.stride} must divide block_size={self.block_size}: windows begin "
                             f"where others end")


def knobs_of_base(config):
    """The knobs that latent diffusion takes over from the config of its VAE, a dict."""
    return dict(vae=json.dumps(config), block_size=config['block_size'], vocab_size=config['vocab_size'])


# ---- noise levels of training: u uniform in (0, 1) -> sigma in [low, high] --------------------------------

def tan_law(u, low, high):
    """sigma = tan(pi v / 2), v uniform."""
    a, b = math.atan(low), math.atan(high)
    return torch.tan(a + u * (b - a))


def lognormal_law(u, low, high, mean=-0.5, std=1.5):
    """log sigma ~ N(mean, std^2), cut off at low and high (EDM)."""
    cdf = lambda s: 0.5 * (1 + math.erf((math.log(s) - mean) / std / 2 ** 0.5))
    p = cdf(low) + u * (cdf(high) - cdf(low))
    return (mean + std * torch.special.ndtri(p)).exp().clamp(low, high)


LAWS = dict(tan=tan_law, lognormal=lognormal_law)
WEIGHTS = dict(edm=lambda s: 1 + s ** -2, eps=lambda s: s ** -2, x0=torch.ones_like)  # of |D - z|^2


class Model(nn.Module):
    bound, takes, revises, any_length = 'upper', (), False, True
    orders, base, selects, measures = (), 'vae', True, False
    reading, verbs = {}, ('denoise',)

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id, c = config, config.vocab_size, config
        self.vae = vae.Model(vae.Config(**json.loads(c.vae))).requires_grad_(False).eval()
        self.n, self.d = self.vae.config.n_latent, self.vae.config.d_latent
        self.decoder_noise = min(DECODER_NOISE, self.vae.config.latent_noise)  # see `sample`
        slots = 1 + self.n * (c.n_prev + 1)
        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, dropout=c.dropout, arch=c.arch)
        self.gpt = model.GPT(model.Config(vocab_size=c.vocab_size, block_size=slots, **shape), causal=False,
                             tokens=False)
        self.project = nn.Linear(self.d, c.n_embd, bias=False)  # of all latents
        self.slot = nn.Parameter(torch.randn(slots, c.n_embd) * 0.3)
        self.time = nn.Linear(2 * FOURIER, c.n_embd)
        self.head = nn.Linear(c.n_embd, self.d, bias=False)
        self.register_buffer('freq', torch.randn(FOURIER))
        nn.init.normal_(self.project.weight, std=self.d ** -0.5)
        nn.init.zeros_(self.head.weight)

    def inherit(self, weights, pieces):
        """Take over the weights of the base, a state dict of vae.Model."""
        self.vae.load_state_dict(weights)

    def cut(self, tokens, end, folder=''):
        """The windows of a stream of tokens (text/rows.py): for training their latents, which are kept in
        the folder; for evaluation (no folder) tokens. end: the id between documents, or None."""
        windows = self.vae.cut(tokens, end, folder, self.config.stride, self.config.n_prev)
        return Latents(windows, cached(self.vae, windows, folder)) if folder else windows

    def train(self, mode=True):
        """The embedded VAE stays as it is: frozen, without dropout."""
        super().train(mode)
        self.vae.eval()
        return self

    def denoise(self, x, sigma, before, there):
        """D (B, n, d) float32 of x (B, n, d) at sigma (B,). before (B, n_prev, n, d): latents of the windows
        before, the nearest last; there (B, n_prev) bool: which of these exist."""
        sigma = sigma[:, None, None]
        c_in, c_skip, c_out = precondition(sigma)
        phase = 2 * math.pi * sigma.log() / 4 * self.freq
        time = self.time(torch.cat([phase.cos(), phase.sin()], -1))
        h = torch.cat([time, self.project(before).flatten(1, 2), self.project(c_in * x)], 1) + self.slot
        seen = F.pad(there.repeat_interleave(self.n, 1), (1, self.n), value=True)
        h = self.gpt.trunk(h, seen[:, None, None])
        return c_skip * x + c_out * self.head(h[:, -self.n:]).float()

    # ---- training and likelihood ----

    def forward(self, z, before, there, sigma=None, noise=None):
        """Latents z (B, n, d) of windows and those before them (as in `denoise`) -> (loss, metrics). A test
        may set the noise: sigma (B,), noise (B, n, d)."""
        c, B = self.config, len(z)
        if sigma is None:
            u = low_discrepancy(torch.rand((), device=z.device), B)
            sigma = LAWS[c.sigma_law](u, c.sigma_low, c.sigma_high)
        there = there & (torch.rand(B, 1, device=z.device) >= c.condition_drop)
        noise = torch.randn_like(z) if noise is None else noise
        D = self.denoise(z + sigma[:, None, None] * noise, sigma, before, there)
        error = (D - z).square().mean((1, 2))
        loss = (WEIGHTS[c.error_weight](sigma) * error).mean()
        return loss, {'error': error.mean().detach()}

    def context(self, windows):
        """Windows of tokens (B, n_prev, W) -> their latents (B, n_prev, n, d), and which hold any text."""
        there = (windows != self.mask_id).any(-1)
        return self.vae.encode(windows.flatten(0, 1)).unflatten(0, there.shape), there

    def nats(self, x, n=1, prefix=None, before=None):
        """An estimate of the upper bound on -log p(x | what comes before) in nats, (B,): one draw of the
        latents that the decoder reads, n of the integral. x (B, W); the decoder sees prefix (B, W), the
        diffusion the windows before (B, n_prev, W), V where there is no token.

        Draw i is in the i-th n-th of the range of log c_out. Over that the integrand is |z - D|^2 / c_out^2,
        constant if the latents were normal.
        """
        nothing = torch.full_like(x, self.mask_id)
        prefix = nothing if prefix is None else prefix
        before = nothing[:, None].expand(-1, self.config.n_prev, -1) if before is None else before
        seen = self.context(before)
        z, low, high = self.vae.encode(x), self.config.decode_sigma, self.config.sigma_high
        noisy = z + low * torch.randn_like(z)
        # the noise in the VAE's units, beyond the posterior's, if training told the decoder of any
        noise = (low * low * self.vae.std.square() - self.vae.blur.square()).mean().clamp(min=0).sqrt()
        noise = noise * (self.vae.config.latent_noise > 0)
        text = self.vae.window_nats(self.vae.raw(noisy), x, prefix, noise)
        end = (math.log1p(high ** -2) + (z.square() - 1) / (high ** 2 + 1)).sum((1, 2)) / 2
        a, b = (-0.5 * math.log1p(s ** -2) for s in (low, high))  # log c_out
        total = text + end
        for i in range(n):
            share = (i + torch.rand(len(x), device=x.device)) / n
            sigma = torch.expm1(-2 * (a + share * (b - a))).clamp(min=high ** -2).rsqrt()
            noisy = z + sigma[:, None, None] * torch.randn_like(z)
            error = (z - self.denoise(noisy, sigma, *seen)).square().sum((1, 2))
            total = total + (b - a) / n * (1 + sigma ** -2) * error
        return total

    # ---- samples ----

    def noise_range(self):
        """The lowest and the highest noise level of a sampler: within those of training."""
        return max(LOW, self.config.sigma_low), min(HIGH, self.config.sigma_high)

    def expected(self, before, there):
        """The mean of the next window's latents, (B, n, d): D at the highest noise level, where x says
        nothing. Arguments as in `denoise`."""
        sigma = before.new_full((len(there),), self.noise_range()[1])
        noise = torch.randn(len(there), self.n, self.d, device=before.device)
        return self.denoise(sigma[:, None, None] * noise, sigma, before, there)

    def sample_latents(self, before, there, steps, rule='', cfg=0.0, **knobs):
        """Generator of denoised latents D (B, n, d), one per network call (with cfg: two); the last is a draw
        of the next window's. before, there: as in `denoise`; knobs: the rule's own. Raises ValueError."""
        rule = rule or 'dpmpp_2m_sde'
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not one of: {', '.join(RULES)}")
        if wrong := knobs.keys() - knobs_of(RULES[rule]).keys():
            own = ', '.join([*knobs_of(self.sample), *knobs_of(RULES[rule])])
            raise ValueError(f"{', '.join(sorted(wrong))} is not for rule={rule} of latent diffusion: there "
                             f"are {own}")
        if cfg and not there.any():
            raise ValueError("cfg guides towards the text before: give one with --start")
        B, device, nowhere = len(there), before.device, torch.zeros_like(there)

        def denoise(x, sigma):
            D = (1 + cfg) * self.denoise(x, sigma[:, 0], before, there)
            if cfg:
                D = D - cfg * self.denoise(x, sigma[:, 0], before, nowhere)
            return D, D
        low, high = self.noise_range()
        levels = karras(steps, low, high).to(device)
        path = lambda k, *_: levels[k].expand(B, self.n)
        x = math.hypot(high, 1) * torch.randn(B, self.n, self.d, device=device)
        return RULES[rule](denoise, x, path(0), path, steps, **knobs)

    @torch.no_grad()
    def sample(self, xt, steps, rule='', *,
               cfg: NonNegative = 0.0,  # guidance towards the text before: D + cfg (D - D without it)
               tau: NonNegative = 0.0,  # share of the posterior's variance on z, temperature; 0: neither
               decoder_noise: NonNegative = DECODER_NOISE,  # on z, for the decoder; at most latent_noise
               context: Natural = 0,    # tokens of the prompt's end to encode; 0: n_prev windows
               windows: Natural = 0,    # at most so many; 0: until the canvas is full
               trace: bool = False,     # a canvas for every step: what the latents so far decode to
               **knobs):
        """Generator of canvases (B, T), one per window, with trace one per step: latents of every window are
        sampled given those of the windows before, then decoded with the text so far as prefix. xt (B, T) as
        for ar.Model, any T. rule: one of RULES ('': dpmpp_2m_sde); knobs: its own. Raises ValueError."""
        W, k = self.config.block_size, self.config.n_prev
        if context > k * W:
            raise ValueError(f"context={context}: this model sees {k * W} tokens before a window "
                             f"(n_prev={k}, block_size={W})")
        self.revises = trace  # the next step writes the same window again
        prompts = [row[row != self.mask_id][-context:] for row in xt]  # -0: all
        # a prompt shorter than a window stands where the end of a long one would (NOTES.md)
        right = not self.vae.config.sentences
        before, there = self.context(torch.stack([self.vae.windows_of(ids, k, right) for ids in prompts]))

        def latents():
            nonlocal before, there
            for D in self.sample_latents(before, there, steps, rule, cfg, **knobs):
                if trace:
                    yield self.vae.raw(D)
            before = torch.cat([before[:, 1:], D[:, None]], 1)
            there = F.pad(there[:, 1:], (0, 1), value=True)
            if not trace:
                yield self.vae.raw(D)
        noise = min(decoder_noise, self.vae.config.latent_noise)
        return self.vae.write_windows(xt, latents, tau, noise, windows)
