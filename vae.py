"""
A sentence VAE made of one causal language model: a window of text becomes a few vectors, and text again.

Encoder and decoder are one frozen base under two adapters (AdaVAE arXiv 2205.05862; lora.py). The encoder
reads the window x (at most W tokens) without the causal mask, and with it n learned queries, tokens of their
own that attend to the window in every layer; what becomes of query k is h_k. Then

    mu_k = w_e h_k,    z = mu + sqrt(tau) b eps, tau = 1 in training,    (n, d), the latents of the window,

where b, the posterior's standard deviation, is 1 or learned, and the decoder writes

    p(x | z, prefix) = prod_i p(x_i | [w_d z_1 ... w_d z_n] prefix [BOS] x_<i).

Query k has the position of the middle of the k-th of n equal stretches of the window, latent k of its
beginning. In half of the rows of training z gets further noise, of standard deviation s, and the decoder is
told s. So it learns to doubt: at s = 0 it spells out what z says, at a large s it writes what a language
model would, with z as a hint. latent.py needs that, whose z are never quite those of a text.

The loss is E -log p(x | z, prefix) + beta KL(q(z | x) || N(0, I)): at beta = 1, with nothing hidden from the
decoder and no further noise, the negative ELBO (1312.6114), an upper bound on -log p(x | prefix); n draws
weighted by importance bound it more tightly (1509.00519). With the variance fixed the KL is |mu|^2 / 2. A
decoder that is a language model can do without z, and then z tells nothing (posterior collapse, 1511.06349);
so the prefix is dropped in half of the rows, tokens are hidden, and beta is small. V (the base's [BOS])
stands wherever there is no token.
"""
import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from parts import lora
import model
from ar import prompt_length, token_nats
from unmask import sample_tokens
from text.windows import OTHER, Windows, begins, last, sentence_ends


