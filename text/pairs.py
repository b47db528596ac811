"""
Prompts and answers: a row is one of each, and only the answer is learned.

    prompt [sep] answer [end] [end] ... [end]

The prompt and [sep] are given: neither masked nor scored, whatever the objective. All behind them is
(DiffuSeq arXiv 2210.08933, DiffuGPT 2410.17891, LLaDA 2502.09992): the [end]s that fill the row too, so a
denoiser learns how long an answer is. [sep] is a short text, which a pretrained model can read from the
first step on.

A dataset of pairs is a stream: prompt [end] answer [end] prompt [end] ... (data/gsm8k/prepare.py).
"""
import numpy as np
import torch

from configurator import fail


def fit(prompt, answer, T, sep, end):
    """Lists of ids -> (a row of T ids, how many of them are given). What does not fit is cut: first the head
    of the prompt, then the tail of an answer that is too long by itself; that one has no [end]."""
    answer = (answer + [end])[:T - len(sep)]
    given = prompt[max(0, len(prompt) + len(sep) + len(answer) - T):] + sep
    return given + answer + [end] * (T - len(given) - len(answer)), len(given)


class Pairs:
    """The pairs of a stream: random batches for training, all of them for evaluation. tokens: as of
    common.load_tokens, as ids; sep: list of ids; end: id."""

    def __init__(self, ids, sep, end):
        self.ids, self.sep, self.end = ids.cpu().numpy(), sep, end
        last = np.flatnonzero(self.ids == end)
        if len(last) < 2 or len(last) % 2 or last[-1] != len(self.ids) - 1:
            fail("a dataset of pairs that is not prompt, end, answer, end ...: prepare it again")
        first = np.append(0, last[:-1] + 1)
        self.bounds = np.stack([first, last], axis=1).reshape(-1, 2, 2)  # (pair, prompt or answer, from to)

    def __len__(self):
        return len(self.bounds)

    def longer(self, T):
        """How many pairs do not fit into T tokens and will be cut."""
        lengths = (self.bounds[..., 1] - self.bounds[..., 0]).sum(-1)
        return int((lengths + len(self.sep) + 1 > T).sum())

    def pair(self, i):
        """(prompt, answer) as lists of ids."""
        return [self.ids[a:b].tolist() for a, b in self.bounds[i]]

    def rows(self, which, T):
        """The pairs `which` as x (N, T) int64 and given (N, T) bool."""
        if T <= len(self.sep):
            fail(f"block_size={T} leaves no room for an answer: {len(self.sep)} stand before it")
        rows, n = zip(*(fit(*self.pair(i), T, self.sep, self.end) for i in which))
        return torch.tensor(rows), torch.arange(T) < torch.tensor(n)[:, None]

    def batch(self, B, T):
        """B random pairs. A function of torch's seed."""
        return self.rows(torch.randint(len(self), (B,)).tolist(), T)

    def spread(self, most=0):
        """The numbers of all pairs, or of `most` evenly spread."""
        N = len(self)
        return range(N) if not 0 < most < N else np.linspace(0, N - 1, most).astype(int).tolist()
