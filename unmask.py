"""
The reverse process of every denoiser: from [MASK]s to text, a few tokens a step.

A denoiser is one function, `denoise(xt, t) -> log p(x0 | xt)` (B, T, V), float32 and normalised. A canvas xt
(B, T) holds tokens and, where text is to be written, the mask id V; t (B,) is the noise level, the
probability of a mask, from 1 to 0. All samplers ask the denoiser, draw a token for every masked position and
keep some of the draws. They differ in which:

  exact for a perfect denoiser, if the steps are many
    ancestral      reverses the forward process (MDLM arXiv 2406.07524): between the levels t and s a token
                   is revealed with probability (t - s) / t. So each position has a uniform level of its own.
                   These are drawn first, a step that reveals nothing costs nothing, and each row of the
                   batch goes from one of its events to the next: at most T network calls for T tokens.
    first_hitting  the same with a step for each event: one token a call (2409.02908)
    analytic       SEDD's step, by unnormalised scores (2310.16834); ancestral if they are normalised
    remdm_cap, remdm_rescale, remdm_conf, remdm_loop
                   ancestral, but written tokens go back to [MASK] now and then (2503.00307)
  a fixed number of tokens a step, the best first: greedy in the order, not in the tokens
    random, confidence, margin, entropy, and llada: confidence in the drawn token (2502.09992)
  as many tokens a step as are safe, at least one
    threshold, factor (Fast-dLLM 2505.22618), eb: entropy-bounded (2505.24857)

Noise is float64 where the device has it: float32 Gumbel noise loses its tail and so lowers the temperature
(arXiv 2409.02908). How sure the denoiser is, is read from its log p as it is, before temperature.
"""
import functools
import inspect
import itertools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F


GRIDS = ('linear', 'cosine')


