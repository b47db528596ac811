"""
One transformer for every language model in this repository.

`causal` is the whole difference between a GPT and a denoiser: with the causal mask position i sees x[:i+1]
and predicts the next token; without it every position sees every other and predicts its own token.

The default architecture ("ours") is what trained fastest at small scale (NOTES.md):
  rotary positions (arXiv 2104.09864), RMSNorm without gain (1910.07467), normalised queries and keys
  (2302.05442), gated heads (2505.06708), value residual (2410.17897), ReLU^2 MLP and convolutions over
  neighbouring tokens (2109.08668), no biases, and projections into the residual stream that start at zero,
  so that at first a block changes nothing and the prediction is uniform. Muon trains the matrices of the
  blocks, AdamW everything else (parts/muon.py).
`arch='gpt2'` is GPT-2: learned positions, LayerNorm with bias, GELU, biases, the head tied to the embedding.
`arch='llama'` is LLaMA (2302.13971): rotary positions, RMSNorm with gain, SwiGLU (2002.05202), no biases,
fewer heads of keys and values than of queries if asked for (2305.13245). hub/ reads weights of both.

Shapes: B sequences, T tokens, V = vocab_size, C = n_embd, H = n_head, D = C / H.
The embedding has V + 1 rows. Row V is [MASK] for a denoiser and [BOS] for an autoregressive model. The head
reads only the V real tokens, so [MASK] can never be predicted, and both twins have exactly the same
parameters. Three switches serve single objectives: `timed` tells every block the noise level (FiLM, arXiv
1709.07871; DiT 2212.09748), `outputs` = V + 1 lets the head predict [MASK] too, `marks` = 2 makes room for
[MASK] and [BOS] both.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Count, Fixed, Natural, NonNegative, Positive, ShareBelow1


@dataclass
class Config:
    # network
    vocab_size: Fixed[Count] = 65   # V, set from the data
    block_size: Count = 256         # T, the longest sequence
    n_layer: Count = 6              # blocks
    n_head: Count = 6               # attention heads, must divide n_embd
    n_embd: Count = 384             # width C
    dropout: ShareBelow1 = 0.0      # on the residual branches and the embedding
    arch: Literal['ours', 'gpt2', 'llama'] = 'ours'  # ours | gpt2 | llama
    n_kv_head: Natural = 0          # heads of keys and values, must divide n_head; 0: n_head
    n_inner: Natural = 0            # width of the MLPs; 0: 4 C
    # set by the weights of others
    rope_base: Fixed[Positive] = 10000.0  # of the rotary positions
    rope_factor: Fixed[Positive] = 1.0    # slows the slow rotations, for a longer context (LLaMA 3.2: 32)
    rope_trained: Fixed[Natural] = 0      # slow are those of fewer than 4 turns in this many tokens; 0: all
    norm_eps: Fixed[NonNegative] = 1e-5   # of the norms of gpt2 and llama
    tied: Fixed[bool] = False             # llama: is the head the embedding? gpt2: always

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} must divide n_embd={self.n_embd}")
        if self.n_kv_head and self.arch == 'gpt2':
            raise ValueError(f"n_kv_head={self.n_kv_head} is not for arch=gpt2")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.arch != 'gpt2' and self.n_embd // self.n_head % 2:
            raise ValueError("rotary positions need an even head width, not "
                             f"n_embd/n_head={self.n_embd // self.n_head}")
        if self.tied and self.arch == 'ours':
            raise ValueError("tied=True is for arch=llama: ours has a head of its own, gpt2 never has")


def rotary_table(length, width, base=10000.0, factor=1.0, trained=0):
    """cos and sin of the rotary angles, (length, width/2) each, float32 (arXiv 2104.09864).
    factor: pairs that turn less than once in `trained` tokens are slowed by it, those that turn more than 4
    times are not, those between in part (LLaMA 3.1, 2407.21783 and its code). trained=0: all are slowed."""
    freq = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    turns = trained * freq / (2 * math.pi)
    kept = ((turns - 1) / 3).clamp(0, 1)
    freq = freq * (kept + (1 - kept) / factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[j], x[j + D/2]) by its position's angle. x (..., T, D); cos, sin (..., T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


TIME_WAVES = 32  # features of the time


def cosines(t):
    """Time t (B, n) in [0, 1] -> cos(pi k t), k < TIME_WAVES: (B, n, TIME_WAVES) float32."""
    return torch.cos(math.pi * t.float()[..., None] * torch.arange(TIME_WAVES, device=t.device))


def attention(q, k, v, causal, mask=None):
    """softmax(q k' / sqrt(D)) v of q (B, H, t, D) and k, v (B, H / r, T, D), t <= T: r heads of queries in a
    row share one of keys and values. causal: query i, at position T - t + i, sees the keys up to itself.
    mask: bool, broadcast to (B, H, t, T), True is seen."""
    t, T, r = q.size(2), k.size(2), q.size(1) // k.size(1)
    if r > 1:
        k, v = k.repeat_interleave(r, 1), v.repeat_interleave(r, 1)
    # SDPA's backward on CPUs is 2 to 5 times slower (NOTES.md)
    manual = q.device.type == 'cpu' and q.requires_grad
    if causal and t > 1 and (manual or t < T or mask is not None):
        past = torch.ones(t, T, dtype=torch.bool, device=q.device).tril(T - t)
        causal, mask = False, past if mask is None else past & mask
    if manual:
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).type_as(v) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and t > 1)


class Cache:
    """What the modules of a network keep of the tokens already read, for sampling from left to right."""

    def __init__(self):
        self.length, self.kept = 0, {}

    def append(self, module, *new):
        """Tensors (B, ..., t, .) of t new tokens -> (B, ..., T, .) of all that `module` was given so far."""
        if module in self.kept:
            new = tuple(torch.cat(old_new, dim=-2) for old_new in zip(self.kept[module], new))
        self.kept[module] = new
        return new

    def trim(self, length):
        """Forget all but the first `length` tokens."""
        self.length = length
        self.kept = {module: tuple(x[..., :length, :] for x in kept) for module, kept in self.kept.items()}


TAPS = 5  # of the convolutions over neighbouring tokens


def beside(h, first, t):
    """What stands beside each of the last t tokens of h (B, T, C), `first` to first + TAPS - 1 places to the
    right: TAPS tensors (B, t, C), 0 beyond the ends."""
    there = F.pad(h, (0, 0, -first, first + TAPS - 1))[:, -(t + TAPS - 1):]
    return [there[:, i:i + t] for i in range(TAPS)]


def seen_beside(mask, t):
    """`beside` for t tokens whose attention has a mask, broadcast to (B, 1, t, T): 0, too, where a token does
    not see its neighbour."""
    mask = mask.expand(*mask.shape[:-2], t, -1)
    mask = mask[:, 0] if mask.dim() == 4 else mask
    own = mask.size(-1) - t  # the key of the first query

    def seen(j):
        keys, before = mask.diagonal(own + j, -2, -1), min(t, max(0, -own - j))  # before all keys
        return F.pad(keys, (before, t - before - keys.size(-1)))[..., None]

    def near(h, first, t):
        return [x * seen(first + i) for i, x in enumerate(beside(h, first, t))]
    return near


class Neighbours(nn.Module):
    """h + sum over j of taps_j * (h, j places to the right): a depthwise convolution, zero at first. j is -4
    to 0 in a causal network, else -2 to 2 (Primer arXiv 2109.08668; Canon layers, Allen-Zhu 2025)."""

    def __init__(self, config, causal):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(TAPS, config.n_embd))
        self.first = 1 - TAPS if causal else -(TAPS // 2)

    def forward(self, h, near, cache):
        there = h if cache is None else cache.append(self, h)[0][:, -(h.size(1) + TAPS - 1):]
        return h + sum(tap * x for tap, x in zip(self.taps.type_as(h), near(there, self.first, h.size(1))))


class Norm(nn.Module):
    """RMSNorm without gain; GPT-2's LayerNorm; LLaMA's RMSNorm."""

    def __init__(self, config):
        super().__init__()
        self.shape, self.eps = (config.n_embd,), config.norm_eps
        self.weight = nn.Parameter(torch.ones(self.shape)) if config.arch != 'ours' else None
        self.bias = nn.Parameter(torch.zeros(self.shape)) if config.arch == 'gpt2' else None

    def forward(self, x):
        if self.weight is None:
            return F.rms_norm(x, self.shape)
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight.type_as(x), self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.causal, self.ours, self.rotary = causal, config.arch == 'ours', config.arch != 'gpt2'
        self.n_head, self.width = config.n_head, config.n_embd // config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        heads = self.n_head + 2 * self.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * self.width, bias=not self.rotary)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=not self.rotary)
        if self.ours:
            self.gate = nn.Linear(config.n_embd, config.n_head, bias=False)
            self.mix = nn.Parameter(torch.zeros(self.n_kv_head))

    def forward(self, x, rotary, mask, cache, first):
        """x (B, T, C) -> (B, T, C). first, passed on: the first block's values (B, H, T, D); there None."""
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, -1, self.width).transpose(1, 2)
        # (B, n_head, T, D), twice (B, n_kv_head, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        first = v if first is None else first
        if self.ours:
            v = v + self.mix.type_as(v)[:, None, None] * first
            q, k = F.rms_norm(q, q.shape[-1:]).type_as(v), F.rms_norm(k, k.shape[-1:]).type_as(v)
        if self.rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self, k, v)
        y = attention(q, k, v, self.causal, mask)
        if self.ours:  # a head counts 0 to 2 times, at first once
            y = y * (2 * self.gate(x).sigmoid()).transpose(1, 2)[..., None]
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), first


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTS = dict(ours=lambda x: F.relu(x).square(), gpt2=lambda x: F.gelu(x, approximate='tanh'), llama=swiglu)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner, bias = config.n_inner or 4 * config.n_embd, config.arch == 'gpt2'
        self.act = ACTS[config.arch]
        self.fc = nn.Linear(config.n_embd, inner * (1 + (config.arch == 'llama')), bias=bias)
        self.proj = nn.Linear(inner, config.n_embd, bias=bias)

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    def __init__(self, config, causal, timed):
        super().__init__()
        ours = config.arch == 'ours'
        self.norm1, self.attn = Norm(config), Attention(config, causal)
        self.norm2, self.mlp = Norm(config), MLP(config)
        self.near1, self.near2 = (Neighbours(config, causal) if ours else None for _ in range(2))
        self.drop = nn.Dropout(config.dropout)
        self.film = nn.Linear(TIME_WAVES, 4 * config.n_embd) if timed else None

    def forward(self, x, rotary, mask, cache, near, time, first):
        film = [None] * 4 if self.film is None else self.film(time).chunk(4, dim=-1)  # (B, 1 or T, C) each
        h = self.read(self.norm1(x), *film[:2], self.near1, near, cache)
        h, first = self.attn(h, rotary, mask, cache, first)
        x = x + self.drop(h)
        h = self.read(self.norm2(x), *film[2:], self.near2, near, cache)
        return x + self.drop(self.mlp(h)), first

    def read(self, h, scale, shift, neighbours, near, cache):
        h = h if scale is None else h * (1 + scale) + shift
        return h if neighbours is None else neighbours(h, near, cache)


