"""
D3PM with absorbing states (arXiv 2107.03006): masked.py's forward process in T steps.

Step i of T goes from the noise level m_next = m((i - 1) / T) to m = m(i / T). The loss is the sum over steps
of KL(q(xs | xt, x0) || p(xs | xt)) and, for the last step to clean text, -log p(x0 | x0 with no mask). The
network predicts [MASK] too, and nothing is carried over: D3PM pays for both, in the bound alone; sampling
leaves [MASK] out and carries over, as masked.py does.

With p_mask = 0 and carry-over it is SUBS in T steps (`carry_over`): the KL of a step is then the chance that
it reveals the token times -log p. As T grows the bound falls to masked.py's; a coarse grid costs more.
"""
from dataclasses import dataclass

import torch

import masked
from ar import token_nats
from configurator import Count
from parts.schedules import noise
from text.packing import counted
from unmask import RULES

COPY = 0.1  # training only: weight of the loss at clean tokens, which it must learn to copy
RULES = {name: rule for name, rule in RULES.items() if name != 'analytic'}  # that one takes scores


@dataclass
class Config(masked.Config):
    # d3pm
    T: Count = 1000           # steps of the diffusion
    carry_over: bool = False  # clean tokens are carried over and [MASK] is never predicted: SUBS in T steps

    def __post_init__(self):
        super().__post_init__()
        if self.masking == 'count':
            raise ValueError("masking=count is an integral over continuous time: it is for objective=masked")


def step_kl(out, x, m, m_next):
    """The KL of a step in nats, (B, T), divided by the chance that the step reveals a masked token.

    out (B, T, V + 1), x (B, T), m and m_next (B, 1): noise levels before and after the step. With
    e(m) = log(1 + (1 - m) / m p_mask) the step reveals v with probability (m - m_next) / m p_v / e^e(m):
    KL = reveal (e(m) - log p_v) + stay (e(m) - e(m_next)), reveal = (m - m_next) / m, stay = 1 - reveal.
    """
    logp = out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(-1)
    p_mask = logp[..., -1].exp()
    excess = torch.log1p((1 - m) / m * p_mask)
    # the clamps keep 0 * inf from being NaN: the step to m_next = 0 is never stayed in, and steps in which m
    # does not change have weight 0
    excess_next = torch.log1p((1 - m_next) / m_next.clamp(min=1e-12) * p_mask)
    stay_to_reveal = m_next / (m - m_next).clamp(min=1e-12)
    return excess - logp.gather(-1, x[..., None])[..., 0] + stay_to_reveal * (excess - excess_next)


class Model(masked.Model):
    def __init__(self, config):
        super().__init__(config, outputs=config.vocab_size + (not config.carry_over))

    def levels(self, t):
        """Times (B,), rounded up to i / T -> noise levels m, m_next (B,) and the bound's weight (B,), T times
        the chance that a step reveals a masked token."""
        i, T = (t * self.config.T).ceil().clamp(1, self.config.T), self.config.T
        (m, _), (m_next, _) = (noise(self.config.schedule, level) for level in (i / T, (i - 1) / T))
        return m, m_next, T * (m - m_next) / m

    def step_nats(self, x, masked, segment, m, m_next, copy=0.0):
        """Sum of the loss over the masked positions (B,), and `copy` times that of the clean ones."""
        out = self.network(x.where(~masked, self.mask_id), m, segment)
        if self.config.carry_over:
            return (token_nats(out, x) * masked).sum(-1)
        nats = (step_kl(out, x, m[:, None], m_next[:, None]) * masked).sum(-1)
        if not copy:
            return nats
        return nats + copy * (token_nats(out, x) * ~masked * counted(x, segment)).sum(-1)

    def forward(self, x, segment=None, given=None, t=None, u=None):
        """As masked.Model."""
        t, u, scored = self.draw_noise(x, segment, given, t, u)
        m, m_next, weight = self.levels(t)
        masked = u < m[:, None]
        if self.config.loss_weight == 'flat':
            weight = torch.full_like(t, self.flat)
        nats = self.step_nats(x, masked, segment, m, m_next, COPY)
        return (weight * nats).sum() / scored.sum().clamp(min=1), {
            'loss_per_masked': nats.detach().sum() / masked.sum().clamp(min=1)}

    def nats(self, x, n=1, segment=None, given=None):
        """As masked.Model: the bound of T steps; draw i takes a step from the i-th of n equal strata."""
        total = self.copy_nats(x, segment, given)
        for i in range(n):
            v = (i + torch.rand(len(x), device=x.device)) / n
            m, m_next, weight = self.levels(v)
            _, u, _ = self.draw_noise(x, segment, given, v)
            total = total + weight * self.step_nats(x, u < m[:, None], segment, m, m_next) / n
        return total

    def scores(self, xt, t=None):
        raise ValueError("rule=analytic takes scores: it is for sedd and masked, not for d3pm")

    def copy_nats(self, x, segment, given):
        """-log p(x0 | x0), (B,): zero where clean tokens are carried over."""
        if self.config.carry_over:
            return 0.0
        none = torch.zeros(len(x), device=x.device)
        return (token_nats(self.network(x, none, segment), x) * counted(x, segment, given)).sum(-1)
