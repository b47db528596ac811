"""
Lines as examples: several texts in one row, none of which sees another.

A dataset of lines is a stream [bos] ... [eos] [bos] ... [eos] (data/lines/prepare.py); every line is a text
of its own. One line a row, padded, wastes the slots behind short lines. Packing puts several into a row:
first-fit decreasing takes the longest line first and puts each into the first row with room, which needs
at most 11/9 of the least possible number of rows, and one more (Yue 1991).

What keeps the texts of a row apart is the segment id: 0, 1, 2 ... for the texts of a row, -1 for padding.
    attention   a token sees the tokens of its own segment, nothing else. (Comparing the lengths of the texts
                instead, as has been done, lets two texts of equal length see each other.)
    positions   start from 0 in every segment
    loss        padding is outside
so a packed text gets the same logits as alone. Pads that `expand` and `insert` add are different: they
belong to the text, the model reads and writes them, so it can write texts shorter than the canvas.
"""
import numpy as np
import torch

from configurator import fail
from text.vocabulary import EOS, as_ids


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


def apart(segment):
    """What keeps the texts of packed rows apart in GPT.trunk: mask and where. None: a row is one text."""
    return {} if segment is None else dict(mask=same_text(segment), where=positions(segment))


def of_text(value, segment, given=None):
    """value (B, T), 0 at padding, and at tokens that are given (B, T) bool. None: there are none."""
    value = value if segment is None else value * (segment >= 0)
    return value if given is None else value * ~given


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


# ---- what may be done to a text before, all functions (ids (L,), numbers) -> ids --------------------------

def crop(text, T, rng):
    """T tokens in a row from anywhere of a text that is longer; bos or eos may be lost."""
    begin = rng.integers(max(1, len(text) - T + 1))
    return text[begin:begin + T]


def insert(text, share, pad, rng):
    """share * L pads at random places."""
    n = round(share * len(text))
    return np.insert(text, rng.integers(len(text) + 1, size=n), pad) if n else text


def expand(text, T, pad, rng):
    """A random number of pads, at most up to T tokens, behind the text."""
    return np.append(text, np.full(rng.integers(max(0, T - len(text)) + 1), pad))


class Lines:
    """The lines of a stream of tokens: random batches for training, all of them for evaluation.

    tokens: as of common.load_tokens, or ids; bos: the id every line starts with; pad: that of padding.
    packed: several lines to a row. inserted, expanded: see `insert` and `expand`.
    """

    def __init__(self, tokens, bos, pad, packed=True, inserted=0.0, expanded=False):
        self.tokens = as_ids(tokens).cpu().numpy()
        first = np.flatnonzero(self.tokens == bos)
        if not len(first):
            fail("a dataset of lines without <bos>: prepare it again (data/lines/prepare.py)")
        if self.tokens[0] != bos or self.tokens[-1] != EOS:
            fail("a dataset of lines that is cut short: prepare it again (data/lines/prepare.py)")
        self.bounds = np.stack([first, np.append(first[1:], len(self.tokens))], axis=1)
        self.pad, self.packed, self.inserted, self.expanded = pad, packed, inserted, expanded

    def __len__(self):
        return len(self.bounds)

    def longer(self, T):
        """How many lines have more than T tokens and will be cut."""
        return int((self.bounds[:, 1] - self.bounds[:, 0] > T).sum())

    def texts(self, which, T, rng):
        """The lines `which`, altered and cut to at most T tokens."""
        out = []
        for begin, end in self.bounds[which]:
            line = self.tokens[begin:end].astype(np.int64)
            text = crop(insert(line, self.inserted, self.pad, rng), T, rng)
            out.append(expand(text, T, self.pad, rng) if self.expanded else text)
        return out

    def bins(self, texts, T):
        """Which texts share a row."""
        if not self.packed:
            return [[i] for i in range(len(texts))]
        return first_fit_decreasing([len(t) for t in texts], T)

    def batch(self, B, T):
        """Random lines, as many as B rows hold: x, segment (B, T) int64. A function of torch's seed."""
        rng = np.random.default_rng(torch.randint(2 ** 62, ()).item())
        draw = lambda n: self.texts(rng.integers(len(self), size=n), T, rng)
        if not self.packed:
            return fill(draw(B), [[i] for i in range(B)], T, self.pad)
        texts = draw(B)
        while (slots := np.cumsum([len(t) for t in texts]))[-1] <= B * T:
            texts += draw(len(texts))
        few, many = B, int(np.searchsorted(slots, B * T, side='right')) + 1
        while many - few > 1:  # `few` texts fit, `many` do not
            middle = (few + many) // 2
            few, many = (middle, many) if len(self.bins(texts[:middle], T)) <= B else (few, middle)
        bins = self.bins(texts[:few], T)
        return fill(texts, bins + [[]] * (B - len(bins)), T, self.pad)

    def rows(self, T, most=0):
        """All lines, or `most` evenly spread, in the order of the stream but packed: x, segment (N, T)."""
        which = np.arange(len(self))
        if 0 < most < len(self):
            which = np.linspace(0, len(self) - 1, most).astype(int)
        texts = self.texts(which, T, np.random.default_rng(0))
        return fill(texts, self.bins(texts, T), T, self.pad)


def efficiency(segment):
    """The share of slots that hold text."""
    return (segment >= 0).double().mean().item()


def report(tokens, bos, pad, B, T):
    """How full B rows of T slots are, packed and not, as a line of text."""
    full = []
    for packed in (True, False):
        lines = Lines(tokens, bos, pad, packed)
        full.append(sum(efficiency(lines.batch(B, T)[1]) for _ in range(10)) / 10)
    return (f"{len(lines):,} lines, {lines.longer(T):,} longer than {T} tokens and cut; "
            f"of {B} x {T} slots hold text: {full[0]:.1%} packed, {full[1]:.1%} with one line a row")
