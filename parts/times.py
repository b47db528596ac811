"""
How a network is told the noise level t: as numbers made of t, of which every block makes changes to what it
reads and to what it adds (FiLM arXiv 1709.07871; adaLN with gates, DiT 2212.09748).
"""
import math

import torch
import torch.nn as nn

COSINES = 32            # features of t
WAVES, MADE = 256, 128  # DDiT: features of the noise level, and what a small network makes of them


class Cosines(nn.Module):
    """t (B, n) in [0, 1] -> cos(pi k t), k < COSINES: (B, n, COSINES) float32."""
    width = COSINES

    def forward(self, t):
        return torch.cos(math.pi * t.float()[..., None] * torch.arange(COSINES, device=t.device))


class Waves(nn.Module):
    """t (B, n), the probability of a mask -> (B, n, MADE), as in MDLM, SEDD and Duo (arXiv 2406.07524): a
    small network of cosines and sines of sigma = -log(1 - t), for which t is cut at 0.999, where their
    schedules end. of_t: of t itself, as in GIDD (2503.04482)."""
    width = MADE

    def __init__(self, of_t=False):
        super().__init__()
        self.of_t = of_t
        self.fc, self.proj = nn.Linear(WAVES, MADE), nn.Linear(MADE, MADE)
        self.act = nn.SiLU()

    def forward(self, t):
        level = t.float() if self.of_t else -torch.log1p(-t.float().clamp(max=0.999))
        k = torch.arange(WAVES // 2, device=t.device)
        angle = level[..., None] * torch.exp(-math.log(10000) * k / (WAVES // 2))
        waves = torch.cat([angle.cos(), angle.sin()], -1).type_as(self.fc.weight)
        return self.act(self.proj(self.act(self.fc(waves))))
