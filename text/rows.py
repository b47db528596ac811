"""
Batches of named tensors, made in one place for training and evaluation alike.

What a dataset is made of, its tokenizer knows (meta.json):
    windows   one long text, cut anywhere        x                windows.py
    lines     every line is a text of its own    x, segment       packing.py
    pairs     prompts and their answers          x, given         pairs.py
A model says which of these it takes; one that takes none (vae, latent) cuts a long text itself, by `cut`.
Rows of every kind have
    batch(B)   -> ({name: tensor (B, ...)}, how many tokens they hold): random, a function of torch's seed
    all(most)  -> {name: tensor (N, ...)}: all rows or, evenly spread, `most` of them
    report(B)  -> what there is to say before a training, '' if nothing
"""
import re
from pathlib import Path

import numpy as np
import torch

from configurator import fail
from text import files, packing, pairs, windows
from text.vocabulary import file_type

KINDS = dict(windows=windows, lines=packing, pairs=pairs)


def kind_of(tokenizer):
    """The name of the rows of a dataset, see above."""
    return 'pairs' if tokenizer.sep is not None else 'windows' if tokenizer.bos is None else 'lines'


def open_rows(tokens, tokenizer, model, knobs, folder=''):
    """The rows of a split, or the script ends. tokens: of `load_tokens`; knobs: the Config of the module of
    their kind; folder: where a model may keep what it makes of its training text, '' for evaluation."""
    kind = kind_of(tokenizer)
    if kind == 'windows' and not model.takes:
        return model.cut(tokens, tokenizer.end, folder)
    if kind not in model.takes:
        fail(f"{type(model).__module__} takes no {kind}: prepare the text with data/text/prepare.py")
    if getattr(knobs, 'random_length', 0) and model.takes == ('windows',):
        fail(f"{type(model).__module__} takes no rows with padding, as random_length makes them")
    return KINDS[kind].Rows(tokens, tokenizer, model.config.block_size, **vars(knobs))


# ---- the folder of a dataset ------------------------------------------------------------------------------

def load_meta(dataset):
    """meta.json of a dataset: its tokenizer and the origin of its text; or the script ends."""
    path = Path('data', dataset, 'meta.json')
    if not path.is_file():
        known = sorted(p.parent.name for p in Path('data').glob('*/prepare.py'))
        fail(f"{path} is missing: run `python data/{dataset}/prepare.py` first, if dataset={dataset!r} is "
             f"one of: {', '.join(known)}")
    return files.read_json(path)


def token_files(dataset, split):
    """Where the tokens of a split are: data/<dataset>/<split>.bin, or shards <split>_<number>.bin in the
    order of their names; or the script ends."""
    folder = Path('data', dataset)
    whole, shards = folder / f'{split}.bin', sorted(folder.glob(f'{split}_*.bin'))
    shards = [path for path in shards if re.fullmatch(rf'{split}_\d+\.bin', path.name)]
    if whole.is_file() and shards:
        fail(f"{folder} holds {whole.name} and shards such as {shards[0].name}: remove one of them")
    if not shards and not whole.is_file():
        there = ', '.join(sorted(path.name for path in folder.glob('*.bin'))) or 'none of its files'
        fail(f"{whole} is missing, {there} is there: `python data/{dataset}/prepare.py` makes what the "
             f"dataset has")
    return shards or [whole]


def count_tokens(dataset, split, vocab_size):
    """How many tokens a split has, by the sizes of its files."""
    item = np.dtype(file_type(vocab_size)).itemsize
    return sum(path.stat().st_size // item for path in token_files(dataset, split))


def load_tokens(dataset, split, vocab_size, device):
    """All tokens of a split as one stream on the device, int16 if ids are uint16, else int32;
    `vocabulary.as_ids` undoes the sign."""
    paths, dtype = token_files(dataset, split), np.dtype(file_type(vocab_size))
    lengths = [path.stat().st_size // dtype.itemsize for path in paths]
    tokens = np.empty(sum(lengths), dtype)  # filled shard by shard, so that memory holds them once
    for path, length, shard in zip(paths, lengths, np.split(tokens, np.cumsum(lengths)[:-1])):
        shard[:] = np.fromfile(path, dtype, length)
        most = shard.max(initial=0)
        if length == 0 or most >= vocab_size or path.stat().st_size % dtype.itemsize:
            fail(f"{path} is empty, cut short, or beyond the vocabulary of {vocab_size} (token {most}): run "
                 f"`python data/{dataset}/prepare.py` again")
    return torch.from_numpy(tokens.view(f'i{dtype.itemsize}')).to(device)
