"""
Noise schedules of masked diffusion: how fast tokens turn into [MASK].

A schedule is a rising function f of t with f(0) = 0, and its derivative; m(t) = f(t) / f(1) is the
probability of a mask and reaches 0 and 1 exactly. The bound does not depend on the schedule (masked.py);
training does: the schedule says how often it visits a noise level. With loss_weight=elbo that changes only
the variance of the loss, with flat also which levels count. Samplers never use it: their noise levels are
spaced by `grid` (unmask.py).
"""
import math

import torch


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
    """log m is nearly uniform, so the weight m'/m is nearly constant: MDLM's change of variables, and its
    importance sampling of t by the weight, in one."""
    rate = -math.log(least)
    return torch.expm1(rate * t), rate * torch.exp(rate * t)


SCHEDULES = {f.__name__: f for f in (linear, cosine, cosine_sqr, geometric, polynomial, log_uniform)}


def noise(name, t):
    """(m(t), m'(t)) of the named schedule: the probability of a mask and its derivative; alpha = 1 - m."""
    f, slope = SCHEDULES[name](t)
    end = SCHEDULES[name](torch.ones_like(t))[0]
    return f / end, slope / end