@dataclass
class Config:
    steps: int = 64            # of the denoiser for a block; an autoregressive model takes one a token
    rule: str = ''             # see unmask, score, latent.py; '': ancestral; random; renoise; dpmpp_2m_sde
    temperature: float = 0.7   # 1: the model's own law; below: likelier tokens more often; 0: the likeliest
    top_k: int = 0             # draw from the k likeliest tokens; 0: all
    top_p: float = 1.0         # draw from the fewest tokens with this probability together
    cfg: float = 0.0           # guidance towards the given text; 0: none
    grid: str = 'linear'       # noise levels of the steps: linear | cosine
    part_length: int = 0       # ordered and sure rules: a part of so many tokens after the other; 0: all
    threshold: float = 0.9     # of rule=threshold: probability from which a token is safe
    factor: float = 1.0        # of rule=factor
    gamma: float = 0.1         # of rule=eb, nats
    eta: float = -1.0          # remdm: how much to remask (-1: 0.02); latent: share of new noise (-1: 0)
    first: str = ''            # score: which tokens lose their noise first: sure | random | left | together
    stagger: float = 3.0       # score: how far apart they lose it; each takes 1 / (1 + stagger) of the steps
    tau: float = 0.0           # vae, latent: share of the noise on z, temperature of tokens; 0: neither
    doubt: float = -1.0        # vae, latent: noise on z the decoder is told of; -1: vae 0, latent up to 3
    context: int = 0           # latent: tokens of the start's end that are encoded; 0: all it can see
    trace: bool = False        # latent: decode the latents at every step, as they come out of the noise

    def __post_init__(self):
        for name in ('temperature', 'top_k', 'cfg', 'part_length', 'factor', 'gamma', 'stagger', 'tau',
                     'context'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ('eta', 'doubt'):
            if getattr(self, name) < 0 and getattr(self, name) != -1:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative (-1: the default)")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.grid not in GRIDS:
            raise ValueError(f"grid={self.grid!r} is not one of: {', '.join(GRIDS)}")

    def knobs(self):
        """What `Model.sample` takes: how to draw, and of the rule's knobs those that were changed."""
        how = ('steps', 'rule', 'temperature', 'top_k', 'top_p')
        return {f.name: getattr(self, f.name) for f in fields(Config)
                if f.name in how or getattr(self, f.name) != f.default}


# ---- drawing a token --------------------------------------------------------------------------------------

LARGEST = 2 ** 26  # numbers that `draw` works on at once, to bound its memory


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
    if logp.numel() > LARGEST:
        parts = logp.flatten(0, -2).split(max(1, LARGEST // logp.size(-1)))
        return torch.cat([draw(part, temperature, top_k, top_p) for part in parts]).view(logp.shape[:-1])
    p = truncate(logp / temperature, top_k, top_p).softmax(-1)
    p = p if p.device.type == 'mps' else p.double()
    race = -torch.log1p(-torch.rand_like(p))
    return (p / race.clamp(min=torch.finfo(p.dtype).tiny)).argmax(-1)  # u = 0 must not make 0 / 0


sample_tokens = draw


def write(xt, where, logp, draw):
    """The canvas xt (B, T) with draws from log p (B, T, V) at the positions `where` (B, T) bool."""
    return xt.masked_scatter(where, draw(logp[where]))


def guided(denoise, given, mask_id, scale):
    """Classifier-free guidance on the given tokens (LLaDA arXiv 2502.09992): log p of a text with them,
    (1 + scale) times, less scale times log p without them; both in one call of twice the batch. In a text of
    several blocks what an earlier block wrote is given too."""
    def guided_denoise(xt, t):
        both = denoise(torch.cat([xt, xt.masked_fill(given, mask_id)]), torch.cat([t, t]))
        logp, without = both.chunk(2)
        towards = ((1 + scale) * logp - scale * without).log_softmax(-1)
        return torch.where((xt == mask_id)[..., None], towards, logp)
    return guided_denoise


# ---- which positions are best: (log p (B, T, V), drawn tokens (B, T)) -> score (B, T) ---------------------

def random(logp, token):
    """No preference: ties are broken at random."""
    return torch.zeros_like(logp[..., 0])


def confidence(logp, token):
    """How sure the denoiser is of its best token."""
    return logp.amax(-1)


def llada(logp, token):
    """How sure the denoiser is of the drawn token."""
    return logp.gather(-1, token[..., None])[..., 0]


def margin(logp, token):
    """Probability of the best token less that of the second."""
    p = logp.topk(min(2, logp.size(-1))).values.exp()  # of one token there is no second
    return p[..., 0] - p[..., 1:].sum(-1)


def entropy(logp, token):
    """Negative entropy of the prediction in nats."""
    return torch.special.xlogy(p := logp.exp(), p).sum(-1)


SCORES = {f.__name__: f for f in (random, confidence, llada, margin, entropy)}


def ranks(score, candidates):
    """Rank of each candidate of a row, 0 the highest score; ties at random, others last. (B, T) int64."""
    shuffle = torch.rand(score.shape, device=score.device).argsort(-1)
    score = score.masked_fill(~candidates, -torch.inf).gather(1, shuffle)
    order = shuffle.gather(1, score.argsort(dim=-1, descending=True, stable=True))
    place = torch.arange(order.size(1), device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, place)


def best(score, candidates, k):
    """The k[b] highest-scored candidates of each row b as a mask (B, T); ties are broken at random."""
    return (ranks(score, candidates) < k[:, None]) & candidates


def longest(score, candidates, allowed):
    """The best candidates of each row, up to the last that is allowed and at least one: a mask (B, T).

    allowed: (order (B, T): positions, candidates first, from the highest score down) -> bool (B, T).
    """
    rank = ranks(score, candidates)
    order = rank.argsort(-1)
    fits = allowed(order) & candidates.gather(1, order)
    n = torch.arange(1, order.size(1) + 1, device=order.device)
    return (rank < torch.where(fits, n, 1).amax(-1, keepdim=True)) & candidates


# ---- how many are safe: (log p, candidates, bound) -> a mask (B, T) ---------------------------------------

def above(logp, candidates, threshold):
    """All positions whose best token has more than this probability (Fast-dLLM arXiv 2505.22618)."""
    sure = logp.amax(-1)
    return longest(sure, candidates, lambda order: sure.gather(1, order).exp() > threshold)


def by_factor(logp, candidates, factor):
    """The n surest, n the largest with (n + 1) (1 - probability of the n-th) < factor (arXiv 2505.22618)."""
    sure = logp.amax(-1)
    n = torch.arange(1, sure.size(1) + 1, device=sure.device)
    return longest(sure, candidates, lambda order: (n + 1) * (1 - sure.gather(1, order).exp()) < factor)


def entropy_bounded(logp, candidates, gamma):
    """The positions of lowest entropy whose entropies, but for the largest, add up to at most gamma nats:
    a bound on how much the draws could have told about each other (arXiv 2505.24857)."""
    H = -entropy(logp, None)

    def allowed(order):
        sorted_H = H.gather(1, order)
        return sorted_H.cumsum(-1) - sorted_H <= gamma
    return longest(-H, candidates, allowed)


# ---- noise levels -----------------------------------------------------------------------------------------

def grid_levels(steps, grid='linear', device=None):
    """The noise levels 1 = t_0 > ... > t_steps = 0 of the steps, float64. linear | cosine (MD4 arXiv
    2406.04329, MaskGIT 2202.04200: few tokens in the first steps, many in the last)."""
    left = torch.arange(steps, -1, -1, dtype=torch.float64, device='cpu') / steps
    left = left if grid == 'linear' else torch.sin(math.pi / 2 * left)
    return left.to(device, torch.float32 if device and device.type == 'mps' else torch.float64)


def counts(n, level):
    """How many of n positions each step reveals, (B, steps) integers that add up to n (B,): after the step
    to level t, floor(n t) are left. Steps that reveal none come last, where they cost nothing."""
    k = -(n[:, None] * level + 1e-9).floor().long().diff(dim=-1)
    return k.gather(1, (k == 0).byte().argsort(dim=-1, stable=True))


def events(masked, level=None):
    """Draw when each masked position is revealed: (event, time), both (B, T).

    Every position gets a uniform noise level of its own; the step that crosses it reveals it. event numbers
    the distinct steps of a row 0, 1, 2, ... and time is the level at which such a step begins. Without
    levels every position is a step, at its own level (first hitting). Given positions have event -1.
    """
    own = torch.rand(masked.shape, device=masked.device)
    if level is None:
        event = own.masked_fill(~masked, -1).argsort(-1, descending=True).argsort(-1)
        return event.masked_fill(~masked, -1), own
    falling = level.to(own.dtype)
    step = (len(level) - 1 - torch.bucketize(own, falling.flip(0), right=True)).clamp(min=0)
    step = step.masked_fill(~masked, -1)
    ordered, order = step.sort(-1)
    new = ordered != F.pad(ordered[:, :-1], (1, 0), value=-1)  # -1s first, then each step's first occurrence
    event = torch.empty_like(step).scatter(1, order, new.long().cumsum(-1) - 1)
    return event.masked_fill(~masked, -1), falling[step.clamp(min=0)]


def shares(steps, sizes):
    """The steps shared out among blocks of these many tokens to write: one each, the others in proportion to
    the tokens beyond the first. A step a token where there are as many, and equal blocks get equal shares."""
    spare, beyond = max(0, steps - len(sizes)), max(1, sum(sizes) - len(sizes))
    upto = [0, *itertools.accumulate(size - 1 for size in sizes)]
    upto = [(2 * spare * tokens + beyond) // (2 * beyond) for tokens in upto]  # rounded to the nearest
    return [1 + b - a for a, b in itertools.pairwise(upto)]


def parts(masked, part_length):
    """LLaDA's blocks: the masked positions of one stretch of part_length after the other, each row's counted
    from its first mask, that is from the end of its prompt: (B, T) bool each; 0: all at once."""
    place = torch.arange(masked.size(1), device=masked.device)
    number = (place - masked.long().argmax(-1, keepdim=True)) // (part_length or masked.size(1))
    for i in range(int(number.max()) + 1):
        if (part := masked & (number == i)).any():
            yield part


# ---- samplers: generators of canvases (B, T), one a network call ------------------------------------------
# draw: log p -> tokens

def by_events(denoise, xt, mask_id, draw, level):
    """Reveal every position at its own event; see `events`."""
    event, time = events(xt == mask_id, level)
    for i in range(int(event.max()) + 1):
        now = event == i
        t = torch.where(now, time, 0).amax(-1)  # each row's own time; 0 for a row that is done
        xt = write(xt, now, denoise(xt, t), draw)
        yield xt


def ancestral(denoise, xt, mask_id, steps, draw, grid='linear'):
    """Reveal every position in the step of the grid that crosses its level."""
    yield from by_events(denoise, xt, mask_id, draw, grid_levels(steps, grid, xt.device))


def first_hitting(denoise, xt, mask_id, steps, draw):
    """Reveal one position a call, whatever the steps."""
    yield from by_events(denoise, xt, mask_id, draw, None)


def analytic(logs, xt, mask_id, steps, draw, grid='linear'):
    """SEDD's analytic step: with scores e^l (1 - t) / t and Z the sum of e^l, a token is revealed with
    probability Z (t - s) / t. Where Z < 1 masks are left at the end: one call more writes them, as in SEDD's
    code. logs: as denoise, l, not normalised."""
    level = grid_levels(steps, grid, xt.device)
    for t, s in zip(level, [*level[1:], None]):
        masked = xt == mask_id
        if not masked.any():
            return
        out = logs(xt, t.float().expand(len(xt)))
        if s is not None:
            chance = out.logsumexp(-1).exp() * ((t - s) / t)
            masked = masked & (torch.rand(xt.shape, device=xt.device) < chance)
        xt = write(xt, masked, out, draw)
        yield xt


def remasking(logp, xt, mask_id, free, draw, t, s, sigma):
    """One step of ReMDM (arXiv 2503.00307) from level t to s: (xs, revealed), both (B, T).

    A written token goes back to [MASK] with probability sigma (0-d or (B, T)), where it is free to; a masked
    one is revealed with probability (t - s + sigma (1 - t)) / t, so that the levels are t and s as before.
    """
    masked = xt == mask_id
    u = torch.rand(xt.shape, device=xt.device)
    reveal = masked & (u < (t - s + sigma * (1 - t)) / t)
    xs = write(xt, reveal, logp, draw)
    return xs.masked_fill(free & ~masked & (u < sigma), mask_id), reveal


def most_remasking(t, s):
    """The largest probability of remasking from level t to s: min(1, s / (1 - t))."""
    return (s / (1 - t).clamp(min=1e-12)).clamp(max=1)  # 0 for the step from 1 to 0


def remdm(denoise, xt, mask_id, draw, path, sigma):
    """path: levels (t, s) and whether to remask, for every step. sigma: (t, s, written) -> probability of
    remasking; written (B, T): log p of each token when it was written, inf where it is masked."""
    free, written = xt == mask_id, torch.full(xt.shape, torch.inf, device=xt.device)
    for t, s, remask in path:
        masked = xt == mask_id
        if masked.any():
            logp = denoise(xt, t.float().expand(len(xt)))
        chance = sigma(t, s, written) if remask else torch.zeros_like(t)
        xt, revealed = remasking(logp, xt, mask_id, free, draw, t, s, chance)
        p = logp.gather(-1, xt.clamp(max=mask_id - 1)[..., None])[..., 0]
        written = torch.where(revealed, p, written).masked_fill(xt == mask_id, torch.inf)
        if masked.any():
            yield xt


def down(steps, grid, device):
    """A path of `steps` steps down the grid, remasking in all."""
    level = grid_levels(steps, grid, device)
    return [(t, s, True) for t, s in zip(level[:-1], level[1:])]


def remdm_cap(denoise, xt, mask_id, steps, draw, eta=0.02, grid='linear'):
    """ReMDM, sigma = min(eta, the largest possible)."""
    yield from remdm(denoise, xt, mask_id, draw, down(steps, grid, xt.device),
                     lambda t, s, written: most_remasking(t, s).clamp(max=eta))


def remdm_rescale(denoise, xt, mask_id, steps, draw, eta=0.02, grid='linear'):
    """ReMDM, sigma = eta times the largest possible."""
    yield from remdm(denoise, xt, mask_id, draw, down(steps, grid, xt.device),
                     lambda t, s, written: eta * most_remasking(t, s))


def remdm_conf(denoise, xt, mask_id, steps, draw, grid='linear'):
    """ReMDM, the largest possible sigma shared out in a row by softmax(-probability when written)."""
    def sigma(t, s, written):  # of a masked position exp(-exp(inf)) = 0; all masked: none
        return most_remasking(t, s) * (-written.exp()).softmax(-1).nan_to_num()
    yield from remdm(denoise, xt, mask_id, draw, down(steps, grid, xt.device), sigma)


def remdm_loop(denoise, xt, mask_id, steps, draw, eta=0.02, on=0.55, off=0.05, alpha_on=0.9):
    """ReMDM: down to the level 1 - alpha_on without remasking, stay there and remask (times on to off, sigma
    as in cap), then down to 0 without."""
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    level = torch.where(times > on, 1 - (1 - times) * alpha_on / (1 - on),
                        (1 - alpha_on) * (times / off).clamp(max=1))
    level, remask = level.float().to(xt.device), (times[:-1] <= on) & (times[1:] >= off)
    path = zip(level[:-1], level[1:], remask)
    yield from remdm(denoise, xt, mask_id, draw, path,
                     lambda t, s, written: most_remasking(t, s).clamp(max=eta))


def in_order(denoise, xt, mask_id, steps, draw, score, grid='linear', part_length=0):
    """As many tokens a step as the grid says, the highest scores first; block after block, if told so, with
    its share of the steps (LLaDA's generate.py: of equal blocks, steps / blocks each)."""
    blocks = list(parts(xt == mask_id, part_length))
    for part, share in zip(blocks, shares(steps, [int(part.sum(-1).max()) for part in blocks])):
        for k in counts(part.sum(-1), grid_levels(share, grid, xt.device)).T:
            if not k.any():
                break
            masked = xt == mask_id
            logp = denoise(xt, masked.float().mean(-1))
            token = write(xt, masked & part, logp, draw)
            score_of = score(logp, token.clamp(max=mask_id - 1))  # elsewhere there may be masks
            xt = torch.where(best(score_of, masked & part, k), token, xt)
            yield xt


def adaptive(denoise, xt, mask_id, draw, part_length, safe):
    """All tokens that `safe` (log p, candidates) lets through, as often as it takes."""
    for part in parts(xt == mask_id, part_length):
        while (left := part & (xt == mask_id)).any():
            logp = denoise(xt, (xt == mask_id).float().mean(-1))
            xt = write(xt, safe(logp, left), logp, draw)
            yield xt


def threshold(denoise, xt, mask_id, steps, draw, threshold=0.9, part_length=0):
    """See `above`; the steps are as many as it takes."""
    yield from adaptive(denoise, xt, mask_id, draw, part_length,
                        lambda logp, left: above(logp, left, threshold))


def factor(denoise, xt, mask_id, steps, draw, factor=1.0, part_length=0):
    """See `by_factor`; the steps are as many as it takes."""
    yield from adaptive(denoise, xt, mask_id, draw, part_length,
                        lambda logp, left: by_factor(logp, left, factor))


def eb(denoise, xt, mask_id, steps, draw, gamma=0.1, part_length=0):
    """See `entropy_bounded`; the steps are as many as it takes."""
    yield from adaptive(denoise, xt, mask_id, draw, part_length,
                        lambda logp, left: entropy_bounded(logp, left, gamma))


RULES = {f.__name__: f for f in (ancestral, first_hitting, analytic, remdm_cap, remdm_rescale, remdm_conf,
                                 remdm_loop, threshold, factor, eb)}
RULES |= {name: functools.partial(in_order, score=score) for name, score in SCORES.items()}


def knobs_of(rule):
    """Names of a rule's own knobs, from its signature."""
    return [name for name, p in inspect.signature(RULES[rule]).parameters.items()
            if p.default is not p.empty and name != 'score']


def unmask(denoise, xt, mask_id, steps, rule='ancestral', cfg=0.0, temperature=1.0, top_k=0, top_p=1.0,
           **knobs):
    """Generator of canvases (B, T), one a network call; the last holds no mask id, given tokens stay.

    denoise (xt, t) -> log p(x0 | xt) (B, T, V); rule: one of RULES, knobs: its own; cfg: scale of `guided`;
    the others: see `draw`. Raises ValueError for an unknown rule and for a knob that is not the rule's.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of: {', '.join(RULES)}")
    for name in knobs.keys() - knobs_of(rule):
        raise ValueError(f"{name} is not a knob of rule={rule}, whose own are: "
                         f"{', '.join(knobs_of(rule)) or 'none'}")
    given = xt != mask_id
    if given.all():
        return iter(())
    if cfg and not given.any():
        raise ValueError("cfg guides towards a given text: give one with --start")
    if cfg and rule == 'analytic':
        raise ValueError("cfg is for probabilities, rule=analytic takes scores: take rule=ancestral")
    if cfg:
        denoise = guided(denoise, given, mask_id, cfg)
    drawn = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    return RULES[rule](denoise, xt, mask_id, steps, drawn, **knobs)


def generate(model, canvas, block_size, overlap, **knobs):
    """Generator of canvases (B, L), one a network call, for any L.

    Block after block: each keeps the last `overlap` tokens of the one before as given context,
    the last ends at L.
    """
    start, length = 0, canvas.size(1)
    while True:
        for window in model.sample(canvas[:, start:start + block_size], **knobs):
            canvas = torch.cat([canvas[:, :start], window, canvas[:, start + block_size:]], dim=1)
            yield canvas
        if start + block_size >= length:
            return
        start = min(start + block_size - overlap, length - block_size)
