"""
The body of MDLM, SEDD, BD3-LM, Duo and GIDD (arXiv 2406.07524, 2310.16834, 2503.09573): what a noise level
changes in it.

A small network makes a vector c of the noise level (parts/times.py), and every block six of c, A c + b: two
scales, two shifts and two gates (`adaLN_modulation`). What attention reads is LN(x) (1 + scale) + shift, what
it adds is multiplied by a gate; so for the MLP, and the last norm has a scale and a shift. In model.py it is
the same but for the order of the vectors, a gate that is 1 plus what is computed, and an LN with a bias.

A network that is never told the level (MDLM and BD3-LM feed sigma = 0) has a constant c, so the vectors are
constants and fold into the weights around them:
    LN weight w (1 + scale), bias shift;    rows of the matrix behind, and its bias, times the gate.
"""
import functools

import torch
import torch.nn.functional as F

from hub.tensors import read
from parts.times import MADE as WIDTH
from parts.times import WAVES, Waves

OURS_ALONE = ('norm.bias',)  # tensors that have no counterpart of their own
ORDER = (1, 0, 4, 3, 2, 5)   # where our scale, shift, scale, shift, gate, gate are in theirs
GATES = (2, 5)               # in theirs


def folded(take, shapes, C):
    """Those of our tensors that are not simply one of theirs: {name: function without arguments}.
    take: (their name, shape) -> Stored; shapes: {our name: shape}; C: the width."""
    layers = [name.removesuffix('norm1.weight') for name in shapes if name.endswith('norm1.weight')]
    if 'film.weight' not in shapes:
        return constant(take, layers, C)
    zero, made = lambda: torch.zeros(C), {}
    for at, order in [(at, ORDER) for at in layers] + [('', (1, 0))]:
        theirs = f"{at or 'output_layer.'}adaLN_modulation."
        for kind, width in (('weight', [WIDTH]), ('bias', [])):
            made[f'{at}film.{kind}'] = functools.partial(
                reordered, take(theirs + kind, (len(order) * C, *width)), order, kind)
        made |= {f'{at}{norm}.bias': zero for norm in (('norm1', 'norm2') if at else ('norm',))}
    return made


def reordered(stored, order, kind):
    """What makes the modulations of a block, (n C, ...), in our order and for our gates."""
    parts = read(stored).chunk(len(order))
    return torch.cat([parts[i] - int(kind == 'bias' and len(order) == 6 and i in GATES) for i in order])


def constant(take, layers, C):
    """The same where the noise level is never told: all vectors are constants, computed once."""
    time = {}
    for ours, theirs, width in (('fc', 'sigma_map.mlp.0', WAVES), ('proj', 'sigma_map.mlp.2', WIDTH)):
        time[f'{ours}.weight'] = take(f'{theirs}.weight', (WIDTH, width))
        time[f'{ours}.bias'] = take(f'{theirs}.bias', (WIDTH,))

    @functools.cache
    def level():
        net = Waves()
        net.load_state_dict({name: read(stored).float() for name, stored in time.items()})
        with torch.no_grad():
            return net(torch.zeros(1, 1))[0, 0]

    def vectors(at, n):
        """A function that gives the n vectors (C,) of a block."""
        A = take(f'{at}adaLN_modulation.weight', (n * C, WIDTH))
        b = take(f'{at}adaLN_modulation.bias', (n * C,))
        return functools.cache(lambda: F.linear(level(), read(A).float(), read(b).float()).chunk(n))

    def norm(ours, theirs, a, i):
        """LN with the i-th vector as shift and the next one as scale."""
        weight = take(f'{theirs}.weight', (C,))
        return {f'{ours}.weight': lambda: times(read(weight), 1 + a()[i + 1]),
                f'{ours}.bias': lambda: a()[i].clone()}

    def gated(ours, theirs, shape, a, i):
        """A matrix, or a bias, times the i-th vector."""
        stored = take(theirs, shape)
        return {ours: lambda: times(read(stored), a()[i])}
    made = norm('norm', 'output_layer.norm_final', vectors('output_layer.', 2), 0)
    for at in layers:
        a = vectors(at, 6)
        made |= norm(f'{at}norm1', f'{at}norm1', a, 0) | norm(f'{at}norm2', f'{at}norm2', a, 3)
        made |= gated(f'{at}attn.proj.weight', f'{at}attn_out.weight', (C, C), a, 2)
        made |= gated(f'{at}mlp.proj.weight', f'{at}mlp.2.weight', (C, 4 * C), a, 5)
        made |= gated(f'{at}mlp.proj.bias', f'{at}mlp.2.bias', (C,), a, 5)
    return made


def times(x, factor):
    """Each row of x (C, ...) times its factor (C,), in the type of x."""
    return (x.float() * factor.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def unfolded(weights):
    """A state dict of GPT of arch='ddit' -> one whose norms have no bias and that has all that a noise level
    changes, in their order; without a time input these are constants."""
    out, norm = dict(weights), weights['norm.weight']
    C = len(norm)
    layers = [name.removesuffix('norm1.weight') for name in weights if name.endswith('norm1.weight')]
    for at, order in [(at, ORDER) for at in layers] + [('', (1, 0))]:
        n = len(order)
        A = weights.get(f'{at}film.weight', norm.new_zeros(n * C, WIDTH)).chunk(n)
        b = weights.get(f'{at}film.bias', norm.new_zeros(n * C)).chunk(n)
        A, b = ([parts[order.index(i)] for i in range(n)] for parts in (A, b))
        for name, shift in (('norm1', 0), ('norm2', 3)) if at else (('norm', 0),):
            bias = out.pop(f'{at}{name}.bias')  # bias (1 + scale) joins the shift
            A[shift] = A[shift] + bias[:, None] * A[shift + 1]
            b[shift] = b[shift] + bias * (1 + b[shift + 1])
        b = [part + int(i in GATES) for i, part in enumerate(b)]
        out[f'{at}film.weight'], out[f'{at}film.bias'] = torch.cat(A), torch.cat(b)
    for name, shape in (('fc.weight', (WIDTH, WAVES)), ('fc.bias', (WIDTH,)),
                        ('proj.weight', (WIDTH, WIDTH)), ('proj.bias', (WIDTH,))):
        out.setdefault(f'time.{name}', norm.new_zeros(shape))
    return out
