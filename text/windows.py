"""
A text as windows.

`Rows`: windows of T tokens, cut anywhere. `Passages`, for the sentence VAE and what is built on it: windows
of at most W tokens with what stands before them. They have W tokens each, `stride` apart, or are sentences.
A sentence ends behind . ! ? or a line break, with the closing marks in the same token and the space that
follow, or when W tokens are full. It does not cross a document's end; windows of W tokens do. The id V
stands where there is no token: behind a short window, and before a prefix of fewer than W tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configurator import Share, fail
from text.vocabulary import as_ids


@dataclass
class Config:
    random_length: Share = 0.0  # share of training rows cut to a random length (LLaDA: 0.01)


class Rows:
    """Windows of T tokens of one long text; see rows.py."""

    def __init__(self, tokens, tokenizer, T, random_length=0.0):
        if len(tokens) < T:
            fail(f"the text has {len(tokens)} tokens, fewer than block_size={T}")
        self.tokens, self.T, self.random_length = tokens, T, random_length

    def batch(self, B):
        """x (B, T), gathered on the device without waiting for it; what random_length cuts off is padding,
        segment -1."""
        device, T = self.tokens.device, self.T
        start = torch.randint(len(self.tokens) - T + 1, (B, 1), device=device)
        place = torch.arange(T, device=device)
        batch = dict(x=as_ids(self.tokens[start + place]))
        if self.random_length:
            cut = torch.rand(B, 1, device=device) < self.random_length
            kept = torch.where(cut, torch.randint(1, T + 1, (B, 1), device=device), T)
            batch['segment'] = torch.zeros_like(batch['x']).where(place < kept, -1)
        return batch, B * T

    def all(self, most=0):
        """Windows side by side, x (N, T); the last, incomplete one is left out."""
        N = len(self.tokens) // self.T
        rows = torch.arange(N, device=self.tokens.device)
        if 0 < most < N:
            rows = torch.linspace(0, N - 1, most, device=self.tokens.device).long()
        return dict(x=as_ids(self.tokens[:N * self.T].view(N, self.T)[rows]))

    def report(self, B):
        return ''


# ---- sentences --------------------------------------------------------------------------------------------

OTHER, END, SPACE = range(3)  # what a token is to a sentence


def sentence_ends(pieces):
    """What every token of the vocabulary is, from its bytes: (V,) int8."""
    kinds = torch.zeros(len(pieces), dtype=torch.int8)
    for i, piece in enumerate(pieces):
        if piece.rstrip(b' "\')]\r').endswith((b'.', b'!', b'?', b'\n')):
            kinds[i] = END
        elif piece and not piece.strip():
            kinds[i] = SPACE
    return kinds


def begins(kinds):
    """Where a new sentence begins: at a token that is OTHER, if the last token before it that is no SPACE is
    END. kinds (..., L) -> (..., L) bool, the first False."""
    place = torch.arange(kinds.size(-1), device=kinds.device)
    solid = torch.where(kinds != SPACE, place, 0).cummax(-1).values  # the last token that is no space
    after = kinds.gather(-1, solid) == END
    return after.roll(1, -1) & (kinds == OTHER) & (place > 0)


def sentences(tokens, W, ends, end):
    """Starts, lengths and documents (N,) of the sentences in tokens (L,): at most W tokens each, none empty.

    ends (V,): what every token is, see `sentence_ends`. end: the id between documents, which is in no
    sentence, or None.
    """
    place = torch.arange(len(tokens), device=tokens.device)
    between = tokens == end if end is not None else torch.zeros_like(tokens, dtype=torch.bool)
    first = begins(ends[tokens].where(~between, OTHER))
    first[:1] = True
    first[1:] |= between[:-1] | between[1:]
    begun = torch.where(first, place, 0).cummax(0).values  # where the sentence of every token began
    first = (place - begun) % W == 0
    start = place[first]
    length = torch.diff(start, append=torch.tensor([len(tokens)], device=tokens.device))
    document = between.cumsum(0)[start]
    kept = ~between[start]
    return start[kept], length[kept], document[kept]


class Passages:
    """Windows of tokens (L,) (of `rows.load_tokens`, or ids) with what stands before them; see rows.py.

    Window i holds the tokens from start[i] to start[i] + length[i], in a document that begins at origin[i].
    The window that ends where it starts is number i - back. n_prev: how many windows before are in a batch.
    """

    def __init__(self, tokens, W, mask_id, stride=1, ends=None, end=None, n_prev=0):
        self.tokens, self.W, self.mask_id, self.n_prev = tokens, W, mask_id, n_prev
        if ends is None:
            if W % stride:
                raise ValueError(f"stride={stride} must divide {W}, the tokens of a window")
            self.start = torch.arange(0, max(0, len(tokens) - W + 1), stride, device=tokens.device)
            self.back = W // stride
            self.length = torch.tensor(W, device=tokens.device).expand(self.start.shape)
            self.origin = torch.tensor(0, device=tokens.device).expand(self.start.shape)
        else:
            ids = self.ids(torch.arange(len(tokens), device=tokens.device))
            self.start, self.length, document = sentences(ids, W, ends.to(tokens.device), end)
            self.origin = self.start[torch.searchsorted(document, document)]
            self.back = 1

    def ids(self, at):
        """The ids at positions `at` (...), int64."""
        return as_ids(self.tokens[at])

    def __len__(self):
        return len(self.start)

    def window(self, i):
        """Windows i (...) -> tokens (..., W), V behind the end; all V for i = -1."""
        place = torch.arange(self.W, device=i.device)
        at = (self.start[i][..., None] + place).clamp(max=len(self.tokens) - 1)
        inside = (place < self.length[i][..., None]) & (i >= 0)[..., None]
        return torch.where(inside, self.ids(at), self.mask_id)

    def before(self, i, n):
        """The indices (B, n) of the n windows before windows i (B,), the nearest last; -1: there is none."""
        j = i[:, None] - self.back * torch.arange(n, 0, -1, device=i.device)
        same = self.origin[j.clamp(min=0)] == self.origin[i][:, None]
        return torch.where((j >= 0) & same, j, -1)

    def prefix(self, i):
        """The W tokens before windows i (B,), sentences: in their document; (B, W), V if there are fewer."""
        at = self.start[i][:, None] + torch.arange(-self.W, 0, device=i.device)
        return torch.where(at >= self.origin[i][:, None], self.ids(at.clamp(min=0)), self.mask_id)

    def inputs(self, i):
        """Windows i (B,) and what stands before: x, prefix (B, W), with n_prev before (B, n_prev, W)."""
        batch = dict(x=self.window(i), prefix=self.prefix(i))
        return batch | dict(before=self.window(self.before(i, self.n_prev))) if self.n_prev else batch

    def batch(self, B):
        return self.inputs(torch.randint(len(self), (B,), device=self.start.device)), B * self.W

    def all(self, most=0):
        return self.inputs(self.spread(most))

    def report(self, B):
        return ''

    def spread(self, most):
        """Indices of `most` windows, evenly spread; 0: of all."""
        N, device = len(self), self.start.device
        if not 0 < most < N:
            return torch.arange(N, device=device)
        return torch.arange(most, device=device) * (N - 1) // max(1, most - 1)


def last(tokens, n, W, mask_id, ends=None, right=False):
    """The last n windows (0: all) of a prompt (L,), cut as by Passages, but from its end: (n, W), V where
    there is no token. right: short ones are padded in front, as if their text had begun earlier."""
    if ends is None:
        parts = [tokens[max(0, i - W):i] for i in range(len(tokens), 0, -W)][::-1]
    else:
        start, length, _ = sentences(tokens, W, ends, None)
        parts = [tokens[s:s + k] for s, k in zip(start.tolist(), length.tolist())]
    parts = parts[-n:]
    rows = torch.full((n or len(parts), W), mask_id, device=tokens.device)
    for row, part in zip(rows[len(rows) - len(parts):], parts):
        row[W - len(part) if right else 0:][:len(part)] = part
    return rows


# ---- windows of a canvas (B, T), V where there is still to write ------------------------------------------

def tokens_before(xt, start, W, mask_id):
    """The W tokens before the positions start (B,) of the canvas xt: (B, W), V where there are none."""
    at = start[:, None] + torch.arange(-W, 0, device=xt.device)
    return torch.where(at >= 0, xt.gather(1, at.clamp(min=0)), mask_id)


def place(xt, start, window, mask_id):
    """The canvas xt with the windows (B, W) at start (B,); tokens that it holds already stay."""
    at = start[:, None] + torch.arange(window.size(1), device=xt.device)
    inside = (at < xt.size(1)) & (window != mask_id)
    at = at.clamp(max=xt.size(1) - 1)
    free = inside & (xt.gather(1, at) == mask_id)
    new = F.pad(xt, (0, 1))  # what is not to be written goes to a column beyond
    new.scatter_(1, torch.where(free, at, xt.size(1)), window)
    return new[:, :-1]
