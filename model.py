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
fewer heads of keys and values than of queries if asked for (2305.13245); Qwen's is a variant.
`arch='ddit'` is the body of MDLM and SEDD (2406.07524): GPT-2's with rotary positions, no biases in attention
and a head of its own. hub/ reads and writes weights of these three.

Shapes: B sequences, T tokens, V = vocab_size, C = n_embd, H = n_head, D = C / H.
The embedding has V + 1 rows. Row V is [MASK] for a denoiser and [BOS] for an autoregressive model. The head
reads only the V real tokens, so [MASK] can never be predicted, and both twins have exactly the same
parameters. Three switches serve single objectives: `timed` tells every block the noise level
(parts/times.py), `outputs` = V + 1 lets the head predict [MASK] too, `marks` = 2 makes room for [MASK] and
[BOS] both.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import Count, Fixed, Natural, NonNegative, Positive, ShareBelow1
from parts.neighbours import Neighbours, beside, seen_beside
from parts.times import Cosines, Waves


@dataclass
class Config:
    # network
    vocab_size: Fixed[Count] = 65   # V, set from the data
    block_size: Count = 256         # T, the longest sequence
    n_layer: Count = 6              # blocks
    n_head: Count = 6               # attention heads, must divide n_embd
    n_embd: Count = 384             # width C
    dropout: ShareBelow1 = 0.0      # on the residual branches and the embedding
    arch: Literal['ours', 'gpt2', 'llama', 'ddit'] = 'ours'  # ours | gpt2 | llama | ddit
    n_kv_head: Natural = 0          # heads of keys and values, must divide n_head; 0: n_head
    n_inner: Natural = 0            # width of the MLPs; 0: 4 C
    # set by the weights of others
    rope_base: Fixed[Positive] = 10000.0  # of the rotary positions
    rope_factor: Fixed[Positive] = 1.0    # slows the slow rotations, for a longer context (LLaMA 3.2: 32)
    rope_trained: Fixed[Natural] = 0      # slow are those of fewer than 4 turns in this many tokens; 0: all
    norm_eps: Fixed[NonNegative] = 1e-5   # of the norms of gpt2 and llama
    tied: Fixed[bool] = False             # llama: is the head the embedding? gpt2: always
    head_width: Fixed[Natural] = 0        # D; 0: C / H
    qkv_bias: Fixed[bool] = False         # llama: biases on queries, keys and values (Qwen2)
    qk_norm: Fixed[bool] = False          # llama: a norm on the queries and keys of every head (Qwen3)
    time_as_t: Fixed[bool] = False        # ddit: the network is told t, not sigma (GIDD)
    old_mask: Fixed[int] = -1             # the id of others' [MASK], if among the V tokens: never written

    def __post_init__(self):
        if self.n_embd % self.n_head and not self.head_width:
            raise ValueError(f"n_head={self.n_head} must divide n_embd={self.n_embd}")
        if self.n_kv_head and self.arch in ('gpt2', 'ddit'):
            raise ValueError(f"n_kv_head={self.n_kv_head} is not for arch={self.arch}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.arch != 'gpt2' and self.width % 2:
            raise ValueError(f"rotary positions need an even head width, not n_embd/n_head={self.width}")
        for name in ('tied', 'qkv_bias', 'qk_norm'):
            if getattr(self, name) and self.arch != 'llama':
                raise ValueError(f"{name}=True is for arch=llama, not for arch={self.arch}")

    @property
    def width(self):
        return self.head_width or self.n_embd // self.n_head


def rotary_table(length, width, base=10000.0, factor=1.0, trained=0):
    """cos and sin of the rotary angles, (length, width/2) each, float32 (arXiv 2104.09864).
    factor: pairs that turn less than once in `trained` tokens are slowed by it, those that turn more than 4
    times are not, those between in part (LLaMA 3.1, 2407.21783 and its code). trained=0: all are slowed."""
    freq = base ** (-torch.arange(0, width, 2, dtype=torch.float32, device='cpu') / width)
    turns = trained * freq / (2 * math.pi)
    kept = ((turns - 1) / 3).clamp(0, 1)
    freq = freq * (kept + (1 - kept) / factor)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device='cpu'), freq)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[j], x[j + D/2]) by its position's angle. x (..., T, D); cos, sin (..., T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


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


class Norm(nn.Module):
    """RMSNorm without gain; LayerNorm of gpt2 and ddit; LLaMA's RMSNorm."""

    def __init__(self, config, width=0):
        super().__init__()
        self.shape, self.eps = (width or config.n_embd,), config.norm_eps
        self.weight = nn.Parameter(torch.ones(self.shape)) if config.arch != 'ours' else None
        layer_norm = config.arch in ('gpt2', 'ddit')
        self.bias = nn.Parameter(torch.zeros(self.shape)) if layer_norm else None

    def forward(self, x):
        if self.weight is None:
            return F.rms_norm(x, self.shape)
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight.type_as(x), self.eps)
        return F.layer_norm(x, self.shape, self.weight.type_as(x), self.bias.type_as(x), self.eps)


