"""
Tensors in *.safetensors, read one at a time and in their own type, so that a model of 16 GB takes 16 GB.

Names, shapes and types stand in the head of a file: everything that can be wrong with them is said before
the first number is read. A large tensor comes in pieces, each through a view of the file of its own: what a
view has shown counts as memory of this process until it is closed.
"""
import math
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import fail
from text import files
from text.vocabulary import library

# safetensors' names for the types of weights that are numbers
PLAIN = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
PIECE = 2 ** 24  # bytes of a tensor that are read at once


class Stored(NamedTuple):
    """A tensor in a file."""
    path: Path
    name: str
    shape: tuple
    type: str   # as safetensors calls it


def shards(folder):
    """The names of the files that hold the tensors: model.safetensors, or else what the index says. (As in
    transformers; an index beside model.safetensors is an older one's.)"""
    index = folder / 'model.safetensors.index.json'
    if not index.is_file():
        return ['model.safetensors']
    names = files.read_json(index).get('weight_map')
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name or not name.endswith('.safetensors') for name in names):
        fail(f"{index} names no files, or others than *.safetensors beside it")
    return ['model.safetensors'] if (folder / 'model.safetensors').is_file() else names


def stored_in(folder, ignored=()):
    """{name: Stored} of the tensors in a folder, but for those whose names end in one of `ignored`; or the
    script ends."""
    found, safetensors = {}, library('safetensors', 'weights in *.safetensors')
    for path in (folder / name for name in shards(folder)):
        if not path.is_file():
            fail(f"{path} is missing; weights in a pickle (pytorch_model.bin) are not read")
        try:
            with safetensors.safe_open(path, 'pt') as file:
                heads = {name: file.get_slice(name) for name in file.keys()}
                heads = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in heads.items()}
        except Exception as e:  # SafetensorError is no class of Python's own
            fail(f"{path} is cut short or damaged ({e}): remove it and get it again")
        for name, (shape, kind) in heads.items():
            if name.endswith(tuple(ignored)):
                continue
            if kind not in PLAIN:
                fail(f"the tensor {name} in {path} is of type {kind}: quantised weights are not read here, "
                     f"take the model as it was before")
            if name in found:
                fail(f"the tensor {name} is in {path} and in another file of the same model")
            found[name] = Stored(path, name, shape, kind)
    return found


def into(out, stored):
    """Copy a stored tensor, or its first rows, into another one, which may be a view."""
    open_ = library('safetensors', 'weights in *.safetensors').safe_open
    if not stored.shape:
        with open_(stored.path, 'pt') as file:
            return out.copy_(file.get_tensor(stored.name))
    row = math.prod(stored.shape[1:]) * PLAIN[stored.type].itemsize
    rows = max(1, PIECE // max(1, row))
    for a in range(0, len(out), rows):
        with open_(stored.path, 'pt') as file:
            out[a:a + rows] = file.get_slice(stored.name)[a:min(a + rows, len(out))]


def read(*stored, transposed=False, height=None):
    """Stored tensors, one below the other, as one new tensor, each turned first if transposed. height: its
    rows, of which others than theirs are not set; None: theirs."""
    shapes = [s.shape[::-1] if transposed else s.shape for s in stored]
    types = {PLAIN[s.type] for s in stored}
    height = sum(shape[0] for shape in shapes) if height is None else height
    out = torch.empty(height, *shapes[0][1:], dtype=types.pop() if len(types) == 1 else torch.float32)
    at = 0
    for s, shape in zip(stored, shapes):
        part = out[at:at + shape[0]]
        into(part.T if transposed else part, s)
        at += shape[0]
    return out


class Weights(MutableMapping):
    """A state dict whose tensors are made when they are asked for: {name: function without arguments}.
    dtype: the type of most of them, in which a model has all."""

    def __init__(self, made, dtype=None):
        self.made, self.dtype = dict(made), dtype

    def __getitem__(self, name):
        return self.made[name]()

    def __setitem__(self, name, tensor):
        self.made[name] = lambda: tensor

    def __delitem__(self, name):
        del self.made[name]

    def __contains__(self, name):
        return name in self.made

    def __iter__(self):
        return iter(self.made)

    def __len__(self):
        return len(self.made)
