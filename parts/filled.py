"""
A model that is made without memory for its weights, and then given them one by one: nothing is there twice.
"""
import sys

import torch
import torch.nn as nn
from tqdm import tqdm


def filled(make, weights, device, dtype=None):
    """make() -> a model, with these weights {name: tensor} on the device. dtype: of all that are no integers;
    None: their own. Raises RuntimeError where names or shapes differ."""
    with torch.device('meta'):
        model = make()
    places, made = model.state_dict(keep_vars=True), {}
    if odd := places.keys() ^ weights.keys():
        raise RuntimeError(f"{min(odd)} is {'missing' if min(odd) in places else 'not known'}")
    size = sum(p.numel() for p in {id(p): p for p in places.values()}.values())
    with tqdm(total=size, unit=' weights', unit_scale=True, delay=2, leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for name, old in places.items():
            path, _, last = name.rpartition('.')
            if id(old) not in made:  # else the model has it twice, once is there
                new = weights[name]
                if new.shape != old.shape:
                    raise RuntimeError(f"{name} is of shape {tuple(new.shape)} instead of {tuple(old.shape)}")
                new = new.to(device, dtype if new.is_floating_point() else None)
                made[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
                bar.update(new.numel())
            setattr(model.get_submodule(path), last, made[id(old)])
    return model.to(device).eval()
