"""
Convolutions over neighbouring tokens, before attention and before the MLP of every block of arch='ours'
(Primer arXiv 2109.08668; Canon layers, Allen-Zhu 2025). Attention finds neighbours too, but has to learn it.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

TAPS = 5  # neighbours that a token reads, itself among them


def beside(h, first, t):
    """What stands beside each of the last t tokens of h (B, T, C), `first` to first + TAPS - 1 places to the
    right: TAPS tensors (B, t, C), 0 beyond the ends."""
    there = F.pad(h[:, -(t + TAPS - 1):], (0, 0, -first, first + TAPS - 1))[:, -(t + TAPS - 1):]
    return [there[:, i:i + t] for i in range(TAPS)]


def seen_beside(mask, t):
    """`beside` for t tokens whose attention has a mask, broadcast to (B, 1, t, T): 0, too, where a token does
    not see its neighbour."""
    mask = mask.expand(*mask.shape[:-2], t, -1)
    mask = mask[:, 0] if mask.dim() == 4 else mask
    own = mask.size(-1) - t  # the key of the first query

    def seen(j):
        keys, before = mask.diagonal(own + j, -2, -1), min(t, max(0, -own - j))  # before all keys
        return F.pad(keys, (before, t - before - keys.size(-1)))[..., None]

    def near(h, first, t):
        return [x * seen(first + i) for i, x in enumerate(beside(h, first, t))]
    return near


class Neighbours(nn.Module):
    """h + sum over j of taps_j * (h, j places to the right): a depthwise convolution, zero at first. j is -4
    to 0 in a causal network, else -2 to 2 (Primer arXiv 2109.08668; Canon layers, Allen-Zhu 2025)."""

    def __init__(self, config, causal):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(TAPS, config.n_embd))
        self.first = 1 - TAPS if causal else -(TAPS // 2)

    def forward(self, h, near, cache):
        there = h if cache is None else cache.append(self, h)[0]
        return h + sum(tap * x for tap, x in zip(self.taps.type_as(h), near(there, self.first, h.size(1))))
