"""
The autoregressive objective: the baseline of every table.

    log p(x) = sum_i log p(x_i | x_<i),   x_<1 = [BOS]

One forward scores all T positions at once, exactly.
Row V of the embedding, [MASK] in the twin, is [BOS] here.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts import lora
import model
from text.packing import counted, keep_apart as apart, starts
from unmask import draw


def of_text(value, segment, given=None):
    return value * counted(value, segment, given)


@dataclass
class Config(model.Config):
    lora_rank: int = 0             # of adapters on a frozen network (lora.py); 0: none, all is trained
    lora_alpha: float = 32.0       # their scale is lora_alpha / lora_rank
    lora_dropout: float = 0.0      # on what enters them
    lora_targets: str = 'qkv,proj,fc'  # the matrices that have one
    lora_embed: bool = True        # train the embedding too; a tied head goes with it

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank < 0 or self.lora_alpha < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_rank={self.lora_rank} and lora_alpha={self.lora_alpha} must not be "
                             f"negative, lora_dropout={self.lora_dropout} in [0, 1)")
        if self.lora_rank and self.dropout:
            raise ValueError(f"dropout={self.dropout}: a frozen network has none, adapters have "
                             f"lora_dropout")


def token_nats(logits, x):
    """-log p of each token in nats, (B, T), at least float32. logits (B, T, V), x (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # F.cross_entropy over (B, V, T) adds up V = 49,152 exponentials one by one: 1e-4 nats too low (NOTES.md)
    return logits.logsumexp(-1) - logits.gather(-1, x[..., None])[..., 0]


def prompt_length(xt, mask_id):
    """How many tokens are given at the start of every row of the canvas xt (B, T): of the shortest prompt.
    Everything behind a row's prompt must be blank (= mask_id). Raises ValueError."""
    blank = xt == mask_id
    if (blank[:, :-1] & ~blank[:, 1:]).any():
        raise ValueError("this model writes from left to right: it takes a prompt; suffix and template "
                         "are for denoisers")
    return int((~blank).sum(-1).min())


RULES = {}  # of sampling: there is one way


class Model(nn.Module):
    bound = 'exact'  # what `nats` is: exact | upper
    packs = True     # does it take packed rows, with segments?
    revises = False  # can a token of a canvas that `sample` yields change later?
    any_length = False  # may a canvas be longer than block_size?

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
        return self.gpt(before, **apart(segment))

    def forward(self, x, segment=None, given=None):
        """x (B, T) -> (nats per token, metrics). segment (B, T): of packed texts. given (B, T) bool: tokens
        that are not scored, a prompt."""
        count = of_text(torch.ones_like(x), segment, given).sum().clamp(min=1)
        return self.nats(x, 1, segment, given).sum() / count, {}

    def nats(self, x, n=1, segment=None, given=None):
        """-log p(x | given) in nats, (B,). n is there for the contract: nothing is random here."""
        return of_text(token_nats(self.logits(x, segment), x), segment, given).sum(-1)

    @torch.no_grad()
    def sample(self, xt, steps=0, rule='', temperature=1.0, top_k=0, top_p=1.0, **knobs):
        """Generator of canvases, a token each. xt (B, T) starts with the prompt; the rest is blank (= V).

        The same canvas as for a denoiser, so the same scripts serve both.
        steps is not used: it takes one for each blank.
        """
        if rule or knobs:
            raise ValueError(f"{', '.join(knobs) or 'rule'} is for denoisers: "
                             f"an autoregressive model writes from left to right, a token a call")
        start, cache = prompt_length(xt, self.mask_id), model.Cache(self.config.n_layer)
        new, xt = self.shifted(xt)[:, :start + 1], xt.clone()
        for i in range(start, xt.size(1)):
            logits = self.gpt(new, cache=cache)[:, -1].float()
            drawn = draw(logits.log_softmax(-1), temperature, top_k, top_p)
            xt[:, i] = torch.where(xt[:, i] == self.mask_id, drawn, xt[:, i])  # some prompts are longer
            new = xt[:, i:i + 1]
            yield xt.clone()
