"""
Latent diffusion of text: the next window's latents, given those of the windows before it.

A sentence VAE (vae.py), frozen, turns a window into n vectors z of unit variance a dimension. The forward
process is x = z + sigma eps; a small transformer over [time, z of the windows before, x] predicts z with
EDM's preconditioning (arXiv 2206.00364), c_in = c_skip^(1/2) = 1 / sqrt(sigma^2 + 1), c_out = sigma c_in:

    D(x, sigma) = c_skip x + c_out F(c_in x, sigma, before),     loss  E lambda(sigma) |D - z|^2.

sigma = tan(pi u / 2) with u uniform visits log-SNR as a cosine schedule does (2202.00512). Where the windows
before are left out (in a fifth of the rows) F learns the unconditional law, for classifier-free guidance
(2207.12598). A new text: encode the end of the prompt, draw the next latents, decode them, and so on.

The bound is that of any diffusion (VDM 2107.00630), whose first noise level, sigma_0, is the decoder's:

    -log p(x) <= E -log p(x | z + sigma_0 eps) + E int_{sigma_0} |z - D|^2 / sigma^3 d sigma + KL at the end
"""
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from text import files
import model
import vae
from masked import low_discrepancy
from score import dpmpp_2m, euler, heun, precondition


@dataclass
class Config(model.Config):
    vae: str = ''                # config of the embedded VAE, JSON; set from --base
    n_prev: int = 1              # windows before that the network sees
    sigma_law: str = 'tan'       # training only: tan | lognormal
    sigma_low: float = 1e-3      # training only: ends of the law of sigma
    sigma_high: float = 1e3      # and where the bound begins
    law_mean: float = -0.5       # training only: of log sigma, lognormal
    law_std: float = 1.5         # training only: its standard deviation
    error_weight: str = 'edm'    # training only: lambda: edm, (s^2 + 1) / s^2 | eps, 1 / s^2 | x0, 1
    condition_drop: float = 0.2  # training only: share of rows that do not see the windows before
    stride: int = 12             # training only: tokens between the starts of windows; not for sentences
    decode_sigma: float = 1.0    # sigma_0 of the bound

    def __post_init__(self):
        super().__post_init__()
        for name, known in (('sigma_law', LAWS), ('error_weight', WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: {', '.join(known)}")
        if not 0 < self.sigma_low < self.sigma_high:
            raise ValueError(f"sigma_low={self.sigma_low} and sigma_high={self.sigma_high} must be "
                             f"0 < sigma_low < sigma_high")
        if self.law_std <= 0 or not 0 < self.decode_sigma < self.sigma_high:
            raise ValueError(f"law_std={self.law_std} must be positive, decode_sigma={self.decode_sigma} "
                             f"in (0, sigma_high={self.sigma_high})")
        for name in ('n_prev', 'stride'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.condition_drop <= 1:
            raise ValueError(f"condition_drop={self.condition_drop} must be in [0, 1]")
        if self.vae and not json.loads(self.vae)['sentences'] and self.block_size % self.stride:
            raise ValueError(f"stride={self.stride} must divide block_size={self.block_size}: windows begin "
                             f"where others end")


def inherited(config):
    """Knobs that a latent diffusion takes from the config of its VAE."""
    return dict(vae=json.dumps(config), block_size=config['block_size'], vocab_size=config['vocab_size'])


# ---- noise ------------------------------------------------------------------------------------------------

def tan_law(u, low, high, mean, std):
    """sigma = tan(pi v / 2), v uniform: u in (0, 1) -> sigma in [low, high], by v's share of the range."""
    a, b = math.atan(low), math.atan(high)
    return torch.tan(a + u * (b - a))


def lognormal_law(u, low, high, mean, std):
    """log sigma ~ N(mean, std^2), cut off at low and high (EDM)."""
    cdf = lambda s: 0.5 * (1 + math.erf((math.log(s) - mean) / std / 2 ** 0.5))
    p = cdf(low) + u * (cdf(high) - cdf(low))
    return (mean + std * torch.special.ndtri(p)).exp().clamp(low, high)


LAWS = dict(tan=tan_law, lognormal=lognormal_law)
WEIGHTS = dict(edm=lambda s: 1 + s ** -2, eps=lambda s: s ** -2, x0=torch.ones_like)  # of |D - z|^2


def karras(steps, low, high, rho=7.0):
    """The noise levels of a sampler, (steps + 1,), from high to low, sigma^(1/rho) linear, and 0 (EDM)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return F.pad((a + torch.arange(steps) / max(1, steps - 1) * (b - a)) ** rho, (0, 1))


# ---- samplers: score.py's, with latents for tokens, and one with fresh noise ------------------------------

def dpmpp_2m_sde(denoise, x, sigma, path, steps, eta=0.0):
    """DPM++ 2M SDE (arXiv 2211.01095, k-diffusion's midpoint form): eta: share of the noise that is drawn
    anew; 0: dpmpp_2m. Arguments as in score.py, one level for all."""
    D_before, h_before = None, 1.0
    for k in range(1, steps + 1):
        D, _ = denoise(x, sigma)
        yield D
        lower = path(k, D, sigma)
        if not lower.any():
            return
        h = (sigma / lower).log()[..., None]
        gone = -torch.expm1(-(1 + eta) * h)  # share of x's distance to D that this step covers
        x_next = (lower / sigma)[..., None] * (-eta * h).exp() * x + gone * D
        if D_before is not None:
            x_next = x_next + gone * h / (2 * h_before) * (D - D_before)
        if eta:
            x_next = x_next + lower[..., None] * (-torch.expm1(-2 * eta * h)).sqrt() * torch.randn_like(x)
        x, sigma, D_before, h_before = x_next, lower, D, h


RULES = {f.__name__: f for f in (dpmpp_2m_sde, dpmpp_2m, euler, heun)}
LOW, HIGH = 0.01, 100.0  # the noise levels of a sampler, unless training stays within
DOUBT = 3.0              # what the decoder is told of the noise on latents that were drawn (NOTES.md), or
                         # less, if training told it less
WAVES = 64  # random Fourier features of the noise level


# ---- latents on disk --------------------------------------------------------------------------------------

@torch.no_grad()
def cached(encoder, windows, folder, rows=256):
    """Latents (N, n, d) float16 of all windows by the VAE `encoder`, computed once and kept in the folder,
    in a file whose name is a hash of both."""
    key = hashlib.sha256(f'{windows.W} {encoder.config.sentences}'.encode())
    for t in (*encoder.state_dict().values(), windows.tokens, windows.start):
        key.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    path = Path(folder, f'latents-{key.hexdigest()[:16]}.npy')
    if not path.exists():
        n, d, device = encoder.config.n_latent, encoder.config.d_latent, windows.start.device
        temporary = path.with_suffix(f'.{os.getpid()}.tmp')
        with files.disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            out = np.lib.format.open_memmap(temporary, 'w+', np.float16, (len(windows), n, d))
        parts = torch.arange(len(windows), device=device).split(rows)
        try:
            for part in tqdm(parts, desc=f'latents of {len(windows)} windows', disable=None):
                z = encoder.encode(windows.window(part))
                out[part[0].item():part[-1].item() + 1] = z.half().cpu().numpy()
            with files.disk(path):
                out.flush()
                del out  # Windows renames no file that is open
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path))


class Latents:
    """Batches of latents with those of the windows before them."""

    def __init__(self, windows, z, n_prev):
        self.windows, self.z, self.n_prev = windows, z, n_prev

    def rows(self, i):
        """Of windows i (B,): latents (B, n, d), those before (B, n_prev, n, d), which of these there are."""
        j = self.windows.before(i, self.n_prev)
        return self.z[i].float(), self.z[j.clamp(min=0)].float(), j >= 0

    def batch(self, B):
        return self.rows(torch.randint(len(self.windows), (B,), device=self.z.device))


class Model(nn.Module):
    bound, packs, revises, any_length = 'upper', False, False, True
    built_on = 'vae'

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id, c = config, config.vocab_size, config
        self.vae = vae.Model(vae.Config(**json.loads(c.vae))).requires_grad_(False).eval()
        self.n, self.d = self.vae.config.n_latent, self.vae.config.d_latent
        self.doubt = min(DOUBT, self.vae.config.latent_noise)
        slots = 1 + self.n * (c.n_prev + 1)
        self.gpt = model.GPT(model.Config(c.vocab_size, slots, c.n_layer, c.n_head, c.n_embd, c.dropout,
                                          c.arch),
                             causal=False, tokens=False)
        self.project = nn.Linear(self.d, c.n_embd, bias=False)  # of all latents
        self.slot = nn.Parameter(torch.randn(slots, c.n_embd) * 0.3)
        self.time = nn.Linear(2 * WAVES, c.n_embd)
        self.head = nn.Linear(c.n_embd, self.d, bias=False)
        self.register_buffer('freq', torch.randn(WAVES))
        nn.init.normal_(self.project.weight, std=self.d ** -0.5)
        nn.init.zeros_(self.head.weight)

    def inherit(self, base, pieces):
        """Take over the weights of the base: a state dict of vae.Model."""
        self.vae.load_state_dict(base)

    def cut(self, tokens, end, stride=0):
        return self.vae.cut(tokens, end, stride)

    def source(self, tokens, end, folder):
        """What train.py draws batches from; the latents are kept in the folder."""
        windows = self.cut(tokens, end, self.config.stride)
        return Latents(windows, cached(self.vae, windows, folder).to(tokens.device), self.config.n_prev)

    def train(self, mode=True):
        """The embedded VAE stays as it is: frozen, without dropout."""
        super().train(mode)
        self.vae.eval()
        return self

    def denoise(self, x, sigma, before, there):
        """D (B, n, d) float32 of x (B, n, d) at sigma (B,). before (B, n_prev, n, d): latents of the windows
        before, the nearest last; there (B, n_prev) bool: which of them there are."""
        sigma = sigma[:, None, None]
        c_in, c_skip, c_out = precondition(sigma)
        phase = 2 * math.pi * sigma.log() / 4 * self.freq
        time = self.time(torch.cat([phase.cos(), phase.sin()], -1))
        h = torch.cat([time, self.project(before).flatten(1, 2), self.project(c_in * x)], 1) + self.slot
        seen = F.pad(there.repeat_interleave(self.n, 1), (1, self.n), value=True)
        h = self.gpt.trunk(h, seen[:, None, None])
        return c_skip * x + c_out * self.head(h[:, -self.n:]).float()

    def forward(self, z, before, there, sigma=None, noise=None):
        """Latents z (B, n, d) of windows, of those before (as in `denoise`) -> (loss, metrics). Noise may be
        given: sigma (B,), noise (B, n, d)."""
        c, B = self.config, len(z)
        if sigma is None:
            u = low_discrepancy(torch.rand((), device=z.device), B)
            sigma = LAWS[c.sigma_law](u, c.sigma_low, c.sigma_high, c.law_mean, c.law_std)
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

    def nats(self, x, n=1, prefix=None, past=None):
        """An estimate of the upper bound on -log p(x | what comes before) in nats, (B,): one draw of the
        decoder's latents, n of the integral. x (B, W); prefix (B, W) for the decoder and past
        (B, n_prev, W), the windows before, for the diffusion, V where there is nothing.

        Of n draws, one is in each n-th of the range of log c_out, over which the integrand is |z - D|^2 /
        c_out^2: constant, were the latents normal.
        """
        nothing = torch.full_like(x, self.mask_id)
        prefix = nothing if prefix is None else prefix
        past = nothing[:, None].expand(-1, self.config.n_prev, -1) if past is None else past
        seen = self.context(past)
        z, low, high = self.vae.encode(x), self.config.decode_sigma, self.config.sigma_high
        noisy = z + low * torch.randn_like(z)
        # the noise in the VAE's units, beyond the posterior's, if training told the decoder of any
        doubt = (low * low * self.vae.std.square() - self.vae.blur.square()).mean().clamp(min=0).sqrt()
        doubt = doubt * (self.vae.config.latent_noise > 0)
        text = self.vae.window_nats(self.vae.raw(noisy), x, prefix, doubt)
        end = (math.log1p(high ** -2) + (z.square() - 1) / (high ** 2 + 1)).sum((1, 2)) / 2
        a, b = (-0.5 * math.log1p(s ** -2) for s in (low, high))
        total = text + end
        for i in range(n):
            share = (i + torch.rand(len(x), device=x.device)) / n
            sigma = torch.expm1(-2 * (a + share * (b - a))).clamp(min=high ** -2).rsqrt()
            noisy = z + sigma[:, None, None] * torch.randn_like(z)
            error = (z - self.denoise(noisy, sigma, *seen)).square().sum((1, 2))
            total = total + (b - a) / n * (1 + sigma ** -2) * error
        return total

    # ---- texts ----

    def extremes(self):
        """The lowest and the highest noise level of a sampler: within those of training."""
        return max(LOW, self.config.sigma_low), min(HIGH, self.config.sigma_high)

    def expected(self, before, there):
        """The mean of the next window's latents, (B, n, d): what x tells at the highest level is nothing.
        Arguments as in `denoise`."""
        sigma = before.new_full((len(there),), self.extremes()[1])
        noise = torch.randn(len(there), self.n, self.d, device=before.device)
        return self.denoise(sigma[:, None, None] * noise, sigma, before, there)

    def draw(self, before, there, steps, rule, eta, cfg):
        """Generator of denoised latents D (B, n, d), one a network call (with cfg: two); the last is a draw
        of the next window's. before, there: as in `denoise`; cfg: D + cfg (D - D without what is before).
        Raises ValueError."""
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not one of: {', '.join(RULES)}")
        if eta and rule != 'dpmpp_2m_sde':
            raise ValueError(f"eta={eta} is for rule=dpmpp_2m_sde, not for {rule}")
        if cfg and not there.any():
            raise ValueError("cfg guides towards the text before: give one with --start")
        B, device, nowhere = len(there), before.device, torch.zeros_like(there)

        def denoise(x, sigma):
            D = self.denoise(x, sigma[:, 0], before, there)
            if cfg:
                D = D + cfg * (D - self.denoise(x, sigma[:, 0], before, nowhere))
            return D, D
        low, high = self.extremes()
        levels = karras(steps, low, high).to(device)
        path = lambda k, *_: levels[k].expand(B, self.n)
        x = math.hypot(high, 1) * torch.randn(B, self.n, self.d, device=device)
        knobs = dict(eta=eta) if rule == 'dpmpp_2m_sde' else {}
        return RULES[rule](denoise, x, path(0), path, steps, **knobs)

    @torch.no_grad()
    def unroll(self, xt, steps, rule='', temperature=1.0, top_k=0, top_p=1.0, eta=0.0, cfg=0.0, tau=0.0,
               doubt=None, context=0, trace=False, most=0, **others):
        """Generator of (canvas (B, T), start (B,) of the window being written): the latents of every next
        window are drawn from those of the windows before, then decoded with the text so far as prefix. xt: a
        canvas with prompts. context: how many tokens of a prompt's end are encoded (0: n_prev windows);
        trace: decode what the sampler thinks at every step, too; tau, doubt (None: the model's), most: as
        for vae.Model, tau stands for temperature. Raises ValueError."""
        vae.refuse('latent diffusion', top_k, top_p, others)
        W, k, rule = self.config.block_size, self.config.n_prev, rule or 'dpmpp_2m_sde'
        if context > k * W:
            raise ValueError(f"context={context}: this model sees {k * W} tokens before a window "
                             f"(n_prev={k}, block_size={W})")
        prompts = [row[row != self.mask_id][-context:] for row in xt]  # -0: all
        # a prompt shorter than a window stands where the end of a long one would (NOTES.md)
        right = not self.vae.config.sentences
        before, there = self.context(torch.stack([self.vae.windows_of(ids, k, right) for ids in prompts]))

        def latents():
            nonlocal before, there
            for D in self.draw(before, there, steps, rule, eta, cfg):
                if trace:
                    yield self.vae.raw(D)
            before = torch.cat([before[:, 1:], D[:, None]], 1)
            there = F.pad(there[:, 1:], (0, 1), value=True)
            if not trace:
                yield self.vae.raw(D)
        return self.vae.write_all(xt, latents, tau, self.doubt if doubt is None else doubt, most)

    def sample(self, xt, steps, **knobs):
        """Generator of canvases (B, T), a window each, or with trace a step each; knobs: of `unroll`."""
        return (canvas for canvas, _ in self.unroll(xt, steps, **knobs))
