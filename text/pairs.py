"""
Prompts and answers: a row is one of each, and only the answer is learned.

    prompt [sep] answer [end] [end] ... [end]

The prompt and [sep] are given: neither masked nor scored, whatever the objective. All behind them is
(DiffuSeq arXiv 2210.08933, DiffuGPT 2410.17891, LLaDA 2502.09992): the [end]s that fill the row too, so a
denoiser learns how long an answer is. [sep] is a short text, which a pretrained model can read from the
first step on.

A dataset of pairs is a stream: prompt [end] answer [end] prompt [end] ... (data/gsm8k/prepare.py).
"""
from dataclasses import dataclass

import numpy as np
import torch

from configurator import fail
from text.vocabulary import as_ids


@dataclass
class Config:
    pass  # nothing to choose


def row_of(prompt, answer, T, sep, end):
    """Lists of ids -> (a row of T ids, how many of them are given). What does not fit is cut: first the head
    of the prompt, then the tail of an answer that is too long by itself; that one has no [end]."""
    answer = (answer + [end])[:T - len(sep)]
    given = prompt[max(0, len(prompt) + len(sep) + len(answer) - T):] + sep
    return given + answer + [end] * (T - len(given) - len(answer)), len(given)


class Rows:
    """The pairs of a stream of tokens (ids, or of rows.load_tokens); see rows.py."""

    def __init__(self, tokens, tokenizer, T):
        self.ids, self.device = as_ids(tokens).cpu().numpy(), tokens.device
        self.T, self.sep, self.end = T, tokenizer.sep, tokenizer.end
        last = np.flatnonzero(self.ids == self.end)
        if len(last) < 2 or len(last) % 2 or last[-1] != len(self.ids) - 1:
            fail("a dataset of pairs that is not prompt, end, answer, end ...: prepare it again")
        if T <= len(self.sep):
            fail(f"block_size={T} leaves no room for an answer: {len(self.sep)} stand before it")
        first = np.append(0, last[:-1] + 1)
        self.bounds = np.stack([first, last], axis=1).reshape(-1, 2, 2)  # (pair, prompt or answer, from to)

    def __len__(self):
        return len(self.bounds)

    def pair(self, i):
        """(prompt, answer) as lists of ids."""
        return [self.ids[a:b].tolist() for a, b in self.bounds[i]]

    def rows(self, which):
        """The pairs `which` as x (N, T) int64 and given (N, T) bool."""
        rows, n = zip(*(row_of(*self.pair(i), self.T, self.sep, self.end) for i in which))
        given = torch.arange(self.T) < torch.tensor(n)[:, None]
        return dict(x=torch.tensor(rows).to(self.device), given=given.to(self.device))

    def batch(self, B):
        batch = self.rows(torch.randint(len(self), (B,)).tolist())
        return batch, int((~batch['given']).sum())

    def all(self, most=0):
        N = len(self)
        return self.rows(np.linspace(0, N - 1, most).astype(int).tolist() if 0 < most < N else range(N))

    def report(self, B):
        lengths = (self.bounds[..., 1] - self.bounds[..., 0]).sum(-1) + len(self.sep) + 1
        return f"{len(self):,} pairs, {(lengths > self.T).sum():,} longer than {self.T} tokens and cut"
