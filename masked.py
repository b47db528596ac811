"""
Masked (absorbing-state) diffusion:
tokens turn into [MASK] one by one; a transformer learns to put them back.

Forward process, t in [0, 1]: each token of x0 is still clean with probability alpha(t), else it is [MASK];
alpha(0) = 1, alpha(1) = 0. The network sees xt and predicts x0 at every position. Negative ELBO in nats per
token (MDLM arXiv 2406.07524, MD4 2406.04329):

    E_t [ -alpha'(t) / (1 - alpha(t)) * sum over masked i of -log p(x0_i | xt) ] / (B T)

Divided by B T, never by the number of masked tokens: that quotient is not a bound. With alpha(t) = 1 - t the
weight is 1/t, and the integral over t can be done by hand: mask exactly k of T tokens, k uniform on 1..T,
and weigh by T/k (LLaDA 2502.09992, 2409.02908). `nats` uses that form, whose variance is far lower.

SUBS (MDLM): p never holds [MASK] (the head has no such row), and a token that is not masked is copied. The
number of masks tells the network what t is, so it takes no time input.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn as nn

import model
from ar import token_nats
from unmask import unmask


@dataclass
class Config(model.Config):
    loss_weight: str = 'flat'    # training only: elbo (the bound's 1/t) | flat (all masked tokens alike)
    t_law: str = 'bell'          # training only: uniform | bell, t = sigmoid(N(bell_center, bell_width^2))
    bell_center: float = -0.5    # of the bell; 0 is t = 0.5
    bell_width: float = 0.4      # of the bell
    random_length: float = 0.0   # training only: share of rows cut to a random length (LLaDA: 0.01)

    def __post_init__(self):
        super().__post_init__()
        for name, known in (('loss_weight', ('elbo', 'flat')), ('t_law', ('uniform', 'bell'))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: {', '.join(known)}")
        if not 0 <= self.random_length <= 1:
            raise ValueError(f"random_length={self.random_length} must be in [0, 1]")
        if self.bell_width <= 0:
            raise ValueError(f"bell_width={self.bell_width} must be positive")


def linear(t):
    """The linear (log-linear) schedule: alpha(t) and the bound's weight -alpha'(t) / (1 - alpha(t))."""
    return 1 - t, 1 / t


def low_discrepancy(u, B):
    """B points (u + i/B) mod 1 from one uniform u, (B,):
    each is uniform, together they cover [0, 1] evenly."""
    return (u + torch.arange(B, device=u.device) / B) % 1


def uniform(u):
    """t = u, kept off 0, where the weight 1/t has no limit."""
    return 1e-3 + (1 - 1e-3) * u


def bell(u, center, width):
    """t = sigmoid(N(center, width^2)) by its inverse distribution function."""
    return (center + width * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))).sigmoid()


def exactly(k, u):
    """Mask the k[b] positions of row b with the lowest u: (B, T) bool. k (B,), u (B, T)."""
    return u.argsort(-1).argsort(-1) < k[:, None]


class Model(nn.Module):
    bound = 'upper'

    def __init__(self, config):
        super().__init__()
        self.config, self.blank = config, config.vocab_size
        self.gpt = model.GPT(config, causal=False)
        self.time = uniform
        if config.t_law == 'bell':
            self.time = functools.partial(bell, center=config.bell_center, width=config.bell_width)
        # flat is 1 / E[t]: as with 1/t, weight times t averages to 1, and the loss of a fresh model to ln V
        flat = 1 / self.time((torch.arange(1000) + 0.5) / 1000).mean().item()
        elbo = config.loss_weight == 'elbo'
        self.weight = lambda t: linear(t)[1] if elbo else torch.full_like(t, flat)

    def forward(self, x, t=None, u=None):
        """x (B, T) -> (loss in nats per token, metrics).
        Noise t (B,), the masking probability, and u (B, T) may be given."""
        B, T = x.shape
        if t is None:
            t = self.time(low_discrepancy(torch.rand((), device=x.device), B))
        if u is None:
            u = torch.rand(B, T, device=x.device)
        masked, attend, count = u < 1 - linear(t)[0][:, None], None, B * T
        # the same shapes whatever the length: cut positions are neither seen nor scored
        if self.config.random_length:
            cut = torch.rand(B, 1, device=x.device) < self.config.random_length
            length = torch.where(cut, torch.randint(1, T + 1, (B, 1), device=x.device), T)
            inside = torch.arange(T, device=x.device) < length
            masked, attend, count = masked & inside, inside[:, None, None], length.sum()
        nats = self.masked_nats(x, masked, attend)
        loss = (self.weight(t) * nats).sum() / count
        return loss, {'nats_per_masked': nats.detach().sum() / masked.sum().clamp(min=1)}

    def masked_nats(self, x, masked, attend=None):
        """Sum over the masked positions of -log p(x0_i | xt), (B,).
        x (B, T), masked (B, T) bool; attend: see GPT.trunk."""
        return (token_nats(self.gpt(x.where(~masked, self.blank), attend), x) * masked).sum(-1)

    def nats(self, x, n=1):
        """An estimate, with n draws, of the upper bound on -log p(x) in nats: (B,). x (B, T).

        Draw i masks exactly k tokens, k uniform on the i-th n-th of 1..T
        (the draws together are stratified).
        """
        B, T = x.shape
        total = 0
        for i in range(n):
            k = ((i + torch.rand(B, device=x.device)) / n * T).long().clamp(max=T - 1) + 1
            total += T / k * self.masked_nats(x, exactly(k, torch.rand(B, T, device=x.device)))
        return total / n

    def nats_left(self, x):
        """-log p(x) in nats of the same network writing left to right, exact, (B,); T forwards.

        Position i is predicted from x[:i] and T - i masks: another generation order,
        hence another model than `nats`.
        """
        position = torch.arange(x.size(1), device=x.device)
        total = 0
        for i in range(x.size(1)):
            total += token_nats(self.gpt(x.where(position < i, self.blank))[:, i:i + 1],
                                x[:, i:i + 1]).sum(-1)
        return total

    def denoise(self, xt, t=None):
        """log p(x0 | xt), (B, T, V) float32, normalised. A clean token is copied.
        t is not used (see above)."""
        logp = self.gpt(xt).float().log_softmax(-1)
        copied = torch.full_like(logp, -torch.inf).scatter(-1, xt.clamp(max=self.blank - 1)[..., None], 0.0)
        return torch.where((xt == self.blank)[..., None], logp, copied)

    @torch.no_grad()
    def sample(self, xt, steps, rule='', **how):
        """Generator of canvases (B, T), one a network call;
        xt holds V where tokens are to be drawn (see unmask.py)."""
        yield from unmask(self.denoise, xt, self.blank, steps, rule or 'ancestral', **how)
