"""
SEDD (arXiv 2310.16834): masked.py's forward process, learned as the ratios of probabilities.

For a masked position the score s_y = p(x with y there) / p(x with [MASK] there) is what the reverse process
needs. Of absorbing noise it is the posterior times a known factor,

    s_y = (1 - m) / m * p(y | xt),

so the network's output l, with s_y = e^(l_y) (1 - m) / m, is log p(y | xt) that nothing normalises. The score
entropy, divided by (1 - m) / m and without what no network can change, is for the true token v

    Z - 1 - l_v,    Z = sum over y of e^(l_y).

If Z = 1 that is the cross-entropy of masked.py; for any other Z it is worse by Z - 1 - log Z >= 0: what SEDD
pays for learning to normalise. Its weights, its bound and its samplers are masked.py's; `analytic` in
unmask.py is its own step, from scores that nothing normalises. As in the published code, the network has a
time input; by the formula above it could do without.
"""
import math
from dataclasses import dataclass

import torch

import masked
from unmask import RULES  # noqa: F401


@dataclass
class Config(masked.Config):
    time_input: bool = True  # tell the network the noise level, as published

    def __post_init__(self):
        super().__post_init__()
        if not self.time_input:
            raise ValueError("sedd keeps the time input of the published network: time_input=True")


def log_scores(out):
    """Network output (..., V) -> l, at least float32: less log V, so that a network of zeros has Z = 1."""
    return out.to(torch.promote_types(out.dtype, torch.float32)) - math.log(out.size(-1))


def score_entropy(out, x):
    """Z - 1 - l_v, in nats, (B, T). out (B, T, V): of the network; x (B, T): the true tokens."""
    log_s = log_scores(out)
    return log_s.exp().sum(-1) - 1 - log_s.gather(-1, x[..., None])[..., 0]


class Model(masked.Model):
    def token_loss(self, out, x):
        return score_entropy(out, x)

    def scores(self, xt, t=None):
        """l, log p(x0 | xt) that is not normalised, (B, T, V): what rule=analytic asks."""
        return log_scores(self.logits(xt, t))