@dataclass
class Config(model.Config):
    block_size: int = 48         # W, tokens of a window, and of the prefix before it
    base_context: int = 128      # block_size of the base, at least 2 W; set from --base, as its sizes are
    sentences: bool = False      # windows end where sentences do; False: all have W tokens
    n_latent: int = 8            # n, vectors of a window
    d_latent: int = 64           # d, width of a vector
    pooled: bool = False         # pool the last layer by n softmaxes instead: no queries in the layers
    whole: bool = False          # train two copies of the base instead of adapters
    lora_rank: int = 32          # of the adapters
    lora_alpha: float = 32.0     # their scale is lora_alpha / lora_rank
    lora_dropout: float = 0.0    # on what enters them
    lora_targets: str = 'qkv,proj,fc'  # the matrices that have one
    learned_variance: bool = False  # of the posterior; False: 1
    kl_weight: float = 0.01      # beta
    kl_warmup: int = 1000        # optimizer steps in which it rises from 0, as a sine squared
    free_bits: float = 0.0       # nats that each dimension may tell at no cost (1606.04934)
    prefix_drop: float = 0.5     # training only: share of rows that do not see the prefix
    word_dropout: float = 1.0    # training only: largest share of a row hidden from the decoder (1511.06349)
    latent_noise: float = 4.0    # training only: most further noise on z, in half of the rows, after warm-up
    short: float = 0.0           # training only: share of windows cut to a random length

    def __post_init__(self):
        super().__post_init__()
        if 2 * self.block_size > self.base_context:
            raise ValueError(f"block_size={self.block_size}: prefix and window are {2 * self.block_size} "
                             f"tokens, more than the base's context of {self.base_context}")
        if not 1 <= self.n_latent <= self.block_size:
            raise ValueError(f"n_latent={self.n_latent} must be in 1 ... block_size={self.block_size}")
        for name in ('d_latent', 'lora_rank'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('kl_weight', 'kl_warmup', 'free_bits', 'latent_noise', 'lora_alpha'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ('prefix_drop', 'word_dropout', 'short', 'lora_dropout'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if self.dropout and not self.whole:
            raise ValueError(f"dropout={self.dropout} is for whole=True: a frozen base has none, "
                             f"adapters have lora_dropout")


# ---- latents ----------------------------------------------------------------------------------------------

def stretches(n, W):
    """Where n equal stretches of a window of W tokens begin: positions (n,)."""
    return torch.arange(n) * W // n


def kl_to_prior(mu, logvar):
    """KL(N(mu, e^logvar) || N(0, 1)) in nats, of each dimension: of the shape of mu."""
    return (mu.square() + logvar.exp() - 1 - logvar) / 2


def log_normal(z, mu, logvar):
    """log N(z; mu, e^logvar), of each dimension."""
    return -((z - mu).square() * (-logvar).exp() + logvar + math.log(2 * math.pi)) / 2


def beta(steps, weight, warmup):
    """The KL weight after `steps` (0-d tensor) optimizer steps."""
    return weight * torch.sin(math.pi / 2 * (steps / max(1, warmup)).clamp(max=1)).square()


def active_units(mu):
    """How many dimensions of mu (B, n, d) tell windows apart: their variance over windows is above 0.01."""
    return (mu.var(0) > 0.01).sum().to(mu.dtype)


def mutual_information(z, mu, logvar):
    """Estimate of I(x; z) in nats from z ~ q(z | x) of B windows, all (B, n, d): E log q(z | x) - log q(z),
    q(z) the mean over the batch (ELBO surgery, Hoffman & Johnson 2016). It cannot be more than log B."""
    z, mu, logvar = (t.flatten(1) for t in (z, mu, logvar))
    inverse = (-logvar).exp()
    with torch.autocast(z.device.type, enabled=False):  # large numbers of which differences count
        pairs = z @ (mu * inverse).T - z.square() @ inverse.T / 2  # (B, B): log N(z_i; mu_j) + const
    pairs = pairs - (mu.square() * inverse + logvar).sum(1) / 2
    return (pairs.diagonal() - pairs.logsumexp(1) + math.log(len(z))).mean()


def slerp(a, b, share):
    """The way from latents a to b (n, d) on the arc between their directions, and evenly in norm."""
    u, v = (F.normalize(t.flatten(), dim=0) for t in (a, b))
    angle = (u @ v).clamp(-1, 1).acos()
    if angle < 1e-4:
        return a + share * (b - a)
    unit = ((1 - share) * angle).sin() / angle.sin() * u + (share * angle).sin() / angle.sin() * v
    return ((1 - share) * a.norm() + share * b.norm()) * unit.view_as(a)


def inherited(config):
    """Knobs that a VAE takes from the config of its base."""
    own = ('block_size', 'dropout')
    names = [f.name for f in fields(model.Config) if f.name in config and f.name not in own]
    return dict(base_context=config['block_size'], **{name: config[name] for name in names})


# ---- canvases ---------------------------------------------------------------------------------------------

def before(xt, start, W, blank):
    """The W tokens before the positions start (B,) of the canvas xt (B, T): (B, W), blank where there are
    none."""
    at = start[:, None] + torch.arange(-W, 0, device=xt.device)
    return torch.where(at >= 0, xt.gather(1, at.clamp(min=0)), blank)


def place(xt, start, window, blank):
    """The canvas xt (B, T) with the windows (B, W) at start (B,): where they are not blank and it is."""
    at = start[:, None] + torch.arange(window.size(1), device=xt.device)
    inside = (at < xt.size(1)) & (window != blank)
    at = at.clamp(max=xt.size(1) - 1)
    free = inside & (xt.gather(1, at) == blank)
    new = F.pad(xt, (0, 1))  # what is not to be written goes to a column beyond
    new.scatter_(1, torch.where(free, at, xt.size(1)), window)
    return new[:, :-1]


def refuse(who, top_k, top_p, knobs):
    """Raise ValueError for knobs of other samplers."""
    wrong = list(knobs) + ['top_k'] * (top_k != 0) + ['top_p'] * (top_p != 1)
    if wrong:
        raise ValueError(f"{', '.join(wrong)} is not for {who}")


RULES = {}  # of sampling: there is one way


class Model(nn.Module):
    bound, packs, revises, any_length = 'upper', False, False, True
    built_on = 'ar'    # objective of the checkpoint that --base names
    selects = False    # is the checkpoint with the lowest bound the best one? beta is not 1

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_id, c = config, config.vocab_size, config
        n, d, C = c.n_latent, c.d_latent, c.n_embd
        sizes = model.Config(**{f.name: getattr(c, f.name) for f in fields(model.Config)} |
                             dict(block_size=c.base_context))
        base = model.GPT(sizes, causal=True)
        if c.whole:
            self.encoder, self.decoder = base, copy.deepcopy(base)
        else:
            low_rank = c.lora_rank, c.lora_alpha, c.lora_dropout, c.lora_targets.split(',')
            self.encoder, self.decoder = lora.adapt(base, *low_rank), lora.adapt(base, *low_rank)
        for block in self.encoder.blocks:
            block.attn.causal = False
        self.encoder.head = None  # it predicts nothing
        self.queries = nn.Parameter(torch.randn(n, C) * (C ** -0.5 if c.pooled else 1))
        self.w_e, self.w_d = nn.Linear(C, d), nn.Linear(d, C)
        self.w_var = nn.Linear(C, d) if c.learned_variance else None
        self.told = nn.Parameter(torch.zeros(C))  # of the noise on z
        nn.init.orthogonal_(self.w_e.weight)
        with torch.no_grad():
            self.w_d.weight.copy_(self.w_e.weight.T)
        for layer in filter(None, (self.w_e, self.w_d, self.w_var)):
            nn.init.zeros_(layer.bias)
        if c.learned_variance:
            nn.init.zeros_(self.w_var.weight)
        self.register_buffer('stretches', stretches(n, c.block_size), persistent=False)
        self.register_buffer('centres', self.stretches + c.block_size // (2 * n), persistent=False)
        self.register_buffer('steps', torch.zeros(()))   # of the optimizer so far, see train.py
        self.register_buffer('mean', torch.zeros(n, d))  # of mu, see `measure`
        self.register_buffer('std', torch.ones(n, d))
        self.register_buffer('blur', torch.ones(n, d))   # standard deviation of q(z | x)
        self.register_buffer('ends', torch.zeros(c.vocab_size, dtype=torch.int8))  # see windows.py

    @property
    def gpt(self):
        """The network whose calls a report counts."""
        return self.decoder

    def inherit(self, base, pieces):
        """Take over the weights of the base, a state dict of ar.Model. pieces: the bytes of every token.
        Raises ValueError."""
        self.ends.copy_(sentence_ends(pieces))
        weights = {name.removeprefix('gpt.'): p for name, p in base.items()}
        lora.load_base(self.encoder, weights)
        lora.load_base(self.decoder, weights)

    def cut(self, tokens, end, stride=0):
        """The windows of a stream of tokens, `stride` apart (0: side by side) or sentences; end: the id
        between documents, or None."""
        W, ends = self.config.block_size, self.ends if self.config.sentences else None
        return Windows(tokens, W, self.mask_id, stride or W, ends, end)

    def windows_of(self, ids, n=0, right=False):
        """The last n windows (0: all) of a text's ids (L,): (n, W); right: see `windows.last`."""
        ends = self.ends if self.config.sentences else None
        return last(ids, n, self.config.block_size, self.mask_id, ends, right)

    def source(self, tokens, end, folder):
        """What train.py draws batches from."""
        return self.cut(tokens, end, 1)

    # ---- encoder ----

    def hidden(self, x):
        """What becomes of the n queries over windows x (B, W), V where there is no token: (B, n, C)."""
        seen, h = x != self.mask_id, self.encoder.embed(x)
        if self.config.pooled:
            seen = seen | ~seen.any(-1, keepdim=True)  # a softmax over nothing would be no number
            h = self.encoder.trunk(h, seen[:, None, None])
            return self.pooling(h, seen).type_as(h) @ h
        where = torch.cat([torch.arange(x.size(1), device=x.device), self.centres])
        h = torch.cat([h, self.queries.expand(len(x), -1, -1).type_as(h)], 1)
        seen = F.pad(seen, (0, len(self.queries)), value=True)
        return self.encoder.trunk(h, seen[:, None, None], where=where)[:, x.size(1):]

    def pooling(self, h, seen):
        """Weights (B, n, W) of the hidden states h (B, W, C), of which `seen` (B, W) are of tokens."""
        scores = (self.queries @ h.transpose(1, 2)).float()
        return scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min).softmax(-1)

    def posterior(self, x):
        """mu and log variance (B, n, d) of q(z | x), float32."""
        h = self.hidden(x)
        mu = self.w_e(h).float()
        return mu, torch.zeros_like(mu) if self.w_var is None else self.w_var(h).float()

    def encode(self, x):
        """Windows x (B, W) -> latents (B, n, d), of mean 0 and variance 1 in each dimension over the windows
        that `measure` saw."""
        with torch.autocast(x.device.type, enabled=False):  # a small std makes small errors large
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

    # ---- decoder ----

    def opening(self, z, prefix, doubt=0.0):
        """What the decoder reads before the window: embeddings (B, n + P, C), which of them are there
        (B, n + P), and their positions (n + P,). z (B, n, d), prefix (B, P); doubt: s, a number or
        (B, 1, 1)."""
        P, s = prefix.size(1), torch.as_tensor(doubt, device=z.device)
        h = self.w_d(z * (1 + s * s).rsqrt()) + s / (1 + s) * self.told
        h = torch.cat([h, self.decoder.embed(prefix)], 1)
        where = torch.cat([P + self.stretches, torch.arange(P, device=z.device)])
        return h, F.pad(prefix != self.mask_id, (z.size(1), 0), value=True), where

    def logits(self, z, x, prefix, doubt=0.0):
        """What z (B, n, d), prefix (B, P) and x_<i predict for x_i: (B, T, V). x (B, T)."""
        h, seen, where = self.opening(z, prefix, doubt)
        seen = F.pad(seen, (0, x.size(1)), value=True)
        h = torch.cat([h, self.decoder.embed(F.pad(x[:, :-1], (1, 0), value=self.mask_id))], 1)
        where = torch.cat([where, prefix.size(1) + torch.arange(x.size(1), device=x.device)])
        h = self.decoder.trunk(h, seen[:, None, None], where=where)
        return self.decoder.logits(h[:, -x.size(1):])

    def scored(self, logits, x):
        """-log p in nats, (B, W), of the tokens that windows x (B, W) hold, from logits (B, W, V). Behind a
        window that ends since its sentence does: of the tokens that would begin another."""
        text, x = x != self.mask_id, x.clamp(max=self.mask_id - 1)
        nats = token_nats(logits, x) * text
        if self.config.sentences:
            others = (logits.float() - 1e9 * (self.ends != OTHER)).logsumexp(-1)
            over = begins(self.ends[x].where(text, OTHER))
            nats = nats + over * (logits.float().logsumexp(-1) - others)
        return nats

    def window_nats(self, z, x, prefix, doubt=0.0):
        """-log p(x | z, prefix) in nats, (B,), of windows x (B, W)."""
        return self.scored(self.logits(z, x, prefix, doubt), x).sum(-1)

    @torch.no_grad()
    def write(self, z, prefix, length, tau=0.0, doubt=0.0):
        """A window of `length` tokens for z (B, n, d) behind prefix (B, P): (B, length) int64, V behind the
        end of a sentence if windows are sentences. To z comes noise of tau times the posterior's mean
        variance, tokens are drawn at temperature tau; 0: neither. doubt: the s that the decoder is told."""
        if tau:  # without, no random number is drawn: what is only shown must not change what follows
            z = z + tau ** 0.5 * self.blur * torch.randn_like(z)
        h, seen, where = self.opening(z, prefix, doubt)
        cache, new, x = model.Cache(self.config.n_layer), torch.full_like(prefix[:, :1], self.mask_id), []
        for i in range(length):
            h = torch.cat([h, self.decoder.embed(new)], 1)
            seen, where = F.pad(seen, (0, 1), value=True), F.pad(where, (0, 1), value=prefix.size(1) + i)
            h = self.decoder.trunk(h, seen[:, None, None], cache, where=where)
            new = sample_tokens(self.decoder.logits(h[:, -1:]).float().log_softmax(-1), tau)
            h, where = h[:, :0], where[:0]
            x.append(new)
        x = torch.cat(x, 1)
        if self.config.sentences:
            x = x.masked_fill(begins(self.ends[x]).cumsum(-1) > 0, self.mask_id)
        return x

    def reconstruct(self, x, tau=0.0, doubt=0.0):
        """Windows x (B, W) -> latents -> windows again, without a prefix; tau, doubt as in `write`."""
        again = self.write(self.posterior(x)[0], torch.full_like(x, self.mask_id), x.size(1), tau, doubt)
        return again.masked_fill(x == self.mask_id, self.mask_id)

    # ---- the objective ----

    def forward(self, x, prefix=None):
        """Windows x (B, W) and what comes before them, prefix (B, W), V where there is nothing -> (loss in
        nats per token, metrics: `nats` of the reconstruction per token; of a window `kl` in nats, `active`
        units, `information` in nats; `accuracy` of the tokens, given what the decoder sees)."""
        c, B, device = self.config, len(x), x.device
        if c.short:
            length = 1 + (torch.rand(B, 1, device=device) * x.size(1)).long()
            cut = torch.rand(B, 1, device=device) < c.short
            x = x.masked_fill(cut & (torch.arange(x.size(1), device=device) >= length), self.mask_id)
        prefix = torch.full_like(x, self.mask_id) if prefix is None else prefix
        prefix = prefix.masked_fill(torch.rand(B, 1, device=device) < c.prefix_drop, self.mask_id)
        mu, logvar = self.posterior(x)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        # no noise before beta is full, or z never gets to tell anything; and the decoder's errors in noisy
        # rows do not reach the encoder: it could only speak up. Their KL does: beta counts double
        which = (torch.rand(B, 1, 1, device=device) < 0.5) & (self.steps >= c.kl_warmup)
        s = c.latent_noise * torch.rand(B, 1, 1, device=device) * which
        noisy = torch.where(s > 0, z.detach(), z) + s * torch.randn_like(mu)
        # any share, so that none hidden and many are both known; none where z is in doubt: there the decoder
        # is to be a language model
        hidden = c.word_dropout * torch.rand(B, 1, device=device) * (s == 0)[:, 0]
        read = x.masked_fill(torch.rand(x.shape, device=device) < hidden, self.mask_id)
        logits = self.logits(noisy, read, prefix, s)
        text = x != self.mask_id
        count = text.sum().clamp(min=1)
        nats = self.scored(logits, x).sum() / count
        kl = kl_to_prior(mu, logvar)
        charged = kl.mean(0).clamp(min=c.free_bits).sum() if c.free_bits else kl.sum() / B
        loss = nats + beta(self.steps, c.kl_weight, c.kl_warmup) * charged * B / count
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

    # ---- texts ----

    @torch.no_grad()
    def write_all(self, xt, latents, tau=0.0, doubt=0.0, most=0):
        """Generator of (canvas (B, T), start (B,) of the window being written): window after window of the
        blanks (= V) behind every row's prompt, `most` windows or (0) until all is full. latents(): a
        generator of z (B, n, d), called for each window; each z is written out, the last one stays."""
        prompt_length(xt, self.mask_id)
        W, blank, k = self.config.block_size, self.mask_id, 0
        while (xt == blank).any() and (not most or k < most):
            start = (xt != blank).sum(-1)
            prefix = before(xt, start, W, blank)
            for z in latents():
                window = self.write(z, prefix, W, tau, doubt)
                new = place(xt, start, window, blank)
                yield new, start
            xt, k = new, k + 1

    def unroll(self, xt, steps=0, rule='', temperature=1.0, top_k=0, top_p=1.0, tau=0.0, doubt=0.0, most=0,
               **knobs):
        """`write_all` with z from the prior. (Unless beta is near 1 that is not where the encoder puts
        texts; latent.py learns where.) tau stands for temperature, which is there for the contract."""
        refuse('a VAE', top_k, top_p, dict(knobs, rule=rule) if rule else knobs)
        shape = len(xt), self.config.n_latent, self.config.d_latent
        prior = lambda: iter([torch.randn(shape, device=xt.device)])
        return self.write_all(xt, prior, tau, doubt, most)

    def sample(self, xt, steps=0, **knobs):
        """Generator of canvases, a window each. xt (B, T) as for ar.Model, any T; knobs: of `unroll`."""
        return (canvas for canvas, _ in self.unroll(xt, steps, **knobs))
