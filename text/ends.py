"""
Where a text ends that is being written: after a string, at the model's own end, where it repeats itself.
"""
import itertools

import torch

from text.prompts import ids_of

NAMES = ('<|endoftext|>', '</s>', '<eos>')  # of a model's own end


def of(tokenizer, stop='', infilling=False, marks=()):
    """Functions (ids, how many of them are given) -> the length at which the text ends, 0: not yet. It ends
    after the string `stop`, however that was cut into tokens, after one of the ids `marks`, and, unless text
    is given behind, after the end of a line or an answer, where the dataset is made of these."""
    def at_mark(ids, start):
        return next((n for n, i in enumerate(ids[start:], start + 1) if i in marks), 0)

    def at_end(ids, start):
        return ids.index(tokenizer.end, start) + 1 if tokenizer.end in ids[start:] else 0
    stops, marked = [at_mark] if marks else [], (tokenizer.bos, tokenizer.sep) != (None, None)
    if stop in NAMES and tokenizer.end is not None:
        stops.append(at_end)
    elif stop:
        ids_of(tokenizer, stop)  # a character that cannot be written ends the script
    if stop:
        stops.append(lambda ids, start: after(tokenizer, ids, start, stop.encode(errors='replace')))
    if marked and not infilling:
        stops.append(at_end)
    return stops


def after(tokenizer, ids, start, text):
    """How many ids it takes until those from `start` on hold the bytes `text`, 0: they do not."""
    pieces = [tokenizer.pieces[i] for i in ids[start:]]
    if start == 0 and pieces:  # a space that is not shown
        pieces[0] = pieces[0].removeprefix(tokenizer.lead.encode())
    at = b''.join(pieces).find(text)
    if at < 0:
        return 0
    lengths = itertools.accumulate(map(len, pieces))
    return next(n for n, length in enumerate(lengths, start + 1) if length >= at + len(text))


def ending(row, start, mask_id, stops, min_entropy, last=256):
    """Where a text ends that has met a stopping rule, else 0. row: ids, the first `start` given.

    At the first of the `stops` (see `of`); or here, if the last 256 ids have a unigram entropy below
    min_entropy nats (as what repeats itself has, BD3-LM arXiv 2503.09573). Only the part before the first
    mask is looked at.
    """
    written = row[:row.index(mask_id)] if mask_id in row else row
    found = [n for n in (stop(written, start) for stop in stops) if n]
    if found:
        return min(found)
    if min_entropy and len(written) >= max(start + 1, last):
        p = torch.bincount(torch.tensor(written[-last:])) / last
        return len(written) if -torch.special.xlogy(p, p).sum() < min_entropy else 0
    return 0


def up_to(text, stop, before):
    """Cut off what the last token of a text adds after the first --stop that ends in it; before: the text
    without that token."""
    at = text.find(stop, max(0, len(before) - len(stop) + 1)) if stop else -1
    return text[:at + len(stop)] if at >= 0 else text
