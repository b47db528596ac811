"""
Normal distributions, and diffusion by Gaussian noise, x = x0 + sigma eps: what score.py, vae.py and
latent.py share. x (B, T, d) are points, of tokens or of windows, each with a noise level: sigma (B, T).
"""
import contextlib
import math

import torch
import torch.nn.functional as F

from configurator import NonNegative


def full_precision(x):
    """No autocast around numbers made of x: differences of large ones count."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# ---- normal distributions ---------------------------------------------------------------------------------

def log_normal(x, mu, logvar):
    """log N(x; mu, e^logvar), of each dimension."""
    return -((x - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)) / 2


def mutual_information(z, mu, logvar):
    """Estimate of I(x; z) in nats from z ~ q(z | x) of B windows, all (B, n, d): E log q(z | x) - log q(z),
    q(z) the mean over the batch (ELBO surgery, Hoffman & Johnson 2016). It is at most log B."""
    z, mu, logvar = (t.flatten(1) for t in (z, mu, logvar))
    inverse = (-logvar).exp()
    with full_precision(z):
        pairs = z @ (mu * inverse).T - z.square() @ inverse.T / 2  # (B, B): log N(z_i; mu_j) + const
    pairs = pairs - (mu.square() * inverse + logvar).sum(1) / 2
    return (pairs.diagonal() - pairs.logsumexp(1) + math.log(len(z))).mean()


# ---- noise ------------------------------------------------------------------------------------------------

def precondition(sigma):
    """EDM's c_in, c_skip, c_out (arXiv 2206.00364) for data of unit variance; any shape."""
    c_in = (sigma * sigma + 1).rsqrt()
    return c_in, c_in * c_in, sigma * c_in


def noise_level(t, low, high, rho):
    """sigma(t), t in [0, 1] from low to high, and its derivative."""
    a, b = low ** (1 / rho), high ** (1 / rho)
    root = a + t * (b - a)
    return root ** rho, rho * root ** (rho - 1) * (b - a)


def karras(steps, low, high, rho=7.0):
    """The noise levels of a sampler, (steps + 1,), from high to low, sigma^(1/rho) linear, and 0 (EDM)."""
    return F.pad(noise_level(torch.arange(steps) / max(1, steps - 1), high, low, rho)[0], (0, 1))


# ---- samplers: generators of predictions, one a network call ----------------------------------------------
# denoise(x, sigma) -> (prediction, D): what the sampler yields (score.py: log p of the tokens), and the mean
# of x0. path(k, prediction, sigma) -> the levels after step k of `steps`: never above sigma, 0 after the
# last step. A token whose level stays the same does not move. With the true D, many steps and a path that
# does not depend on the prediction, all but renoise sample from the law of x0.

def ratio(lower, sigma):
    """lower / sigma, 1 where both are 0: (B, T, 1)."""
    return torch.where(sigma > 0, lower / sigma.clamp(min=1e-12), 1.0)[..., None]


def euler(denoise, x, sigma, path, steps):
    """The probability flow dx = (x - D) / sigma dsigma, straight to the next level (CDCD)."""
    for k in range(1, steps + 1):
        prediction, D = denoise(x, sigma)
        yield prediction
        lower = path(k, prediction, sigma)
        x, sigma = D + ratio(lower, sigma) * (x - D), lower


def heun(denoise, x, sigma, path, steps):
    """euler with the mean slope of both ends (EDM): two calls per step but the last."""
    for k in range(1, steps + 1):
        prediction, D = denoise(x, sigma)
        yield prediction
        lower = path(k, prediction, sigma)
        ahead = D + ratio(lower, sigma) * (x - D)
        if k < steps:
            prediction, D_ahead = denoise(ahead, lower)
            yield prediction
            here, there = (s.clamp(min=1e-12)[..., None] for s in (sigma, lower))
            ahead = x + (lower - sigma)[..., None] * ((x - D) / here + (ahead - D_ahead) / there) / 2
        x, sigma = ahead, lower


def dpmpp_2m(denoise, x, sigma, path, steps):
    """DPM-Solver++(2M) (arXiv 2211.01095): D extrapolated from the last two, in log sigma."""
    D_before, h_before = 0, torch.zeros_like(sigma)
    for k in range(1, steps + 1):
        prediction, D = denoise(x, sigma)
        yield prediction
        lower = path(k, prediction, sigma)
        h = -ratio(lower, sigma)[..., 0].log()
        # a token that has hardly moved before has no slope to go by
        share = torch.where((h_before > 0) & h.isfinite(), h / (2 * h_before), 0.0).clamp(max=1)[..., None]
        point = D + share * (D - D_before)
        x, sigma, D_before, h_before = point + ratio(lower, sigma) * (x - point), lower, D, h


def renoise(denoise, x, sigma, path, steps):
    """D with fresh noise of the next level."""
    for k in range(1, steps + 1):
        prediction, D = denoise(x, sigma)
        yield prediction
        lower = path(k, prediction, sigma)
        fresh = D + lower[..., None] * torch.randn_like(D)
        x, sigma = torch.where((lower < sigma)[..., None], fresh, x), lower


def dpmpp_2m_sde(denoise, x, sigma, path, steps, *,
                 eta: NonNegative = 0.0):  # share of the noise that is drawn anew; 0: dpmpp_2m
    """DPM++ 2M SDE (arXiv 2211.01095, k-diffusion's midpoint form). All tokens must have the same level."""
    D_before, h_before = None, 1.0
    for k in range(1, steps + 1):
        prediction, D = denoise(x, sigma)
        yield prediction
        lower = path(k, prediction, sigma)
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
