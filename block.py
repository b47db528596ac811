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

import torch
import torch.nn as nn

import model
from ar import prompt_length, token_nats
from masked import exactly, low_discrepancy
from unmask import shares, unmask


@dataclass
class Config(model.Config):
    block_length: int = 4        # tokens of a block; must divide block_size, the longest sequence
    mask_low: float = 0.0        # training only: the share of a block that is masked is uniform on
    mask_high: float = 1.0       # training only: [mask_low, mask_high], clipped unless [0, 1]
    loss_weight: str = 'flat'    # training only: elbo (the bound's unless clipped) | flat (all alike)

    def __post_init__(self):
        super().__post_init__()
        if self.block_length < 1 or self.block_size % self.block_length:
            raise ValueError(f"block_length={self.block_length} must divide block_size={self.block_size}")
        if not 0 <= self.mask_low < self.mask_high <= 1:
            raise ValueError(f"mask_low={self.mask_low} and mask_high={self.mask_high} must be "
                             "0 <= mask_low < mask_high <= 1")
        if self.loss_weight not in ('elbo', 'flat'):
            raise ValueError(f"loss_weight={self.loss_weight!r} is not one of: elbo, flat")


def block_mask(T, block_length, device=None):
    """Who sees whom in [noisy x, clean x]: (2T, 2T) bool, rows look at columns."""
    block = torch.arange(T, device=device) // block_length
    row, column = block[:, None], block[None, :]
    noisy = torch.cat([row == column, row > column], dim=1)                        # M_BD, M_OBC
    clean = torch.cat([torch.zeros_like(row == column), row >= column], dim=1)     # nothing, M_BC
    return torch.cat([noisy, clean])


def block_causal(start, T, block_length, device=None):
    """Who of the clean tokens start..T-1 sees whom of 0..T-1: (T - start, T) bool."""
    block = torch.arange(T, device=device) // block_length
    return block[start:, None] >= block


class Model(nn.Module):
    bound, packs, revises = 'upper', False, False

    def __init__(self, config):
        super().__init__()
        self.config, self.blank = config, config.vocab_size
        self.gpt = model.GPT(config, causal=False)
        if config.block_length == 1:
            self.bound = 'exact'
        # flat is 1 / E[share of masked tokens]: the loss of a fresh model is ln V
        n = config.block_length
        share = torch.linspace(config.mask_low, config.mask_high, 1001)
        self.flat = 1 / ((share * n).ceil().clamp(1, n) / n).mean().item()

    def forward(self, x, t=None, u=None):
        """x (B, T) -> (loss in nats per token, metrics). Noise may be given: t (B, T / block_length), the
        share of each block that is masked, and u (B, T)."""
        B, n = x.size(0), self.config.block_length
        if t is None:
            blocks = B * (x.size(1) // n)
            t = low_discrepancy(torch.rand((), device=x.device), blocks)
            # torch 2.13 does not compile randperm here
            shuffle = torch.rand(blocks, device=x.device).argsort()
            t = t[shuffle].view(B, -1)
            t = self.config.mask_low + (self.config.mask_high - self.config.mask_low) * t
        if u is None:
            u = torch.rand(x.shape, device=x.device)
        k = (t * n).ceil().clamp(1, n)
        masked = exactly(k.view(-1), u.view(-1, n)).view_as(x)
        nats = self.masked_nats(x, masked)
        weight = n / k if self.config.loss_weight == 'elbo' else torch.full_like(k, self.flat)
        loss = (weight * nats).sum() / x.numel()
        return loss, {'loss_per_masked': nats.detach().sum() / masked.sum()}

    def masked_nats(self, x, masked):
        """Sum over the masked tokens of each block of -log p(x_i | the block's clean tokens, the clean
        blocks before), (B, T / block_length). x (B, T), masked (B, T) bool."""
        T, n = x.size(1), self.config.block_length
        both = torch.cat([x.where(~masked, self.blank), x], dim=1)
        position = torch.arange(T, device=x.device).repeat(2)
        h = self.gpt.trunk(self.gpt.embed(both), block_mask(T, n, x.device), where=position)
        return (token_nats(self.gpt.logits(h[:, :T]), x) * masked).view(x.size(0), -1, n).sum(-1)

    def nats(self, x, n=1):
        """An estimate, with n draws, of the upper bound on -log p(x) in nats: (B,). x (B, T).

        Each block masks exactly k of its tokens, k from the i-th n-th of 1..block_length in draw i.
        Raises ValueError where T is not a multiple of block_length.
        """
        B, size, total = x.size(0), self.config.block_length, 0
        if x.size(1) % size:
            raise ValueError(f"{x.size(1)} tokens are not whole blocks of {size}")
        for i in range(n):
            v = (i + torch.rand(B * x.size(1) // size, device=x.device)) / n
            k = (v * size).long().clamp(max=size - 1) + 1
            masked = exactly(k, torch.rand(x.shape, device=x.device).view(-1, size)).view_as(x)
            total = total + (size / k.view(B, -1) * self.masked_nats(x, masked)).sum(-1)
        return total / n

    def read(self, x, cache):
        """Take the clean blocks x (B, t) into the cache."""
        end = len(cache) + x.size(1)
        self.gpt(x, block_causal(len(cache), end, self.config.block_length, x.device), cache)

    def denoise_block(self, xt, cache):
        """log p(x0 | noisy block xt, cache), (B, t, V) float32, normalised; the cache stays as it is."""
        before = len(cache)
        logp = self.gpt(xt, cache=cache).float().log_softmax(-1)
        cache.trim(before)
        return logp

    @torch.no_grad()
    def sample(self, xt, steps, rule='', **how):
        """Generator of canvases (B, T), one a network call but for the reading of clean blocks.

        xt starts with the given tokens; V is where to write. steps: of the whole text, shared out among the
        blocks to be written, at least one each. The rule works inside a block (see unmask.py); by default
        random, with its even counts: ancestral steps often reveal several of a block's few tokens at once.
        """
        if how.get('cfg'):
            raise ValueError("cfg is not for block diffusion, whose prompt is in the cache")
        n, cache = self.config.block_length, model.Cache(self.config.n_layer)
        first = prompt_length(xt, self.blank) // n * n
        if first:
            self.read(xt[:, :first], cache)
        blocks = range(first, xt.size(1), n)
        for begin, share in zip(blocks, shares(steps, len(blocks))):
            denoise = lambda block, t: self.denoise_block(block, cache)
            for block in unmask(denoise, xt[:, begin:begin + n], self.blank, share, rule or 'random', **how):
                xt = torch.cat([xt[:, :begin], block, xt[:, begin + n:]], dim=1)
                yield xt
            if begin + n < xt.size(1):
                self.read(xt[:, begin:begin + n], cache)
