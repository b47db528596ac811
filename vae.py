"""
A sentence VAE made of one causal language model: a window of text becomes a few vectors, and text again.

Encoder and decoder are the same frozen model under two adapters (AdaVAE arXiv 2205.05862; parts/lora.py).
The encoder reads a window x of at most W tokens without the causal mask, and with it n learned queries that
attend to the window in every layer. From the last hidden state h_k of query k comes

    mu_k = w_e h_k,    z = mu + b eps ~ q(z | x),    (n, d): the latents of the window,

where b is 1 or learned. The decoder writes the window after its latents and the text before it, the prefix:

    p(x | z, prefix) = prod_i p(x_i | [w_d z_1 ... w_d z_n] prefix [BOS] x_<i).

Of n equal segments of the window, query k has the position of the middle of the k-th, latent k of its start.

The loss is E -log p(x | z, prefix) + beta KL(q(z | x) || N(0, I)). At beta = 1, with nothing hidden from the
decoder and no noise added, it is the negative ELBO (1312.6114), an upper bound on -log p(x | prefix); n
draws weighted by importance bound it more tightly (1509.00519). A decoder that is a language model can do
without z, and then z says nothing (posterior collapse, 1511.06349). Against that: query k sits at its
segment, any share of the window's tokens is hidden from the decoder (these two decide, NOTES.md), beta is
small and rises slowly, the prefix is dropped in half of the rows, no decoder noise before beta is full.

In half of the rows z gets further noise of standard deviation s, and the decoder is told s: the decoder
noise. At s = 0 it spells out what z says; at a large s it writes what a language model would, with z as a
hint. latent.py needs this, whose z are never quite those of a text.

The id V, the base's [BOS], stands wherever there is no token.
"""
import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from ar import prompt_length, token_nats
from configurator import Count, Filename, Fixed, Natural, NonNegative, Share, ShareBelow1
from parts import clock, lora
from parts.gaussian import full_precision, log_normal, mutual_information
from text.windows import OTHER, Passages, begins, last, place, sentence_ends, tokens_before
from unmask import sample_tokens

RULES = {}  # of sampling: there is one way


@dataclass
class Config(model.Config):
    # network
    block_size: Count = 48       # W, tokens of a window, and of the prefix before it
    base: Filename = ''          # the autoregressive model to build on: a folder, a file, gpt2 ...
    base_context: Fixed[Count] = 128  # its block_size, at least 2 W
    whole: bool = False          # train two copies of the base instead of adapters
    lora_rank: Count = 32        # of the adapters
    lora_alpha: NonNegative = 32.0  # adapters are scaled by lora_alpha / lora_rank
    lora_dropout: ShareBelow1 = 0.0  # dropout on what enters the adapters
    lora_targets: str = 'qkv,proj,fc'  # the matrices that have an adapter
    # sentence VAE
    sentences: bool = False      # windows end where sentences do; False: all have W tokens
    n_latent: Count = 8          # n, vectors of a window
    d_latent: Count = 64         # d, width of a vector
    pooled: bool = False         # pool the last layer by n softmaxes instead: no queries in the layers
    learned_variance: bool = False  # of the posterior; False: 1
    # sentence VAE, training only
    kl_weight: NonNegative = 0.01  # beta
    kl_warmup: Natural = 1000    # optimizer steps in which it rises from 0, as a sine squared
    free_bits: NonNegative = 0.0  # nats that each dimension may tell at no cost (1606.04934)
    prefix_drop: Share = 0.5     # share of rows that do not see the prefix
    word_dropout: Share = 1.0    # largest share of a row hidden from the decoder (1511.06349)
    latent_noise: NonNegative = 4.0  # largest decoder noise, in half of the rows, after kl_warmup
    short: Share = 0.0           # share of windows cut to a random length

    def __post_init__(self):
        super().__post_init__()
        if 2 * self.block_size > self.base_context:
            raise ValueError(f"block_size={self.block_size}: prefix and window are {2 * self.block_size} "
                             f"tokens, more than the base's context of {self.base_context}")
        if self.n_latent > self.block_size:
            raise ValueError(f"n_latent={self.n_latent} must be in 1 ... block_size={self.block_size}")
        if self.dropout and not self.whole:
            raise ValueError(f"dropout={self.dropout} is for whole=True: a frozen base has none, "
                             f"adapters have lora_dropout")


def knobs_of_base(config):
    """The knobs that a VAE takes over from the config of its base, a dict."""
    taken = {f.name for f in fields(model.Config)} - {'block_size', 'dropout'}
    return dict(base_context=config['block_size']) | {k: v for k, v in config.items() if k in taken}


# ---- latents ----------------------------------------------------------------------------------------------