class GPT(nn.Module):
    def __init__(self, config, causal, timed=False, outputs=0, tokens=True, marks=1):
        """timed: the blocks take a time; outputs: of the head, vocab_size (0) or one more, [MASK]; marks:
        rows of the embedding beyond the vocabulary; tokens=False: no embedding and head, just `trunk`."""
        super().__init__()
        self.config, self.causal, self.outputs = config, causal, outputs or config.vocab_size
        self.embed = nn.Embedding(config.vocab_size + marks, config.n_embd) if tokens else None
        self.pos = nn.Embedding(config.block_size, config.n_embd) if config.arch == 'gpt2' else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, causal, timed) for _ in range(config.n_layer))
        self.norm = Norm(config)
        own = tokens and config.arch != 'gpt2' and not config.tied
        self.head = nn.Linear(config.n_embd, self.outputs, bias=False) if own else None
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head, config.rope_base,
                                config.rope_factor, config.rope_trained)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        ours, at_zero = self.config.arch == 'ours', ('proj.weight', 'head.weight', 'gate.weight', 'taps')
        for name, p in self.named_parameters():
            if name.endswith('bias') or 'film.' in name or ours and name.endswith(at_zero):
                nn.init.zeros_(p)
            elif ours and p.dim() > 1:
                nn.init.normal_(p, std=1.0 if name == 'embed.weight' else p.size(1) ** -0.5)
            elif p.dim() > 1:  # gains stay 1. GPT-2: 0.02, and 0.02 / sqrt(2 L) into the residual stream
                into = (2 * self.config.n_layer) ** -0.5 if name.endswith('proj.weight') else 1
                nn.init.normal_(p, std=0.02 * into)

    def forward(self, x, mask=None, cache=None, time=None, where=None, only=None):
        """Logits (B, T, V) of tokens x (B, T), or (N, V) of N of them, `only` (B, T) bool; see `trunk`."""
        h = self.trunk(self.embed(x), mask, cache, time, where)
        return self.logits(h if only is None else h[only])

    def trunk(self, h, mask=None, cache=None, time=None, where=None, near=None):
        """Embeddings h (B, T, C) -> normalised hidden states (B, T, C).
        mask: bool, broadcast to (B, H, T, T), True where a query may see a key. With a cache, h continues
        what was read before. time: (B,), or (B, T) one per token, in [0, 1], if it is timed. where: the
        positions (T,) or (B, T) of the tokens, if not one after the other. near: as `beside`, if a token's
        neighbours are not those in h that it sees. Raises ValueError beyond block_size."""
        past = 0 if cache is None else cache.length
        end = past + h.size(1)
        if end > self.config.block_size and where is None:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}")
        where = slice(past, end) if where is None else where
        if self.config.arch == 'ours':
            h = F.rms_norm(h, h.shape[-1:])
        if self.pos is not None:
            h = h + self.pos.weight[where]
        h, rotary = self.drop(h), (self.cos[where], self.sin[where])
        if rotary[0].dim() == 3:  # positions of every row, for all heads
            rotary = rotary[0][:, None], rotary[1][:, None]
        waves = None if time is None else cosines(time if time.dim() == 2 else time[:, None])
        near = near or (beside if mask is None else seen_beside(mask, h.size(1)))
        first = None
        for block in self.blocks:
            h, first = block(h, rotary, mask, cache, near, waves, first)
        if cache is not None:
            cache.length += h.size(1)
        return self.norm(h)

    def logits(self, h):
        """Hidden states (..., C) -> logits (..., V); of row V only if the model was built with it."""
        return F.linear(h, self.embed.weight[:self.outputs]) if self.head is None else self.head(h)
