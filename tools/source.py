"""
What eval.py and the tools are given: a checkpoint, and a text in its tokens.
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch

import common
from configurator import Filename, Natural, fail, knobs_of
from text import files, windows
from text.rows import KINDS, kind_of, load_meta, load_tokens, open_rows
from text.vocabulary import Tokenizer, as_ids


@dataclass
class Checkpoint:
    # checkpoint
    out_dir: Filename = ''    # a folder of ours, or a model of others (hub/); '': the newest out*/
    which: Literal['best', 'last'] = 'best'    # best | last
    weights: Literal['ema', 'model'] = 'ema'   # ema, the average over steps | model, the last
    device: str = 'auto'      # auto | cpu | cuda | mps
    dtype: Literal['', 'float32', 'bfloat16', 'auto'] = ''  # float32 | bfloat16 | auto; '': as stored
    seed: Natural = 1337      # equal seeds, equal figures


@dataclass
class Config(Checkpoint):
    # text
    input: Filename = ''      # a UTF-8 text; '': the dataset's split
    dataset: str = ''         # another dataset than the model's own
    split: Literal['val', 'test', 'train'] = 'val'  # of the dataset: val | test | train


def load_text(config, checkpoint, tokenizer, device):
    """(tokens of the text that the config names, the tokenizer that says what kind of rows they make), or
    the script ends. By default the text is a split of the dataset that the model was trained on."""
    if config.input:
        text = files.read_text(config.input, 'input')
    else:
        dataset = config.dataset or checkpoint['run']['dataset']
        if not dataset:
            fail("this model comes without a dataset: name one with --dataset=, or a text with --input=")
        meta = load_meta(dataset)
        if not config.dataset and meta != checkpoint['tokenizer']:
            fail(f"data/{dataset} has been prepared anew from another text: score a text with --input=FILE")
        other = Tokenizer(meta)
        tokens = load_tokens(dataset, config.split, other.vocab_size, device)
        if other.pieces == tokenizer.pieces:
            return tokens, other
        if other.sep is not None:
            fail(f"data/{dataset} holds prompts and answers in other tokens than this model's: prepare it "
                 f"with its tokenizer")
        text = other.text(as_ids(tokens).tolist())
    plain = copy.copy(tokenizer)
    plain.sep = None  # a text of another origin has no prompts and answers
    ids = tokenizer.stream(text) or fail(f"{config.input or dataset} holds no text")
    return torch.tensor(ids, device=device), plain


def rows_of(tokens, tokenizer, model, checkpoint, most):
    """The rows of a text, all or `most` evenly spread, made as for training: {name: tensor (N, ...)}."""
    Config, rows = KINDS[kind_of(tokenizer)].Config, checkpoint.get('rows', {})
    knobs = Config(**{name: rows[name] for name in knobs_of(Config) if name in rows})
    first = Tokenizer(checkpoint['tokenizer']).first
    if first is not None and kind_of(tokenizer) == 'windows':
        batch = framed(tokens, model, first, most)
    else:
        batch = open_rows(tokens, tokenizer, model, knobs).all(most)
    if not len(batch['x']):
        fail(f"the text has {len(tokens)} tokens, fewer than block_size={model.config.block_size}")
    return batch


def framed(tokens, model, first, most):
    """Windows as a model saw them that was trained on rows between two <|endoftext|>, which are given here.
    A model that takes no prompts is given the first one only, by its config."""
    ends = 1 + ('pairs' in model.takes)
    if not ends < model.config.block_size <= len(tokens) + ends:
        fail(f"block_size={model.config.block_size} with {ends} <|endoftext|> in it does not fit a text of "
             f"{len(tokens)} tokens")
    x = windows.Rows(tokens, None, model.config.block_size - ends).all(most)['x']
    x = torch.nn.functional.pad(x, (1, ends - 1), value=first)
    if ends == 1:
        return dict(x=x)
    place = torch.arange(x.size(1), device=x.device)
    return dict(x=x, given=((place == 0) | (place == x.size(1) - 1)).expand_as(x))


def shortened(checkpoint, T):
    """The checkpoint with a context of T tokens, or the script ends."""
    config = checkpoint['config']
    if not common.concept(checkpoint['objective']).Model.takes or T > config['block_size']:
        fail(f"block_size={T}: the model's is {config['block_size']}; it can be shorter, but not for vae and "
             f"latent")
    for state in (checkpoint['ema'], checkpoint['model']):
        if 'gpt.pos.weight' in state:
            state['gpt.pos.weight'] = state['gpt.pos.weight'][:T + config.get('shift', False)]
    return checkpoint | dict(config=config | dict(block_size=T))
