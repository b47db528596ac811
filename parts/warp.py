"""
The time warp of CDCD (arXiv 2211.15089): how often to visit a noise level, learned from the loss there.

A piecewise linear function of t in [0, 1] is fitted to the loss, and t is drawn such that it rises evenly.
"""
import torch
import torch.nn.functional as F

BINS = 100
FLOOR = 0.1  # share of the law of t that is uniform, so that no noise level is forgotten


def warped_loss(slopes, t):
    """What is fitted to the loss: piecewise linear in t, rising. slopes (BINS,) are logarithms."""
    rise = slopes.exp()
    i = (t * BINS).long().clamp(0, BINS - 1)
    return F.pad(rise.cumsum(0), (1, 0))[i] + (t * BINS - i) * rise[i]


def warp_cdf(slopes):
    """The law of t under which it rises evenly, with a little of the uniform law: its CDF at the ends of the
    bins, (BINS + 1,)."""
    law = (1 - FLOOR) * slopes.softmax(0) + FLOOR / BINS
    cdf = F.pad(law.cumsum(0), (1, 0))
    return cdf / cdf[-1]


def quantile(cdf, u):
    """t with CDF u, and the density of the law there. u of any shape, in [0, 1]."""
    i = (torch.searchsorted(cdf, u.contiguous(), right=True) - 1).clamp(0, BINS - 1)
    law = cdf[i + 1] - cdf[i]
    return (i + (u - cdf[i]) / law) / BINS, law * BINS
