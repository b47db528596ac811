"""
The autoregressive objective: the baseline of every table.

    log p(x) = sum_i log p(x_i | x_<i),   x_<1 = [BOS]

One forward scores all T positions at once, exactly.
Row V of the embedding, [MASK] in the twin, is [BOS] here.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from unmask import draw


Config = model.Config  # nothing but the transformer's


def token_nats(logits, x):
    """-log p of each token in nats, (B, T), at least float32. logits (B, T, V), x (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), x, reduction='none')


def prompt_length(xt, mask_id):
    """How many tokens are given at the start of the canvas xt (B, T); everything after must be blank
    (= mask_id), in all rows alike. Raises ValueError."""
    blank = xt == mask_id
    start = int((~blank[0]).sum())
    if blank[:, :start].any() or not blank[:, start:].all():
        raise ValueError("this model writes from left to right: it takes a prompt; suffix and template "
                         "are for masked diffusion")
    return start


class Model(nn.Module):
    bound = 'exact'

    def __init__(self, config):
        super().__init__()
        self.config, self.blank = config, config.vocab_size
        self.gpt = model.GPT(config, causal=True)

    def shifted(self, x):
        """[BOS] x_1 ... x_{T-1}: what predicts x_1 ... x_T."""
        return F.pad(x[:, :-1], (1, 0), value=self.blank)

    def forward(self, x):
        """x (B, T) -> (nats per token, metrics)."""
        return token_nats(self.gpt(self.shifted(x)), x).mean(), {}

    def nats(self, x, n=1):
        """-log p(x) in nats, (B,). n is there for the contract: nothing is random here."""
        return token_nats(self.gpt(self.shifted(x)), x).sum(-1)

    @torch.no_grad()
    def sample(self, xt, steps=0, rule='', temperature=1.0, top_k=0, top_p=1.0, **knobs):
        """Generator of canvases, a token each. xt (B, T) starts with the prompt; the rest is blank (= V).

        The same canvas as for a denoiser, so the same scripts serve both.
        steps is not used: it takes one for each blank.
        """
        if rule or knobs:
            raise ValueError(f"{', '.join(knobs) or 'rule'} is for denoisers: "
                             f"an autoregressive model writes from left to right, a token a call")
        start, cache = prompt_length(xt, self.blank), model.Cache(self.config.n_layer)
        new, xt = self.shifted(xt)[:, :start + 1], xt.clone()
        for i in range(start, xt.size(1)):
            logits = self.gpt(new, cache=cache)[:, -1].float()
            new = draw(logits.log_softmax(-1), temperature, top_k, top_p)[:, None]
            xt[:, i:i + 1] = new
            yield xt.clone()
