"""
The autoregressive objective: the baseline of every table.

    log p(x) = sum_i log p(x_i | x_<i),   x_<1 = [BOS]

One forward scores all T positions at once, exactly. Row V of the embedding, [MASK] in the twin, is [BOS]
here. Every objective is a file with a Config, RULES and a Model whose class attributes are those below.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from configurator import Positive
from parts import lora
from parts.steered import penalised
from text.packing import counted, keep_apart, starts
from unmask import sample_tokens


@dataclass
class Config(lora.Config):
    pass


RULES = {}  # rules of sampling, {name: function}: here there is one way


def token_nats(logits, x):
    """-log p of each token in nats, (B, T), at least float32. logits (B, T, V), x (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # F.cross_entropy over (B, V, T) adds up V = 49,152 exponentials one by one: 1e-4 nats too low (NOTES.md)
    return logits.logsumexp(-1) - logits.gather(-1, x[..., None])[..., 0]


def prompt_length(xt, mask_id):
    """How many tokens are given at the start of every row of the canvas xt (B, T): of the shortest prompt.
    Behind a row's prompt everything must be mask_id. Raises ValueError."""
    empty = xt == mask_id
    if (empty[:, :-1] & ~empty[:, 1:]).any():
        raise ValueError("this model writes from left to right: it takes a prompt; suffix and template "
                         "are for denoisers")
    return int((~empty).sum(-1).min())


class Model(nn.Module):
    bound = 'exact'  # what `nats` gives: 'exact' | 'upper', a bound
    takes = ('windows', 'lines', 'pairs')  # rows that it can be trained on, see text/rows.py
    revises = False  # may a token of a canvas that `sample` yields change later?
    any_length = False  # may a canvas be longer than block_size?
    orders = ()      # other orders of writing whose likelihood it knows: 'left'
    base = ''        # the objective of the checkpoint that it is built on
    selects = True   # is the checkpoint with the lowest validation figure the best one?
    measures = False  # does `measure` want training rows before a checkpoint is written?
    reading = dict(temperature=0.7)  # how sample.py samples unless told otherwise
    verbs = ()       # methods that a sampler calls with the same shapes again and again, worth compiling

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id = config, config.vocab_size
        self.gpt = lora.by_config(model.GPT(config, causal=True), config)

    def shifted(self, x):
        """[BOS] x_1 ... x_{T-1}: what predicts x_1 ... x_T."""
        return F.pad(x[:, :-1], (1, 0), value=self.mask_id)

    def logits(self, x, segment=None):
        """What x_<i predicts for x_i, (B, T, V). segment (B, T): of packed texts, see packing.py."""
        before = self.shifted(x)
        if segment is not None:
            before = before.where(~starts(segment), self.mask_id)
        return self.gpt(before, **keep_apart(segment))

    def forward(self, x, segment=None, given=None):
        """x (B, T) -> (nats per token, metrics). segment (B, T): of packed texts. given (B, T) bool: tokens
        that are not scored, a prompt."""
        count = counted(x, segment, given).sum().clamp(min=1)
        return self.nats(x, segment=segment, given=given).sum() / count, {}

    def nats(self, x, n=1, segment=None, given=None):
        """-log p(x | given) in nats, (B,). n is there for the contract: nothing is random here."""
        return (token_nats(self.logits(x, segment), x) * counted(x, segment, given)).sum(-1)

    @torch.no_grad()
    def sample(self, xt, steps=0, temperature=1.0, top_k=0, top_p=1.0, *,
               repetition_penalty: Positive = 1.0):  # above 1: what is written already is less likely
        """Generator of canvases, one per token. xt (B, T) starts with the prompt; V is where to write.

        The same canvas as for a denoiser, so the same scripts serve both. steps is not used: it takes one for
        each token. Raises ValueError if something is given after a V.
        """
        start, cache = prompt_length(xt, self.mask_id), model.Cache()
        new, xt = self.shifted(xt)[:, :start + 1], xt.clone()
        for i in range(start, xt.size(1)):
            logp = self.gpt(new, cache=cache)[:, -1].float().log_softmax(-1)
            if repetition_penalty != 1:
                logp = penalised(logp, xt, repetition_penalty)
            drawn = sample_tokens(logp, temperature, top_k, top_p)
            xt[:, i] = torch.where(xt[:, i] == self.mask_id, drawn, xt[:, i])  # some prompts are longer
            new = xt[:, i:i + 1]
            yield xt.clone()