def kl_to_prior(mu, logvar):
    """KL(N(mu, e^logvar) || N(0, 1)) in nats, of each dimension: of the shape of mu."""
    return (mu.square() + logvar.exp() - 1 - logvar) / 2


def beta(steps, weight, warmup):
    """The KL weight after `steps` (0-d tensor) optimizer steps."""
    return weight * torch.sin(math.pi / 2 * (steps / max(1, warmup)).clamp(max=1)).square()


def active_units(mu):
    """How many dimensions of mu (B, n, d) tell windows apart: their variance over windows is above 0.01."""
    return (mu.var(0) > 0.01).sum().to(mu.dtype)


class Model(nn.Module):
    bound, takes, revises, any_length = 'upper', (), False, True
    reading, verbs = {}, ()
    orders, base, selects, measures = (), 'ar', False, True  # best at beta < 1 is not the lowest bound
    gpt = property(lambda self: self.decoder)  # the network whose calls are counted

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id, c = config, config.vocab_size, config
        n, d, C = c.n_latent, c.d_latent, c.n_embd
        sizes = {f.name: getattr(c, f.name) for f in fields(model.Config)} | dict(block_size=c.base_context)
        base = model.GPT(model.Config(**sizes), causal=True)
        low_rank = c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_targets.split(',')
        pair = (base, copy.deepcopy(base)) if c.whole else (lora.adapt(base, *low_rank) for _ in range(2))
        self.encoder, self.decoder = pair
        for block in self.encoder.blocks:
            block.attn.causal = False
        self.encoder.head = None  # it predicts nothing
        self.queries = nn.Parameter(torch.randn(n, C) * (C ** -0.5 if c.pooled else 1))
        self.w_e, self.w_d = nn.Linear(C, d), nn.Linear(d, C)
        self.w_var = nn.Linear(C, d) if c.learned_variance else None
        self.noise_embedding = nn.Parameter(torch.zeros(C))  # of the decoder noise
        nn.init.orthogonal_(self.w_e.weight)
        self.w_d.weight.data.copy_(self.w_e.weight.T)
        for p in (self.w_e.bias, self.w_d.bias, *(self.w_var.parameters() if self.w_var else ())):
            nn.init.zeros_(p)
        self.clock = clock.Clock()
        starts = torch.arange(n, device='cpu') * c.block_size // n
        self.register_buffer('segments', starts, persistent=False)
        self.register_buffer('centres', starts + c.block_size // (2 * n), persistent=False)
        self.register_buffer('mean', torch.zeros(n, d))  # of mu, see `measure`
        self.register_buffer('std', torch.ones(n, d))
        self.register_buffer('blur', torch.ones(n, d))   # standard deviation of q(z | x)
        self.register_buffer('ends', torch.zeros(c.vocab_size, dtype=torch.int8))  # see text/windows.py

    def inherit(self, weights, pieces):
        """Take over the weights of the base, a state dict of ar.Model. pieces: the bytes of every token.
        Raises ValueError."""
        self.ends.copy_(sentence_ends(pieces))
        weights = {name.removeprefix('gpt.'): p for name, p in weights.items()}
        lora.load_base(self.encoder, weights)
        lora.load_base(self.decoder, weights)

    def cut(self, tokens, end, folder='', stride=1, n_prev=0):
        """The windows of a stream of tokens (text/rows.py): sentences, or W tokens each, `stride` apart for
        training and side by side for evaluation (no folder). end: the id between documents, or None."""
        W, ends = self.config.block_size, self.ends if self.config.sentences else None
        return Passages(tokens, W, self.mask_id, stride if folder else W, ends, end, n_prev)

    def windows_of(self, ids, n=0, right=False):
        """The last n windows (0: all) of a text's ids (L,): (n, W); right: see text.windows.last."""
        ends = self.ends if self.config.sentences else None
        return last(ids, n, self.config.block_size, self.mask_id, ends, right)

    # ---- encoder: q(z | x) ----

    def hidden(self, x):
        """The last hidden states (B, n, C) of the queries over windows x (B, W)."""
        seen, h = x != self.mask_id, self.encoder.embed(x)
        if self.config.pooled:
            seen = seen | ~seen.any(-1, keepdim=True)  # a softmax over nothing is NaN
            h = self.encoder.trunk(h, seen[:, None, None])
            scores = (self.queries @ h.transpose(1, 2)).float()  # (B, n, W)
            scores = scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
            return scores.softmax(-1).type_as(h) @ h
        where = torch.cat([self.centres, torch.arange(x.size(1), device=x.device)])
        h = torch.cat([self.queries.expand(len(x), -1, -1).type_as(h), h], 1)
        seen = F.pad(seen, (len(self.queries), 0), value=True)
        return self.encoder.trunk(h, seen[:, None, None], where=where)[:, :len(self.queries)]

    def posterior(self, x):
        """mu and log variance (B, n, d) of q(z | x), float32."""
        h = self.hidden(x)
        mu = self.w_e(h).float()
        return mu, torch.zeros_like(mu) if self.w_var is None else self.w_var(h).float()

    def encode(self, x):
        """Windows x (B, W) -> latents (B, n, d), of mean 0 and variance 1 a dimension, see `measure`."""
        with full_precision(x):  # a small std makes small errors large
            return (self.posterior(x)[0] - self.mean) / self.std

    def raw(self, latents):
        """Latents as `encode` gives them -> z as the decoder takes it."""
        return latents * self.std + self.mean

    @torch.no_grad()
    def measure(self, x):
        """Set the scale of `encode` by windows x (N, W); dimensions that hardly vary stay small."""
        training = self.training
        self.eval()
        mu, logvar = map(torch.cat, zip(*(self.posterior(part) for part in x.split(256))))
        self.mean.copy_(mu.mean(0))
        self.std.copy_(mu.std(0).clamp(min=0.05))
        self.blur.copy_(logvar.exp().mean(0).sqrt())
        self.train(training)

    # ---- decoder: p(x | z, prefix) ----

    def opening(self, z, prefix, decoder_noise=0.0):
        """What stands before the window: embeddings (B, n + P, C), which of them are seen (B, n + P), and
        their positions (n + P,). z (B, n, d), prefix (B, P); decoder_noise: a number or (B, 1, 1)."""
        P, s = prefix.size(1), torch.as_tensor(decoder_noise, device=z.device)
        h = self.w_d(z * (1 + s * s).rsqrt()) + s / (1 + s) * self.noise_embedding
        h = torch.cat([h, self.decoder.embed(prefix)], 1)
        where = torch.cat([P + self.segments, torch.arange(P, device=z.device)])
        return h, F.pad(prefix != self.mask_id, (z.size(1), 0), value=True), where

    def logits(self, z, x, prefix, decoder_noise=0.0):
        """What z (B, n, d), prefix (B, P) and x_<i predict for x_i: (B, T, V). x (B, T)."""
        h, seen, where = self.opening(z, prefix, decoder_noise)
        seen = F.pad(seen, (0, x.size(1)), value=True)
        h = torch.cat([h, self.decoder.embed(F.pad(x[:, :-1], (1, 0), value=self.mask_id))], 1)
        where = torch.cat([where, prefix.size(1) + torch.arange(x.size(1), device=x.device)])
        h = self.decoder.trunk(h, seen[:, None, None], where=where)
        return self.decoder.logits(h[:, -x.size(1):])

    def scored(self, logits, x):
        """-log p in nats, (B, W), of the tokens that windows x (B, W) hold, from logits (B, W, V). That a
        sentence ends has a probability, too: that of all tokens that would begin another."""
        text, x = x != self.mask_id, x.clamp(max=self.mask_id - 1)
        nats = token_nats(logits, x) * text
        if self.config.sentences:
            others = (logits.float() - 1e9 * (self.ends != OTHER)).logsumexp(-1)
            over = begins(self.ends[x].where(text, OTHER))
            nats = nats + over * (logits.float().logsumexp(-1) - others)
        return nats

    def window_nats(self, z, x, prefix, decoder_noise=0.0):
        """-log p(x | z, prefix) in nats, (B,), of windows x (B, W)."""
        return self.scored(self.logits(z, x, prefix, decoder_noise), x).sum(-1)

    @torch.no_grad()
    def write(self, z, prefix, length, tau=0.0, decoder_noise=0.0):
        """A window of `length` tokens for z (B, n, d) after prefix (B, P): (B, length) int64, V after the
        end of a sentence if windows are sentences. tau: see `sample`."""
        if tau:  # without, no random number is drawn: what is only shown must not change what follows
            z = z + tau ** 0.5 * self.blur * torch.randn_like(z)
        h, seen, where = self.opening(z, prefix, decoder_noise)
        cache, x = model.Cache(), [torch.full_like(prefix[:, :1], self.mask_id)]
        for i in range(length):
            h = torch.cat([h, self.decoder.embed(x[-1])], 1)
            seen, where = F.pad(seen, (0, 1), value=True), F.pad(where, (0, 1), value=prefix.size(1) + i)
            h = self.decoder.trunk(h, seen[:, None, None], cache, where=where)
            x.append(sample_tokens(self.decoder.logits(h[:, -1:]).float().log_softmax(-1), tau))
            h, where = h[:, :0], where[:0]
        x = torch.cat(x[1:], 1)
        if self.config.sentences:
            x = x.masked_fill(begins(self.ends[x]).cumsum(-1) > 0, self.mask_id)
        return x

    # ---- training and likelihood ----

    def forward(self, x, prefix=None):
        """Windows x (B, W) and the text before them, prefix (B, W) -> (loss in nats per token, metrics: per
        token `nats` of the reconstruction and `accuracy`; of a window `kl`, `information`, `active` units).
        """
        c, B, device = self.config, len(x), x.device
        if c.short:
            length = 1 + (torch.rand(B, 1, device=device) * x.size(1)).long()
            cut = torch.rand(B, 1, device=device) < c.short
            x = x.masked_fill(cut & (torch.arange(x.size(1), device=device) >= length), self.mask_id)
        prefix = torch.full_like(x, self.mask_id) if prefix is None else prefix
        prefix = prefix.masked_fill(torch.rand(B, 1, device=device) < c.prefix_drop, self.mask_id)
        mu, logvar = self.posterior(x)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        # no noise before beta is full, or z would never come to say anything. The decoder's errors in noisy
        # rows do not reach the encoder, which could only make mu larger; their KL does: beta counts double
        which = (torch.rand(B, 1, 1, device=device) < 0.5) & (self.clock.steps >= c.kl_warmup)
        s = c.latent_noise * torch.rand(B, 1, 1, device=device) * which
        noisy = torch.where(s > 0, z.detach(), z) + s * torch.randn_like(mu)
        # any share, so that the decoder knows rows with none hidden and with many; none in noisy rows, where
        # it is to be a language model
        hidden = c.word_dropout * torch.rand(B, 1, device=device) * (s == 0)[:, 0]
        read = x.masked_fill(torch.rand(x.shape, device=device) < hidden, self.mask_id)
        logits = self.logits(noisy, read, prefix, s)
        text = x != self.mask_id
        count = text.sum().clamp(min=1)
        nats = self.scored(logits, x).sum() / count
        kl = kl_to_prior(mu, logvar)
        charged = kl.mean(0).clamp(min=c.free_bits).sum() if c.free_bits else kl.sum() / B
        loss = nats + beta(self.clock.steps, c.kl_weight, c.kl_warmup) * charged * B / count
        with torch.no_grad():
            return loss, {'nats': nats.detach(), 'kl': kl.sum().detach() / B, 'active': active_units(mu),
                          'information': mutual_information(z, mu, logvar),
                          'accuracy': ((logits.argmax(-1) == x) & text).sum() / count}

    def nats(self, x, n=1, prefix=None):
        """An estimate of an upper bound on -log p(x | prefix) in nats, (B,), from n draws of z, weighted by
        importance; n = 1: the negative ELBO. x, prefix (B, W)."""
        prefix = torch.full_like(x, self.mask_id) if prefix is None else prefix
        mu, logvar = self.posterior(x)
        weights = []
        for _ in range(n):
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
            ratio = log_normal(z, torch.zeros_like(z), torch.zeros_like(z)) - log_normal(z, mu, logvar)
            weights.append(ratio.sum((1, 2)) - self.window_nats(z, x, prefix))
        return math.log(n) - torch.stack(weights).logsumexp(0)

    # ---- samples ----

    @torch.no_grad()
    def write_windows(self, xt, latents, tau=0.0, decoder_noise=0.0, windows=0):
        """Generator of canvases (B, T): window after window, after each row's prompt. latents(): a generator
        of z (B, n, d), called for each window; each z is written out, the last one stays."""
        prompt_length(xt, self.mask_id)
        W, k = self.config.block_size, 0
        while (xt == self.mask_id).any() and (not windows or k < windows):
            start = (xt != self.mask_id).sum(-1)
            prefix = tokens_before(xt, start, W, self.mask_id)
            for z in latents():
                new = place(xt, start, self.write(z, prefix, W, tau, decoder_noise), self.mask_id)
                yield new
            xt, k = new, k + 1

    def sample(self, xt, steps=0, *,
               tau: NonNegative = 0.0,  # share of the posterior's variance on z, temperature; 0: neither
               decoder_noise: NonNegative = 0.0,  # noise on z that the decoder is told of
               windows: Natural = 0):   # at most so many; 0: until the canvas is full
        """Generator of canvases, one a window, with z from the prior. xt (B, T) as for ar.Model, any T.
        (Unless beta is near 1, that is not where the encoder puts texts; latent.py learns where.)"""
        prior = lambda: iter([torch.randn(len(xt), *self.mean.shape, device=xt.device)])
        return self.write_windows(xt, prior, tau, decoder_noise, windows)