class Attention(nn.Module):
    def __init__(self, config, causal):
        super().__init__()
        self.causal, self.ours, self.rotary = causal, config.arch == 'ours', config.arch != 'gpt2'
        self.n_head, self.width = config.n_head, config.width
        self.n_kv_head = config.n_kv_head or config.n_head
        heads = self.n_head + 2 * self.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * self.width, bias=config.qkv_bias or not self.rotary)
        self.proj = nn.Linear(self.n_head * self.width, config.n_embd, bias=not self.rotary)
        self.q_norm, self.k_norm = (Norm(config, self.width) if config.qk_norm else None for _ in range(2))
        if self.ours:
            self.gate = nn.Linear(config.n_embd, config.n_head, bias=False)
            self.mix = nn.Parameter(torch.zeros(self.n_kv_head))

    def forward(self, x, rotary, mask, cache, first):
        """x (B, T, C) -> (B, T, C). first, passed on: the first block's values (B, H, T, D); there None."""
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.width).transpose(1, 2)
        # (B, n_head, T, D), twice (B, n_kv_head, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        first = v if first is None else first
        if self.ours:
            v = v + self.mix.type_as(v)[:, None, None] * first
            q, k = F.rms_norm(q, q.shape[-1:]).type_as(v), F.rms_norm(k, k.shape[-1:]).type_as(v)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self, k, v)
        y = attention(q, k, v, self.causal, mask)
        if self.ours:  # a head counts 0 to 2 times, at first once
            y = y * (2 * self.gate(x).sigmoid()).transpose(1, 2)[..., None]
        return self.proj(y.transpose(1, 2).reshape(B, T, -1)), first


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x):
    return F.gelu(x, approximate='tanh')


ACTS = dict(ours=lambda x: F.relu(x).square(), gpt2=gelu, llama=swiglu, ddit=gelu)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner, bias = config.n_inner or 4 * config.n_embd, config.arch in ('gpt2', 'ddit')
        self.act = ACTS[config.arch]
        self.fc = nn.Linear(config.n_embd, inner * (1 + (config.arch == 'llama')), bias=bias)
        self.proj = nn.Linear(inner, config.n_embd, bias=bias)

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    def __init__(self, config, causal, time_width):
        super().__init__()
        ours = config.arch == 'ours'
        self.norm1, self.attn = Norm(config), Attention(config, causal)
        self.norm2, self.mlp = Norm(config), MLP(config)
        self.near1, self.near2 = (Neighbours(config, causal) if ours else None for _ in range(2))
        self.drop = nn.Dropout(config.dropout)
        self.changes = 6 if config.arch == 'ddit' else 4  # scales and shifts; gates
        self.film = nn.Linear(time_width, self.changes * config.n_embd) if time_width else None

    def forward(self, x, rotary, mask, cache, near, time, first):
        film = self.film(time).chunk(self.changes, dim=-1) if self.film else []  # (B, 1 or T, C) each
        scale1, shift1, scale2, shift2, gate1, gate2 = (*film, *[None] * 6)[:6]
        h = self.read(self.norm1(x), scale1, shift1, self.near1, near, cache)
        h, first = self.attn(h, rotary, mask, cache, first)
        x = x + gated(self.drop(h), gate1)
        h = self.read(self.norm2(x), scale2, shift2, self.near2, near, cache)
        return x + gated(self.drop(self.mlp(h)), gate2), first

    def read(self, h, scale, shift, neighbours, near, cache):
        h = h if scale is None else h * (1 + scale) + shift
        return h if neighbours is None else neighbours(h, near, cache)


def gated(h, gate):
    return h if gate is None else h * (1 + gate)


class GPT(nn.Module):
    def __init__(self, config, causal, timed=False, outputs=0, tokens=True, marks=1):
        """timed: the blocks take a time; outputs: of the head, vocab_size (0) or one more, [MASK]; marks:
        rows of the embedding beyond the vocabulary; tokens=False: no embedding and head, just `trunk`."""
        super().__init__()
        self.config, self.causal, self.outputs = config, causal, outputs or config.vocab_size
        self.embed = nn.Embedding(config.vocab_size + marks, config.n_embd) if tokens else None
        self.pos = nn.Embedding(config.block_size, config.n_embd) if config.arch == 'gpt2' else None
        self.drop = nn.Dropout(config.dropout)
        ddit, own = config.arch == 'ddit', tokens and config.arch != 'gpt2' and not config.tied
        self.time = None if not timed else Waves(config.time_as_t) if ddit else Cosines()
        width = self.time.width if timed else 0
        self.blocks = nn.ModuleList(Block(config, causal, width) for _ in range(config.n_layer))
        self.norm, self.film = Norm(config), nn.Linear(width, 2 * config.n_embd) if timed and ddit else None
        self.head = nn.Linear(config.n_embd, self.outputs, bias=ddit) if own else None
        cos, sin = rotary_table(config.block_size, config.width, config.rope_base, config.rope_factor,
                                config.rope_trained)
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
        time = None if time is None else self.time(time if time.dim() == 2 else time[:, None])
        near = near or (beside if mask is None else seen_beside(mask, h.size(1)))
        first = None
        for block in self.blocks:
            h, first = block(h, rotary, mask, cache, near, time, first)
        if cache is not None:
            cache.length += h.size(1)
        scale, shift = (None, None) if self.film is None else self.film(time).chunk(2, dim=-1)
        return self.norm(h) if scale is None else self.norm(h) * (1 + scale) + shift

    def logits(self, h):
        """Hidden states (..., C) -> logits (..., V); of row V only if the model was built with it."""
        return F.linear(h, self.embed.weight[:self.outputs]) if self.head is None else self.head(h)
