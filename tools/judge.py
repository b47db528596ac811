"""
Texts of a model under a judge: an autoregressive model says how likely they are ("generative perplexity").

A text ends at its first <|endoftext|>, if the model's tokens have one. It is decoded, written in the judge's
tokens (with the judge's <|endoftext|> behind it, if it ended) and scored in windows of the judge's block
size, each on its own. No text is left out.

Sure but dull texts have a low perplexity. So beside it stand, in the judge's tokens, the unigram entropy of a
text (nats, mean over texts), distinct n-grams and repetition, and the share of words that are in the training
text. The first row is the validation text's.
"""
import functools
import itertools
import math
import re
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

import common
from configurator import Count, Filename, Natural, NonNegative, ShareAbove0, arguments, fail
from hub import find
from parts.graphs import quick
from text import packing, windows
from text.vocabulary import as_ids
from tools.source import load_text


@dataclass
class Config:
    # texts under a judge
    judge: Filename = ''            # an autoregressive checkpoint, as for out_dir: out-ar, gpt2-large
    num_samples: Count = 64         # texts
    batch: Count = 64               # texts written at once
    compile: bool = False           # torch.compile the network: pays for hundreds of calls
    length: Natural = 0             # tokens of a text; 0: the model's block size
    overlap: Natural = 0            # beyond the block: tokens kept as context; 0: half a block
    temperature: NonNegative = 1.0  # 1: the model's own law
    top_k: Natural = 0              # draw from the k likeliest tokens; 0: all
    top_p: ShareAbove0 = 1.0        # draw from the fewest tokens with this probability together


# ---- how texts are written --------------------------------------------------------------------------------

SHARED = ('steps', 'rule', 'temperature', 'top_k', 'top_p')  # arguments of samplers that are knobs of scripts


def said(config, chosen):
    """What a person said about sampling: of `chosen`, all that is for a sampler."""
    return {name: value for name, value in chosen.items() if name in SHARED or name not in vars(config)}


def how_to_write(sampler, config, said):
    """Arguments of a sampler, Model.sample. Raises ValueError for something said that it does not take."""
    return arguments(sampler, said, {name: v for name, v in vars(config).items() if name in SHARED})


def written(model, tokenizer, config, device, how):
    """num_samples texts of the model: ([(text, did it end?)], network calls of a batch, tokens/s). how:
    arguments of its sampler. Raises ValueError."""
    T, texts, began = model.config.block_size, [], time.time()
    if config.overlap >= T:
        raise ValueError(f"overlap={config.overlap} must be smaller than block_size={T}")
    L, overlap = config.length or T, config.overlap or T // 2
    batches = torch.full((config.num_samples, L), model.mask_id, device=device).split(config.batch)
    with quick(model, config.compile) as calls:
        for canvas in batches:
            if tokenizer.first is not None:
                canvas[:, 0] = tokenizer.first
            for canvas in common.generate(model, canvas, L if model.any_length else T, overlap, **how):
                pass
            texts += [until_end(row, tokenizer) for row in canvas.tolist()]
    return texts, len(calls) / len(batches), len(texts) * L / (time.time() - began)


def until_end(ids, tokenizer):
    """(text before the first <|endoftext|>, but for one at the very beginning, whether there is one)."""
    ids = ids[1:] if ids[0] == tokenizer.first == tokenizer.end else ids
    ended = tokenizer.end in ids
    return tokenizer.text(ids[:ids.index(tokenizer.end)] if ended else ids), ended


# ---- counts: texts are lists of ids -----------------------------------------------------------------------

def unigram_entropy(text):
    """Entropy in nats of the tokens of one text."""
    p = np.unique(text, return_counts=True)[1] / len(text)
    return float(-(p * np.log(p)).sum())


def ngrams(text, n):
    return list(zip(*(text[i:] for i in range(n))))


def distinct(texts, n):
    """Different n-grams / n-grams, over all texts."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(texts, n=4):
    """Share of a text's n-grams that occurred in it before, over all texts."""
    grams = [ngrams(text, n) for text in texts]
    return 1 - sum(len(set(g)) for g in grams) / sum(map(len, grams)) if any(grams) else 0.0


WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
KNOWN = 10 ** 7  # tokens of a training text whose words are known


