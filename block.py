"""
Block diffusion (BD3-LM, arXiv 2503.09573): between autoregression and masked diffusion.

Text is cut into blocks of block_length tokens. Blocks come one after the other, each by masked diffusion
given the clean blocks before it:

    -log p(x) <= sum over blocks b of E_k [ block_length / k * sum over masked i in b of
                                            -log p(x_i | noisy block b, clean blocks before b) ]

k of the block's tokens are masked, k uniform on 1..block_length. Blocks of 1 are autoregression (k = 1: the
bound is exact), one block of T is masked diffusion; the shorter the blocks, the tighter the bound.

Training takes one forward over [noisy x, clean x], 2 T tokens, with an attention mask of three parts:
    a noisy token sees its own noisy block,             M_BD   block-diagonal
                  and the clean blocks before it;       M_OBC  offset block-causal
    a clean token sees the clean blocks up to its own.  M_BC   block-causal
So position i of both halves is position i of the text, and nothing sees its own clean token. Sampling goes
block by block: a finished block is read once more, clean, into the key-value cache, and never again.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

import model
from ar import prompt_length, token_nats
from configurator import Count, Fixed, Share
from masked import exactly, low_discrepancy
from parts.adapted import normalised
from parts.neighbours import beside
from unmask import RULES, shares, unmask  # noqa: F401


@dataclass
class Config(model.Config):
    # block diffusion
    block_length: Count = 4   # tokens of a block; must divide block_size, the longest sequence
    # block diffusion, training only
    mask_low: Share = 0.0     # the least share of a block's tokens that is masked
    mask_high: Share = 1.0    # the largest, see mask_law
    loss_weight: Literal['flat', 'elbo'] = 'flat'  # flat, all alike | elbo, the bound's, unless clipped
    # set by the weights of others
    first_given: Fixed[bool] = False  # the first token of a text is not masked, nor scored (BD3-LM)

    def __post_init__(self):
        super().__post_init__()
        if self.block_size % self.block_length:
            raise ValueError(f"block_length={self.block_length} must divide block_size={self.block_size}")
        if self.mask_low >= self.mask_high:
            raise ValueError(f"mask_low={self.mask_low} must be below mask_high={self.mask_high}")
        if not mask_law(self.block_length, self.mask_low, self.mask_high).any():
            raise ValueError(f"no number of masks in a block of {self.block_length} is a share between "
                             f"mask_low={self.mask_low} and mask_high={self.mask_high}")


def mask_law(n, low, high):
    """Probability that k of a block's n tokens are masked in training, k = 0..n: (n + 1,) float64, all 0 if
    no k fits.

    BD3-LM's clipped schedule (arXiv 2503.09573 and its code): t is uniform on [low, high], and every token is
    masked with probability t; a block is drawn again, at the same t, until its share k / n lies in
    [low, high] too. Blocks without a mask cost nothing and are left out, so [0, 1] makes k uniform on 1..n,
    as in the bound.
    """
    k = torch.arange(n + 1, dtype=torch.float64, device='cpu')
    t = low + (high - low) * (torch.arange(1000, dtype=torch.float64, device='cpu') + 0.5) / 1000
    p = torch.distributions.Binomial(n, t[:, None]).log_prob(k).exp()
    p = p * ((k / n >= low - 1e-9) & (k / n <= high + 1e-9))
    p = (p / p.sum(-1, keepdim=True)).nan_to_num().mean(0)
    p[0] = 0
    return p / p.sum().clamp(min=1e-300)


def block_mask(T, block_length, device=None):
    """The attention mask of [noisy x, clean x]: (2T, 2T) bool, True where a row sees a column."""
    block = torch.arange(T, device=device) // block_length
    row, column = block[:, None], block[None, :]
    noisy = torch.cat([row == column, row > column], dim=1)                        # M_BD, M_OBC
    clean = torch.cat([torch.zeros_like(row == column), row >= column], dim=1)     # nothing, M_BC
    return torch.cat([noisy, clean])


def block_beside(block_length):
    """`beside` in [noisy x, clean x]: beside a noisy token stand its own noisy block and the clean text
    before, beside a clean one the clean text up to the end of its block."""
    def near(h, first, t):
        T, found = t // 2, []
        place = torch.arange(T, device=h.device)[:, None]
        for i, x in enumerate(zip(*(beside(half, first, T) for half in h.chunk(2, dim=1)))):
            (noisy, clean), block = x, place // block_length
            theirs = (place + first + i) // block_length
            noisy = torch.where(block == theirs, noisy, clean)
            found.append(torch.cat([noisy, clean], dim=1) * (theirs <= block).repeat(2, 1))
        return found
    return near


def block_causal(start, T, block_length, device=None):
    """The attention mask of clean tokens start..T-1 over 0..T-1: (T - start, T) bool."""
    block = torch.arange(T, device=device) // block_length
    return block[start:, None] >= block


class Model(nn.Module):
    bound, takes, revises, any_length = 'upper', ('windows',), False, False
    orders, base, selects, measures = (), '', True, False
    reading, verbs = dict(temperature=0.7), ()

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id = config, config.vocab_size
        self.gpt = model.GPT(config, causal=False)
        if config.block_length == 1:
            self.bound = 'exact'
        law, n = mask_law(config.block_length, config.mask_low, config.mask_high), config.block_length
        self.least, self.most = int(law.nonzero()[0]), int(law.nonzero()[-1])  # masks of a block
        self.register_buffer('below', law.cumsum(0).float()[:-1], persistent=False)  # P(at most k masks)
        # flat is 1 / E[share of masked tokens]: the loss of a fresh model is ln V
        self.flat = 1 / (law @ torch.arange(n + 1, dtype=law.dtype, device='cpu') / n).item()

    def forward(self, x, v=None, u=None):
        """x (B, T) -> (loss in nats per token, metrics). Noise may be given: v (B, T / block_length), the
        quantile of each block's number of masks in its law, and u (B, T)."""
        B, n = x.size(0), self.config.block_length
        if v is None:
            blocks = B * (x.size(1) // n)
            v = low_discrepancy(torch.rand((), device=x.device), blocks)
            # torch 2.13 does not compile randperm here
            shuffle = torch.rand(blocks, device=x.device).argsort()
            v = v[shuffle].view(B, -1)
        if u is None:
            u = torch.rand(x.shape, device=x.device)
        k = (v[..., None] >= self.below).sum(-1).clamp(self.least, self.most)
        masked = exactly(k.view(-1), u.view(-1, n)).view_as(x)
        if self.config.first_given:
            masked = masked & (torch.arange(x.size(1), device=x.device) > 0)
        nats = self.masked_nats(x, masked)
        weight = n / k if self.config.loss_weight == 'elbo' else self.flat
        loss = (weight * nats).sum() / x.numel()
        return loss, {'loss_per_masked': nats.detach().sum() / masked.sum()}

    def masked_nats(self, x, masked):
        """Sum over the masked tokens of each block of -log p(x_i | the block's clean tokens, the clean
        blocks before), (B, T / block_length). x (B, T), masked (B, T) bool."""
        T, n = x.size(1), self.config.block_length
        both = torch.cat([x.where(~masked, self.mask_id), x], dim=1)
        position = torch.arange(T, device=x.device).repeat(2)
        h = self.gpt.trunk(self.gpt.embed(both), block_mask(T, n, x.device), where=position,
                           near=block_beside(n))
        return (token_nats(self.gpt.logits(h[:, :T]), x) * masked).view(x.size(0), -1, n).sum(-1)

    def nats(self, x, n=1):
        """An estimate, with n draws, of the upper bound on -log p(x) in nats: (B,). x (B, T).

        Each block masks exactly k of its tokens, k from the i-th n-th of 1..block_length in draw i.
        Raises ValueError where T is not a multiple of block_length.
        """
        (B, T), size, total = x.shape, self.config.block_length, 0
        if T % size:
            raise ValueError(f"{T} tokens are not whole blocks of {size}")
        sizes = torch.full((B, T // size), size, device=x.device)  # tokens of a block that are scored
        sizes[:, 0] -= int(self.config.first_given)
        for i in range(n):
            v = (i + torch.rand(sizes.shape, device=x.device)) / n
            k = torch.minimum((v * sizes).long() + 1, sizes)
            u = torch.rand(x.shape, device=x.device)
            u[:, :1] += int(self.config.first_given)  # the last to be masked
            masked = exactly(k.view(-1), u.view(-1, size)).view_as(x)
            total = total + (sizes / k.clamp(min=1) * self.masked_nats(x, masked)).sum(-1)
        return total / n

    def read(self, x, cache):
        """Take the clean blocks x (B, t) into the cache."""
        end = cache.length + x.size(1)
        self.gpt(x, block_causal(cache.length, end, self.config.block_length, x.device), cache)

    def denoise_block(self, xt, cache):
        """log p(x0 | noisy block xt, cache), (B, t, V) float32, normalised; the cache stays as it is."""
        before = cache.length
        logp = normalised(self.gpt(xt, cache=cache), self.config)
        cache.trim(before)
        return logp

    @torch.no_grad()
    def sample(self, xt, steps, rule='', temperature=1.0, top_k=0, top_p=1.0, **own):
        """Generator of canvases (B, T), one per network call but for the reading of clean blocks.

        xt starts with the given tokens; V is where to write. steps: of the whole text, shared out among the
        blocks by what is to be written there, at least one each. The rule works inside a block (see
        unmask.py); by default random, with its even counts: ancestral steps often reveal several of a block's
        few tokens at once.
        """
        if own.get('cfg') or own.get('cache'):
            raise ValueError("cfg and cache are not for block diffusion, which has an exact cache of its own")
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, **own)
        n, cache = self.config.block_length, model.Cache()
        first = prompt_length(xt, self.mask_id) // n * n
        if first:
            self.read(xt[:, :first], cache)
        blocks = range(first, xt.size(1), n)
        sizes = [int((xt[:, i:i + n] == self.mask_id).sum(-1).max()) for i in blocks]
        for begin, share in zip(blocks, shares(steps, sizes)):
            denoise = lambda block, t: self.denoise_block(block, cache)
            part, rule = xt[:, begin:begin + n], rule or 'random'
            for block in unmask(denoise, part, self.mask_id, share, rule, **how):
                xt = torch.cat([xt[:, :begin], block, xt[:, begin + n:]], dim=1)
                yield xt
            if begin + n < xt.size(1):
                self.read(xt[:, begin:begin + n], cache)
