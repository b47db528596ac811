"""
Low-rank adapters: a frozen network with small changes of its own (LoRA, arXiv 2106.09685).

    W' = W + alpha / rank * B A,    A (rank, in) random, B (out, rank) zero: at first nothing has changed.

`adapt(net)` returns a second network: the same frozen tensors, not copies of them, each target matrix with
an A and a B of its own. So one base carries as many adapters as one likes, each under the name of its
network, and switching is calling another one: there is no state to set, to forget, or to be wrong when
gradients are computed.
"""
import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from configurator import Natural, NonNegative, ShareBelow1


@dataclass
class Config(model.Config):
    # adapters on a frozen network
    lora_rank: Natural = 0             # of the adapters; 0: none, all weights are trained
    lora_alpha: NonNegative = 32.0     # adapters are scaled by lora_alpha / lora_rank
    lora_dropout: ShareBelow1 = 0.0    # dropout on what enters the adapters
    lora_targets: str = 'qkv,proj,fc'  # the matrices that have an adapter
    lora_embed: bool = True            # train the embedding too; a tied head goes with it

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank and self.dropout:
            raise ValueError(f"dropout={self.dropout}: a frozen network has none, adapters have "
                             f"lora_dropout")


class LoRA(nn.Module):
    """A linear layer and its low-rank change; dropout is on what enters the change."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__()
        self.linear, self.scale, self.drop = linear, alpha / rank, nn.Dropout(dropout)
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features, **like) * linear.in_features ** -0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(self.drop(x), self.A), self.B)


def adapt(net, rank, alpha, dropout=0.0, targets=('qkv', 'proj', 'fc')):
    """A network with the modules of `net`, which is frozen, over the same tensors; the linear layers whose
    last name is a target are adapted. Raises ValueError if there is none."""
    net.requires_grad_(False)
    shared = {id(t): t for t in itertools.chain(net.parameters(), net.buffers())}
    net = copy.deepcopy(net, shared)
    found = [(module, name, child) for module in net.modules() for name, child in module.named_children()
             if name in targets and isinstance(child, nn.Linear)]
    if not found:
        names = {path.split('.')[-1] for path, m in net.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(f"lora_targets={','.join(targets)} match no linear layer; "
                         f"there are {', '.join(sorted(names))}")
    for module, name, linear in found:
        setattr(module, name, LoRA(linear, rank, alpha, dropout))
    return net


def by_config(net, c):
    """The network, adapted as its Config says: with lora_rank, the matrices of its blocks; the embedding, and
    with it a head that is tied to it, is trained whole if lora_embed. Raises ValueError."""
    if c.lora_rank:
        net = adapt(net, c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_targets.split(','))
        net.embed.requires_grad_(c.lora_embed)
    return net


def layers(net):
    return [module for module in net.modules() if isinstance(module, LoRA)]


@torch.no_grad()
def load_base(net, weights):
    """Copy the weights of a network that is not adapted into one that may be. Raises ValueError by name."""
    for name, p in net.state_dict().items():
        name = name.replace('.linear.', '.')
        if not name.endswith(('.A', '.B')):
            found = weights[name] if name in weights else None
            if found is None or found.shape != p.shape:
                there = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ValueError(f"{name} is {there} in the base, it must be of shape {tuple(p.shape)}")
            p.copy_(found)


def folded(weights, config):
    """The state dict of the merged network, from that of an adapted one (or of one that is not). config: a
    dict with lora_alpha."""
    if not any(name.endswith('.A') for name in weights):
        return weights
    out = {}
    for name, p in weights.items():
        at, _, last = name.rpartition('.')
        if at.endswith('.linear'):
            at = at.removesuffix('.linear')
            if last == 'weight':
                A, B = weights[f'{at}.A'], weights[f'{at}.B']
                p = p + config['lora_alpha'] / len(A) * B @ A
            name = f'{at}.{last}'
        if last not in ('A', 'B'):
            out[name] = p
    return out
