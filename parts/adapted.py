"""
How a denoiser that was an autoregressive model reads its input (DiffuGPT and DiffuLLaMA, arXiv 2410.17891).

Two things may ease the change. `shift`: the network reads [BOS] xt, and what it says at position i is about
token i + 1, as before; what it says at the last position is dropped. (Dream has no [BOS]: its first token is
predicted where it stands.) `anneal_iters`: in training a query sees the past and, with probability r, each
later token, one draw per step; r rises to 1 in so many steps. Outside of training every query sees
everything. hub/adapt.py moves the weights.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import model
from configurator import Fixed, Natural
from parts import clock, lora


@dataclass
class Config(lora.Config):
    # a denoiser that was an autoregressive model
    shift: bool = False        # position i predicts token i + 1, as in an autoregressive model
    anneal_iters: Natural = 0  # steps until every token sees all others; 0: from the start
    # set by the weights of others
    bos: Fixed[bool] = True    # shift: does [BOS] stand in front of the text?


def partly_causal(T, r):
    """The attention mask of annealing: the past always, each later token with probability r (0-d tensor):
    (T, T) bool."""
    past = torch.ones(T, T, dtype=torch.bool, device=r.device).tril()
    return past | (torch.rand(T, T, device=r.device) < r)


def normalised(logits, config):
    """Logits (..., V) -> log p of what is written, float32: never the id that was others' [MASK]."""
    logits = logits.float()
    if config.old_mask >= 0:
        logits = logits.index_fill(-1, torch.full((1,), config.old_mask, device=logits.device), -torch.inf)
    return logits.log_softmax(-1)


class Adapted(model.GPT):
    def __init__(self, config, **how):
        leads = config.shift and config.bos
        super().__init__(replace(config, block_size=config.block_size + leads), causal=False,
                         marks=1 + leads, **how)
        self.shift, self.leads, self.anneal_iters = config.shift, leads, config.anneal_iters
        self.clock = clock.Clock()

    def forward(self, x, mask=None, time=None, where=None, only=None):
        """As of GPT, with the shift undone: logits (B, T, V) of tokens x (B, T), or (N, V) at `only`."""
        if self.leads:
            x = F.pad(x, (1, 0), value=self.config.vocab_size + 1)  # [BOS], which sees what x[:, 0] sees
            if mask is not None:  # of one text and its padding
                mask = torch.cat([mask[..., :1, :], mask], -2)
                mask, where = torch.cat([mask[..., :1], mask], -1), F.pad(where + 1, (1, 0))
        if self.training and self.anneal_iters:
            seen = partly_causal(x.size(1), ((self.clock.steps + 1) / self.anneal_iters).clamp(max=1))
            mask = seen if mask is None else seen & mask
        h = self.trunk(self.embed(x), mask, time=time, where=where)
        if self.shift:  # what stands before a token says what it is; without [BOS] the first one does itself
            h = h[:, :-1] if self.leads else torch.cat([h[:, :1], h[:, :-1]], 1)
        return self.logits(h if only is None else h[only])


def network(config, **how):
    """The network of a denoiser: model.GPT without the causal mask, with a shift, annealing and adapters if
    the config (dataclass) asks for them; how: as of GPT. Raises ValueError."""
    adapted = config.shift or config.anneal_iters
    net = Adapted(config, **how) if adapted else model.GPT(config, causal=False, **how)
    return lora.by_config(net, config)
