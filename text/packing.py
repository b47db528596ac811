"""
Lines as examples: several texts in one row, none of which sees another.

A dataset of lines is a stream [bos] ... [eos] [bos] ... [eos] (data/lines/prepare.py). One line a row wastes
the slots behind short lines. Packing puts several into a row: first-fit decreasing takes the longest line
first and puts each into the first row with room, which needs at most 11/9 of the least possible number of
rows, and one more (Yue 1991).

What keeps the texts of a row apart is the segment id: 0, 1, 2 ... for the texts of a row, -1 for padding.
    attention   a token sees the tokens of its own segment, nothing else
    positions   start from 0 in every segment
    loss        padding is outside
so a packed text gets the same logits as alone. Pads that `expand` adds are different: they belong to the
text, the model reads and writes them, so it can write texts shorter than the canvas.
"""
from dataclasses import dataclass

import numpy as np
import torch

from configurator import fail
from text.vocabulary import BOS, EOS, PAD, as_ids


@dataclass
class Config:
    packed: bool = True     # several lines to a row; False: one, padded
    expanded: bool = False  # a random number of pads behind each line, as part of its text


# ---- who is where: functions of the segment ids (B, T) int64 ----------------------------------------------

def same_text(segment):
    """Who may see whom: (B, 1, T, T) bool. (Padding sees padding: a softmax over nothing is NaN.)"""
    return segment[:, None, :, None] == segment[:, None, None, :]


def starts(segment):
    """True at the first token of every segment, (B, T) bool."""
    before = torch.nn.functional.pad(segment[:, :-1], (1, 0), value=-2)
    return segment != before


def positions(segment):
    """The place of every token in its segment, from 0, (B, T) int64."""
    place = torch.arange(segment.size(1), device=segment.device).expand_as(segment)
    return place - torch.where(starts(segment), place, 0).cummax(-1).values


def keep_apart(segment):
    """What keeps the texts of packed rows apart in GPT.trunk: {mask, where}. None: a row is one text, {}."""
    return {} if segment is None else dict(mask=same_text(segment), where=positions(segment))


def counted(x, segment=None, given=None):
    """The tokens of x that a loss is about, (B, T) bool: no padding, and none that are given (B, T) bool, as
    a prompt is."""
    kept = torch.ones_like(x, dtype=torch.bool) if segment is None else segment >= 0
    return kept if given is None else kept & ~given


# ---- packing ----------------------------------------------------------------------------------------------

def first_fit_decreasing(lengths, capacity):
    """Bins of at most `capacity`, each a list of indices into `lengths`; nothing is left over.
    Raises ValueError if a length is larger than the capacity."""
    order = np.argsort(-np.asarray(lengths), kind='stable')
    bins, room = [], np.full(len(lengths), capacity)
    for i in order.tolist():
        if lengths[i] > capacity:
            raise ValueError(f"a text of {lengths[i]} tokens does not fit into {capacity}")
        first = int(np.argmax(room[:len(bins) + 1] >= lengths[i]))  # an empty bin has room
        if first == len(bins):
            bins.append([])
        bins[first].append(i)
        room[first] -= lengths[i]
    return bins


def fill(texts, bins, T, pad):
    """Texts (lists of ids) in their bins -> x, segment, both (len(bins), T) int64."""
    x, segment = np.full((len(bins), T), pad), np.full((len(bins), T), -1)
    for row, members in enumerate(bins):
        end = 0
        for number, i in enumerate(members):
            begin, end = end, end + len(texts[i])
            x[row, begin:end], segment[row, begin:end] = texts[i], number
    return torch.from_numpy(x), torch.from_numpy(segment)


class Rows:
    """The lines of a stream of tokens (ids, or of rows.load_tokens); see rows.py."""

    def __init__(self, tokens, tokenizer, T, packed=True, expanded=False):
        self.tokens, self.device = as_ids(tokens).cpu().numpy(), tokens.device
        first = np.flatnonzero(self.tokens == BOS)
        if self.tokens[0] != BOS or self.tokens[-1] != EOS:
            fail("a dataset of lines that is cut short or without <bos>: prepare it again "
                 "(data/lines/prepare.py)")
        self.bounds = np.stack([first, np.append(first[1:], len(self.tokens))], axis=1)
        self.T, self.packed, self.expanded = T, packed, expanded

    def __len__(self):
        return len(self.bounds)

    def texts(self, which, rng):
        """The lines `which`: of a longer one T tokens in a row from anywhere, which may lose bos or eos;
        `expanded`, a random number of pads behind each, up to T tokens."""
        texts = []
        for begin, end in self.bounds[which]:
            begin += rng.integers(max(1, end - begin - self.T + 1))
            texts.append(self.tokens[begin:min(end, begin + self.T)])
            if self.expanded:
                pads = rng.integers(self.T - len(texts[-1]) + 1)
                texts[-1] = np.append(texts[-1], np.full(pads, PAD))
        return texts

    def bins(self, texts, packed):
        """Which texts share a row."""
        if not packed:
            return [[i] for i in range(len(texts))]
        return first_fit_decreasing([len(t) for t in texts], self.T)

    def draw(self, B, packed):
        """Random lines, as many as B rows hold: x, segment (B, T) int64. A function of torch's seed."""
        rng, T = np.random.default_rng(torch.randint(2 ** 62, ()).item()), self.T
        lines = lambda n: self.texts(rng.integers(len(self), size=n), rng)
        texts = lines(B)
        if not packed:
            return fill(texts, self.bins(texts, False), T, PAD)
        while (slots := np.cumsum([len(t) for t in texts]))[-1] <= B * T:
            texts += lines(len(texts))
        few, many = B, int(np.searchsorted(slots, B * T, side='right')) + 1
        while many - few > 1:  # `few` texts fit, `many` do not
            middle = (few + many) // 2
            few, many = (middle, many) if len(self.bins(texts[:middle], True)) <= B else (few, middle)
        bins = self.bins(texts[:few], True)
        return fill(texts, bins + [[]] * (B - len(bins)), T, PAD)

    def batch(self, B):
        x, segment = self.draw(B, self.packed)
        return self.named(x, segment), int((segment >= 0).sum())

    def all(self, most=0):
        """All lines, or `most` evenly spread, in the order of the stream but packed."""
        which = np.arange(len(self))
        if 0 < most < len(self):
            which = np.linspace(0, len(self) - 1, most).astype(int)
        texts = self.texts(which, np.random.default_rng(0))
        return self.named(*fill(texts, self.bins(texts, self.packed), self.T, PAD))

    def named(self, x, segment):
        return dict(x=x.to(self.device), segment=segment.to(self.device))

    def report(self, B):
        """How full B rows are, packed and not."""
        full = [sum(efficiency(self.draw(B, packed)[1]) for _ in range(10)) / 10 for packed in (True, False)]
        longer = int((self.bounds[:, 1] - self.bounds[:, 0] > self.T).sum())
        return (f"{len(self):,} lines, {longer:,} longer than {self.T} tokens and cut; of {B} x {self.T} "
                f"slots hold text: {full[0]:.1%} packed, {full[1]:.1%} with one line a row")


def efficiency(segment):
    """The share of slots that hold text."""
    return (segment >= 0).double().mean().item()
