"""
A text as windows: what a sentence VAE encodes, and what comes before.

A stream of tokens is cut into windows of at most W tokens, either all of W, a `stride` apart, or sentences:
they end behind a token that ends a sentence, or when W tokens are full, and never cross a document's end.
The blank id V stands where there is no token: behind a short window, and before a prefix that has fewer
than W tokens.
"""
import torch


def sentence_ends(pieces):
    """Which tokens end a sentence: . ! or ? before any quotes or brackets, or a line break. (V,) bool of the
    pieces (bytes)."""
    last = [piece.rstrip(b' "\')]\r') for piece in pieces]
    return torch.tensor([piece.endswith((b'.', b'!', b'?', b'\n')) for piece in last])


def sentences(tokens, W, ends, end):
    """Starts, lengths and documents (N,) of the sentences in tokens (L,): of at most W tokens, none empty.

    ends (V,) bool: tokens that end a sentence. end: the id between documents, which is in no window, or
    None.
    """
    place = torch.arange(len(tokens), device=tokens.device)
    apart = tokens == end if end is not None else torch.zeros_like(tokens, dtype=torch.bool)
    first = torch.ones_like(apart)
    first[1:] = ends[tokens[:-1]] & ~ends[tokens[1:]] | apart[:-1] | apart[1:]
    begun = torch.where(first, place, 0).cummax(0).values  # where the sentence of every token began
    first = (place - begun) % W == 0
    start = place[first]
    length = torch.diff(start, append=torch.tensor([len(tokens)], device=tokens.device))
    document = apart.cumsum(0)[start]
    kept = ~apart[start]
    return start[kept], length[kept], document[kept]


class Windows:
    """tokens: of a dataset, int16 or int64 (`common.load_tokens`). Window i: tokens start[i] up to
    start[i] + length[i]; `back` windows before it is the one that ends where it starts."""

    def __init__(self, tokens, W, blank, stride=1, ends=None, end=None):
        self.tokens, self.W, self.blank = tokens.long() & 0xFFFF, W, blank
        if ends is None:
            if W % stride:
                raise ValueError(f"stride={stride} must divide {W}, the tokens of a window")
            self.start = torch.arange(0, max(0, len(tokens) - W + 1), stride, device=tokens.device)
            self.back = W // stride
            self.length, self.document = torch.full_like(self.start, W), torch.zeros_like(self.start)
        else:
            self.start, self.length, self.document = sentences(self.tokens, W, ends.to(tokens.device), end)
            self.back = 1

    def __len__(self):
        return len(self.start)

    def window(self, i):
        """Windows i (...) -> tokens (..., W), V behind the end; all V for i = -1."""
        place = torch.arange(self.W, device=i.device)
        at = (self.start[i][..., None] + place).clamp(max=len(self.tokens) - 1)
        inside = (place < self.length[i][..., None]) & (i >= 0)[..., None]
        return torch.where(inside, self.tokens[at], self.blank)

    def before(self, i, n):
        """The indices (B, n) of the n windows before windows i (B,), the nearest last; -1: there is none."""
        j = i[:, None] - self.back * torch.arange(n, 0, -1, device=i.device)
        same = self.document[j.clamp(min=0)] == self.document[i][:, None]
        return torch.where((j >= 0) & same, j, -1)

    def prefix(self, i):
        """The W tokens before windows i (B,) in their document, (B, W), V where there are fewer."""
        at = self.start[i][:, None] + torch.arange(-self.W, 0, device=i.device)
        first = self.start[torch.searchsorted(self.document, self.document[i])]
        return torch.where(at >= first[:, None], self.tokens[at.clamp(min=0)], self.blank)

    def batch(self, B):
        return self.inputs(torch.randint(len(self), (B,), device=self.start.device))

    def inputs(self, i, n_prev=0):
        """What a model of windows takes of windows i (B,): them, their prefixes, and the n_prev before."""
        given = (self.window(i), self.prefix(i))
        return (*given, self.window(self.before(i, n_prev))) if n_prev else given

    def spread(self, most):
        """Indices of `most` windows, evenly spread; 0: of all."""
        N, device = len(self), self.start.device
        if not 0 < most < N:
            return torch.arange(N, device=device)
        return torch.arange(most, device=device) * (N - 1) // max(1, most - 1)


def last(tokens, n, W, blank, ends=None):
    """The last n windows (0: all) of a prompt (L,) as Windows cuts them, but from its end: (n, W), V where
    there is nothing."""
    if ends is None:
        parts = [tokens[max(0, i - W):i] for i in range(len(tokens), 0, -W)][::-1]
    else:
        start, length, _ = sentences(tokens, W, ends, None)
        parts = [tokens[s:s + k] for s, k in zip(start.tolist(), length.tolist())]
    parts = parts[-n:]
    rows = torch.full((n or len(parts), W), blank, device=tokens.device)
    for row, part in zip(rows[len(rows) - len(parts):], parts):
        row[:len(part)] = part
    return rows
