"""
A clock in a model, for what changes while it is trained.
"""
import torch
import torch.nn as nn


class Clock(nn.Module):
    """How many optimizer steps have been made, for what changes while a model is trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer('steps', torch.zeros((), device='cpu'), persistent=False)


def set_clocks(net, steps):
    for module in net.modules():
        if isinstance(module, Clock):
            module.steps.fill_(steps)
