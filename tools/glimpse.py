"""
A few lines of text by a model while it is trained, and two texts side by side.
"""
import itertools
import textwrap

import torch

import common
from configurator import arguments

LONGEST = 256  # tokens
STEPS = 64     # of the sampler


def canvas_of(model, batch, tokenizer):
    """One row (1, T) to write on, V where text is to be written. batch: validation rows by name; where they
    have a prompt (`given`), that of the first one is kept."""
    V, first = tokenizer.vocab_size, batch['x'][:1]
    if 'given' in batch:
        return first.masked_fill(~batch['given'][:1], V)
    length = LONGEST if model.any_length else min(LONGEST, model.config.block_size)
    canvas = torch.full((1, length), V, device=first.device)
    if tokenizer.bos is not None:
        canvas[0, 0] = tokenizer.bos
    return canvas


@torch.no_grad()
def glimpse(model, batch, tokenizer):
    """A text of the model, sampled as sample.py does it. Arguments as of `canvas_of`."""
    V, canvas = tokenizer.vocab_size, canvas_of(model, batch, tokenizer)
    how = arguments(model.sample, model.reading, dict(steps=STEPS))
    for canvas in common.generate(model, canvas, canvas.size(1), 0, **how):
        pass
    row = canvas[0].tolist()
    if tokenizer.end in row:
        row = row[:row.index(tokenizer.end)]
    return tokenizer.text([i for i in row if i != V])


def indented(text, lines=6):
    """The first lines of a text that are not empty, behind a bar."""
    return '\n'.join(f'  | {line}' for line in [line for line in text.splitlines() if line.strip()][:lines])


def side_by_side(left, right, width=38):
    """Two texts in two columns, long lines wrapped."""
    def wrapped(text):
        return [part for line in text.strip().splitlines() for part in textwrap.wrap(line, width) or ['']]
    pairs = itertools.zip_longest(wrapped(left), wrapped(right), fillvalue='')
    return '\n'.join(f'{a:<{width}}   {b}'.rstrip() for a, b in pairs)