def real_words(texts, known):
    """Share of the words of texts, a list of strings, that are in the set `known`; nan if it is empty. The
    first and the last word of a text may be cut, and do not count."""
    words = [word for text in texts for word in WORD.findall(text)[1:-1]]
    return sum(word in known for word in words) / len(words) if known and words else math.nan


# ---- the judge --------------------------------------------------------------------------------------------

def load_judge(path, device):
    """A model with an exact likelihood, ours or of others, in float32, as texts are measured by it:
    (model, tokenizer), or the script ends."""
    _, checkpoint = find.find(path)
    net, tokenizer = common.load_model(checkpoint, device, dtype='float32')
    if net.bound != 'exact':
        fail(f"judge={path} is of {checkpoint['objective']}, whose likelihood is not exact: take an "
             f"autoregressive one")
    return net, tokenizer


@torch.no_grad()
def judged(judge, texts, device, known=frozenset()):
    """What the judge (model, tokenizer) and the counts say of texts, a list of (str, ended): a dict of
    floats. known: words, see `real_words`."""
    net, tokenizer = judge
    mark = [] if tokenizer.end is None else [tokenizer.end]
    ids = [tokenizer.encode(text) + mark * ended for text, ended in texts]
    ids = [row for row in ids if row]  # an empty text has nothing to score
    if not ids:
        fail("all texts are empty")
    T, bos = net.config.block_size, [] if tokenizer.bos is None else [tokenizer.bos]
    whole = [bos + row for row in ids]  # <bos> costs a judge of lines nothing, and is no token of the text
    rows = common.rows_at_once(min(T, max(map(len, whole))), tokenizer.vocab_size)
    pieces = sorted((row[i:i + T] for row in whole for i in range(0, len(row), T)), key=len)
    nats = 0.0
    for _, same in itertools.groupby(pieces, key=len):
        for part in torch.tensor(list(same)).to(device).split(rows):
            nats += net.nats(x=part).cpu().double().sum().item()
    n = sum(map(len, ids))
    return dict(nats_per_token=nats / n, perplexity=math.exp(nats / n),
                unigram_entropy=sum(map(unigram_entropy, ids)) / len(ids),
                **{f'distinct_{k}': distinct(ids, k) for k in (1, 2, 3)}, repetition=repetition(ids),
                real_words=real_words([text for text, _ in texts], known))


# ---- the table --------------------------------------------------------------------------------------------

HEAD = ("| texts | knob | network calls | tokens/s | judge, nats/token | perplexity | unigram entropy | "
        "distinct-1 | distinct-2 | distinct-3 | repetition | real words |\n" + "|---" * 12 + "|")


def row(name, figures, knob='', calls=0, speed=0):
    """Print a row of that table. figures: of `judged`, in the order of the columns."""
    cells = [name, knob, f"{calls:.1f}" if calls else "", f"{speed:,.0f}" if speed else ""]
    cells += ["" if math.isnan(figure) else f"{figure:.3f}" for figure in figures.values()]
    print("| " + " | ".join(cells) + " |", flush=True)


def open_table(config, checkpoint, model, tokenizer, device):
    """A function: texts -> what the judge says of them, see `judged`. Prints the head of its table and a row:
    of as many segments of the validation text as there are to be texts, or of as many of its lines."""
    judge, L = load_judge(config.judge, device), config.length or model.config.block_size
    tokens, reader = load_text(config, checkpoint, tokenizer, device)
    if reader.bos is None:
        rows = windows.Rows(tokens, reader, min(L, len(tokens)))
    else:
        rows = packing.Rows(tokens, reader, L, packed=False)
    batch = rows.all(config.num_samples)
    texts = [x[kept].tolist() for x, kept in zip(batch['x'], packing.counted(**batch))]
    known = frozenset()
    if not config.input:
        learned, _ = load_text(replace(config, split='train'), checkpoint, tokenizer, device)
        known = frozenset(WORD.findall(tokenizer.text(as_ids(learned[:KNOWN]).tolist())))
    scorer = functools.partial(judged, judge, device=device, known=known)
    print(HEAD, flush=True)
    row('validation text', scorer([until_end(text, tokenizer) for text in texts]))
    return scorer
