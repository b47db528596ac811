"""
The reverse process of every denoiser: from [MASK]s to text, a few tokens a step.

A denoiser is one function, `denoise(xt, t) -> log p(x0 | xt)` (B, T, V), float32 and normalised. A canvas xt
(B, T) holds tokens and, where text is to be written, the mask id V. All samplers below repeat: ask the
denoiser, draw a token for every masked position, keep some of the draws. They differ in which they keep:

  ancestral    the exact reversal of the forward process (MDLM, arXiv 2406.07524): every position has a time,
               uniform in [0, 1], at which it is revealed. The times are drawn first, so a step that reveals
               nothing costs nothing, and each row of the batch goes from one of its own events to the next.
               With as many steps as you like there are at most T network calls; only positions that share a
               step are drawn independently.
  random       the same with exact counts: T / steps positions a step, in random order.
  confidence, margin, entropy
               exact counts, the positions where the denoiser is surest first.
               Greedy in the order, not in the tokens.

Noise is float64 where the device has it: float32 Gumbel noise loses its tail and so lowers the temperature
(arXiv 2409.02908).
"""
import torch
import torch.nn.functional as F


def truncate(logp, top_k=0, top_p=1.0):
    """log p (..., V) with all but the top_k likeliest, or the fewest that hold mass top_p, at -inf
    (0 and 1: all)."""
    if 0 < top_k < logp.size(-1):
        logp = logp.masked_fill(logp < logp.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        sorted_p, order = logp.softmax(-1).sort(descending=True)
        beyond = sorted_p.cumsum(-1) - sorted_p >= top_p  # the mass before this token is enough without it
        logp = logp.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logp


def draw(logp, temperature=1.0, top_k=0, top_p=1.0):
    """Tokens (...) from log p (..., V) ** (1 / temperature), truncated. Temperature 0 takes the likeliest.

    An exponential race: argmax of p / e with e ~ Exp(1) has law p, and -log1p(-u) is dense where
    the winner is decided.
    """
    if temperature == 0:
        return logp.argmax(-1)
    p = truncate(logp / temperature, top_k, top_p).softmax(-1)
    p = p if p.device.type == 'mps' else p.double()
    race = -torch.log1p(-torch.rand_like(p))
    return (p / race.clamp(min=torch.finfo(p.dtype).tiny)).argmax(-1)  # u = 0 must not make 0 / 0


def confidence(logp):
    """How sure the denoiser is of its best token, (B, T)."""
    return logp.amax(-1)


def margin(logp):
    """Probability of the best token less that of the second, (B, T)."""
    best = logp.topk(2).values.exp()
    return best[..., 0] - best[..., 1]


def entropy(logp):
    """Negative entropy of the prediction in nats, (B, T)."""
    return torch.special.xlogy(p := logp.exp(), p).sum(-1)


def random(logp):
    """No preference, (B, T): ties are broken at random."""
    return torch.zeros_like(logp[..., 0])


SCORES = {'random': random, 'confidence': confidence, 'margin': margin, 'entropy': entropy}
RULES = ('ancestral', *SCORES)


def counts(n, steps):
    """How many of n positions each step reveals:
    (n, steps) integers that add up to n (B,), the larger first."""
    step = torch.arange(steps, device=n.device)
    return n[:, None] // steps + (step < n[:, None] % steps)


def best(score, candidates, k):
    """The k[b] highest-scored candidates of each row b as a mask (B, T); ties are broken at random."""
    shuffle = torch.rand_like(score).argsort(-1)
    score = score.masked_fill(~candidates, -torch.inf).gather(1, shuffle)
    order = shuffle.gather(1, score.argsort(dim=-1, descending=True, stable=True))
    ranks = torch.arange(order.size(1), device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, ranks)
    return (rank < k[:, None]) & candidates


def events(masked, steps):
    """Draw when each masked position is revealed: (event, time), both (B, T).

    Every position gets a uniform step out of `steps`; event numbers the distinct steps of a row 0, 1, 2, ...
    and time is 1 at the first step and 1 / steps at the last. Given positions have event -1.
    """
    step = torch.randint(steps, masked.shape, device=masked.device).masked_fill(~masked, -1)
    ordered, order = step.sort(-1)
    new = ordered != F.pad(ordered[:, :-1], (1, 0), value=-1)  # -1s first, then each step's first occurrence
    event = torch.empty_like(step).scatter(1, order, new.long().cumsum(-1) - 1)
    return event.masked_fill(~masked, -1), 1 - step / steps


def ancestral(denoise, xt, mask_id, steps, **how):
    """Exact reversal in `steps` steps; yields the canvas (B, T) after every network call."""
    event, time = events(xt == mask_id, steps)
    for i in range(int(event.max()) + 1):
        now = event == i
        t = torch.where(now, time, 0).amax(-1)  # each row's own time; 0 for a row that is done
        xt = torch.where(now, draw(denoise(xt, t), **how), xt)
        yield xt


def ordered(denoise, xt, mask_id, steps, score, **how):
    """Exact counts a step, the highest scores first; yields the canvas (B, T) after every network call."""
    n = (xt == mask_id).sum(-1)
    for k in counts(n, steps).T[:int(n.max())]:
        masked = xt == mask_id
        logp = denoise(xt, masked.float().mean(-1))
        xt = torch.where(best(score(logp), masked, k), draw(logp, **how), xt)
        yield xt


def unmask(denoise, xt, mask_id, steps, rule='ancestral', **how):
    """Generator of canvases (B, T), one a network call;
    the last holds no mask id and given tokens never change.

    denoise (xt, t) -> log p(x0 | xt) (B, T, V); rule one of RULES; how: temperature, top_k, top_p of `draw`.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of: {', '.join(RULES)}")
    if rule == 'ancestral':
        return ancestral(denoise, xt, mask_id, steps, **how)
    return ordered(denoise, xt, mask_id, steps, SCORES[rule], **how)
