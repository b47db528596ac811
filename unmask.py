"""
The reverse process of masked diffusion: from [MASK]s to text. `textbook` is the sampler to begin with.

A denoiser is one function, `denoise(xt, t) -> log p(x0 | xt)` (B, T, V), float32 and normalised. A canvas xt
(B, T) holds tokens and, where text is to be written, the mask id V. t (B,) is the noise level here, the
probability of a mask (m in masked.py); it falls from 1 to 0. A sampler is a generator of canvases, one per
network call; `choose` draws its tokens, log p (..., V) -> ids (...). From `textbook` to ReMDM they are exact
for a perfect denoiser and many steps. The others reveal a fixed number per step, or as many as are safe.
"""
import functools
import itertools
from typing import Literal

import torch
import torch.nn.functional as F

from configurator import Fixed, Natural, NonNegative, Positive, Share, ShareAbove0, ShareBelow1, knobs_of
from parts import steered

Grid = Literal['linear', 'maskgit']  # see `noise_levels`
LARGEST = 2 ** 26                    # numbers that `sample_tokens` works on at once, to bound its memory


def textbook(denoise, xt, mask_id, steps, choose, *,
             grid: Grid = 'linear'):  # noise levels of the steps: linear | maskgit, few tokens first
    """The sampler of MDLM's paper (arXiv 2406.07524): a network call for every step.

    A token is masked at level t with probability t, at the lower level s with probability s. So of those
    that are masked at t, a share s / t still is at s, and (t - s) / t are revealed in between.
    """
    level = noise_levels(steps, grid, xt.device)  # 1 = t_0 > t_1 > ... > t_steps = 0
    for t, s in zip(level[:-1], level[1:]):
        logp = denoise(xt, t.float().expand(len(xt)))
        reveal = (xt == mask_id) & (torch.rand(xt.shape, device=xt.device) < (t - s) / t)
        xt = torch.where(reveal, choose(logp), xt)
        yield xt


# Of many steps most reveal nothing, and their calls are wasted. They can be left out, because *when* a token
# is revealed does not depend on *which* it is. Give each position a level u, uniform on [0, 1], and let it be
# masked while t > u: with probability t. The step from t to s reveals one that is masked at t with
# probability P(s <= u < t | u < t) = (t - s) / t, as above. So draw every u first, and call the denoiser only
# in the steps that reveal something, on the same canvas, at the same t as above. Each row of a batch goes
# from one of its own such steps to the next: at most T network calls for T tokens, whatever the steps.

def ancestral(denoise, xt, mask_id, steps, choose, *,
              grid: Grid = 'linear'):  # noise levels of the steps: linear | maskgit, few tokens first
    """Samples exactly as textbook, without the steps that reveal nothing: at most one call per token."""
    level = noise_levels(steps, grid, xt.device).flip(0).float()  # 0 ... 1
    u = torch.rand(xt.shape, device=xt.device)
    reveal_at = level[torch.bucketize(u, level, right=True).clamp(max=steps)]  # t of the step that crosses u
    return at_given_times(denoise, xt, mask_id, reveal_at, choose)


def first_hitting(denoise, xt, mask_id, steps, choose):
    """One token per call: ancestral in infinitely many steps (arXiv 2409.02908)."""
    return at_given_times(denoise, xt, mask_id, torch.rand(xt.shape, device=xt.device), choose)


def at_given_times(denoise, xt, mask_id, reveal_at, choose):
    """Reveal every token at its time, reveal_at (B, T) in [0, 1], the latest first."""
    times = reveal_at.where(xt == mask_id, -1).sort(descending=True).values
    last = (times != F.pad(times[:, 1:], (0, 1), value=-1)) & (times >= 0)  # of those at one time
    for _ in range(int(last.sum(-1).max())):  # known at once, so that nothing waits for the device later
        masked = xt == mask_id
        t = reveal_at.where(masked, 0).amax(-1)  # each row's next time; 0 for a row that is done
        xt = write(xt, masked & (reveal_at == t[:, None]), denoise(xt, t), choose)
        yield xt


def write(xt, which, logp, choose):
    """xt (B, T) with tokens drawn from log p (B, T, V) where `which` (B, T) bool."""
    if xt.device.type != 'cpu':  # to find out how many there are would wait for the device
        return torch.where(which, choose(logp), xt)
    return xt.masked_scatter(which, choose(logp[which]))


def analytic(scores, xt, mask_id, steps, choose, *,
             grid: Grid = 'linear'):  # noise levels of the steps: linear | maskgit, few tokens first
    """SEDD's own step, from scores that are not normalised (arXiv 2310.16834). l = scores(xt, t) is log p up
    to a constant, Z the sum of e^l. A token is revealed with probability Z (t - s) / t, as above if Z = 1.
    Where Z < 1, masks are left at the end; one more call writes them, as in SEDD's code."""
    level = noise_levels(steps, grid, xt.device)
    for t, s in zip(level, [*level[1:], None]):
        if not (reveal := xt == mask_id).any():
            return
        out = scores(xt, t.float().expand(len(xt)))
        if s is not None:
            chance = out.logsumexp(-1).exp() * ((t - s) / t)
            reveal = reveal & (torch.rand(xt.shape, device=xt.device) < chance)
        xt = write(xt, reveal, out, choose)
        yield xt


def noise_levels(steps, grid='linear', device=None):
    """1 = t_0 > ... > t_steps = 0 (steps + 1,), float64. linear | maskgit, a cosine: few tokens in the first
    steps, many in the last (MaskGIT arXiv 2202.04200, MD4 2406.04329)."""
    left = torch.arange(steps, -1, -1, dtype=torch.float64, device='cpu') / steps
    left = left if grid == 'linear' else torch.sin(torch.pi / 2 * left)
    return left.to(device, torch.float32 if device and device.type == 'mps' else torch.float64)


def sample_tokens(logp, temperature=1.0, top_k=0, top_p=1.0):
    """Tokens (...) from p (..., V) ** (1 / temperature), truncated; temperature 0: the likeliest. By a race:
    argmax of p / e with e = -log1p(-u) ~ Exp(1) has law p. In float32 the tail of e would be missing, as if
    the temperature were lower (arXiv 2409.02908)."""
    if temperature == 0:
        return logp.argmax(-1)
    if logp.numel() > LARGEST:
        some = logp.flatten(0, -2).split(max(1, LARGEST // logp.size(-1)))
        return torch.cat([sample_tokens(x, temperature, top_k, top_p) for x in some]).view(logp.shape[:-1])
    p = truncate(logp / temperature, top_k, top_p).softmax(-1, None if logp.is_mps else torch.float64)
    race = torch.rand_like(p).neg_().log1p_().neg_()  # in place: twice as fast for 50,000 tokens
    return p.div_(race.clamp_(min=torch.finfo(p.dtype).tiny)).argmax(-1)  # u = 0 must not make 0 / 0


def truncate(logp, top_k=0, top_p=1.0):
    """log p (..., V) with all but the top_k likeliest, or the fewest that hold mass top_p, at -inf."""
    if 0 < top_k < logp.size(-1):
        logp = logp.masked_fill(logp < logp.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        sorted_p, order = logp.softmax(-1).sort(descending=True)
        beyond = sorted_p.cumsum(-1) - sorted_p >= top_p  # the mass before this token is enough without it
        logp = logp.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logp


# ---- ReMDM (arXiv 2503.00307): ancestral, but written tokens go back to [MASK] now and then ---------------

def remdm(denoise, xt, mask_id, choose, level, sigma, remasks=itertools.repeat(True)):
    """In steps where `remasks` is true a written token is masked again with probability sigma(most, written).
    A masked one is revealed with probability (t - s + sigma (1 - t)) / t, so that the levels are t and s as
    before. most: the largest sigma possible; written (B, T): log p when it was written, inf where masked."""
    free, written = xt == mask_id, torch.full(xt.shape, torch.inf, device=xt.device)
    for t, s, remask in zip(level[:-1], level[1:], remasks):
        if (masked := xt == mask_id).any():
            logp = denoise(xt, t.float().expand(len(xt)))
        most = (s / (1 - t).clamp(min=1e-12)).clamp(max=1)  # 0 for the step from 1 to 0
        chance = sigma(most, written) if remask else torch.zeros_like(t)
        u = torch.rand(xt.shape, device=xt.device)
        reveal, forget = masked & (u < (t - s + chance * (1 - t)) / t), free & ~masked & (u < chance)
        xt = write(xt, reveal, logp, choose).masked_fill(forget, mask_id)
        p = logp.gather(-1, xt.clamp(max=mask_id - 1)[..., None])[..., 0]
        written = torch.where(reveal, p, written).masked_fill(xt == mask_id, torch.inf)
        if masked.any():
            yield xt


def remdm_cap(denoise, xt, mask_id, steps, choose, *,
              eta: NonNegative = 0.02,  # the largest sigma
              grid: Grid = 'linear'):   # noise levels of the steps: linear | maskgit, few tokens first
    """ReMDM, sigma = min(eta, the largest possible)."""
    level = noise_levels(steps, grid, xt.device)
    return remdm(denoise, xt, mask_id, choose, level, lambda most, written: most.clamp(max=eta))


def remdm_rescale(denoise, xt, mask_id, steps, choose, *,
                  eta: NonNegative = 0.02,  # sigma as a share of the largest possible
                  grid: Grid = 'linear'):   # noise levels of the steps: linear | maskgit, few tokens first
    """ReMDM, sigma = eta times the largest possible."""
    level = noise_levels(steps, grid, xt.device)
    return remdm(denoise, xt, mask_id, choose, level, lambda most, written: eta * most)


def remdm_conf(denoise, xt, mask_id, steps, choose, *,
               grid: Grid = 'linear'):  # noise levels of the steps: linear | maskgit, few tokens first
    """ReMDM, the largest possible sigma shared out in a row by softmax(-probability when written)."""
    level = noise_levels(steps, grid, xt.device)
    return remdm(denoise, xt, mask_id, choose, level,  # all masked: softmax of -inf alone, 0 / 0
                 lambda most, written: most * (-written.exp()).softmax(-1).nan_to_num())


def remdm_loop(denoise, xt, mask_id, steps, choose, *,
               eta: NonNegative = 0.02,  # the largest sigma
               on: ShareBelow1 = 0.55,   # time, from 1 down to 0, at which remasking begins
               off: ShareAbove0 = 0.05,  # time at which it ends
               alpha_on: Share = 0.9):   # share of tokens that are written from on to off
    """ReMDM at a constant level: down to 1 - alpha_on without remasking, stay there and remask from time on
    to off, sigma as in remdm_cap, then down to 0 without."""
    time = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    level = torch.where(time > on, 1 - (1 - time) * alpha_on / (1 - on),
                        (1 - alpha_on) * (time / off).clamp(max=1)).float().to(xt.device)
    return remdm(denoise, xt, mask_id, choose, level, lambda most, written: most.clamp(max=eta),
                 remasks=(time[:-1] <= on) & (time[1:] >= off))


# ---- a fixed number of tokens per step ------------------------------------------------------------------
# rule: (which tokens are first, log p (B, T, V) before temperature -> score (B, T); None: the drawn log p)
ORDERS = {
    'random': ("in a random order", lambda logp: torch.zeros_like(logp[..., 0])),
    'confidence': ("first where the likeliest token is the surest", lambda logp: logp.amax(-1)),
    'llada': ("first where the drawn token is the surest (LLaDA arXiv 2502.09992)", None),
    'margin': ("first where the likeliest token is the furthest ahead of the second",
               lambda logp: -logp.topk(min(2, logp.size(-1))).values.exp().diff(dim=-1).sum(-1)),
    'entropy': ("first where the prediction has the least entropy",
                lambda logp: torch.special.xlogy(p := logp.exp(), p).sum(-1))}


def ranks(score, candidates):
    """Rank of each candidate of a row, 0 the highest score; ties at random, others last. (B, T) int64."""
    shuffle = torch.rand(score.shape, device=score.device).argsort(-1)
    score = score.masked_fill(~candidates, -torch.inf).gather(1, shuffle)
    return shuffle.gather(1, score.argsort(dim=-1, descending=True, stable=True)).argsort(-1)


def best_of_stretches(rank, left, k):
    """Of the candidates of row b, cut into k[b] stretches of equally many, the first of each by rank, (B, T)
    bool. Tokens that are drawn at once do not know of each other; neighbours should."""
    number = (left.cumsum(-1) - 1).clamp(min=0) * k[:, None] // left.sum(-1, keepdim=True).clamp(min=1)
    best = torch.full_like(rank, rank.size(1)).scatter_reduce(1, number, rank, 'amin')
    return left & (rank == best.gather(1, number)) & (k[:, None] > 0)


def tokens_a_step(n, level):
    """How many of n positions each step reveals, (B, steps) integers that add up to n (B,): after the step
    to level t, floor(n t) are left. Steps that reveal none come last, or go if they do so in all rows."""
    k = -(n[:, None] * level + 1e-9).floor().long().diff(dim=-1)
    k = k.gather(1, (k == 0).byte().argsort(dim=-1, stable=True))
    return k[:, k.any(0)]


def parts(masked, part_length):
    """LLaDA's blocks: the masked positions of one stretch of part_length after the other, each row's counted
    from its first mask, that is from the end of its prompt: (B, T) bool each; 0: all at once."""
    place = torch.arange(masked.size(1), device=masked.device)
    number = (place - masked.long().argmax(-1, keepdim=True)) // (part_length or masked.size(1))
    for i in range(int(number.max()) + 1):
        if (part := masked & (number == i)).any():
            yield part


def shares(steps, sizes):
    """The steps shared out among parts of these many tokens to write: one each, the others in proportion to
    the tokens beyond the first. One step per token where there are as many; equal parts get equal shares."""
    spare, beyond = max(0, steps - len(sizes)), max(1, sum(sizes) - len(sizes))
    upto = [0, *itertools.accumulate(size - 1 for size in sizes)]
    upto = [(2 * spare * tokens + beyond) // (2 * beyond) for tokens in upto]  # rounded to the nearest
    return [1 + b - a for a, b in itertools.pairwise(upto)]


def best_first(denoise, xt, mask_id, steps, choose, *, score,
               grid: Grid = 'linear',      # tokens per step: linear, equal | maskgit, few first
               apart: bool = False,        # a step's tokens far apart: one in each of equal stretches
               part_length: Natural = 0,   # fill one part of this many tokens at a time; 0: all
               last: Fixed[tuple] = ()):   # ids that are written when nothing else is left
    """As many tokens per step as the grid says, those with the highest scores; part after part with its
    share of the steps (LLaDA's generate.py: of equal parts, steps / parts each)."""
    in_turn = list(parts(xt == mask_id, part_length))
    for part, share in zip(in_turn, shares(steps, [int(part.sum(-1).max()) for part in in_turn])):
        for k in tokens_a_step(part.sum(-1), noise_levels(share, grid, xt.device)).T:
            logp, left = denoise(xt, (masked := xt == mask_id).float().mean(-1)), masked & part
            ids = None if score else write(xt, left, logp, choose)  # LLaDA ranks what it has drawn
            drawn = lambda logp: logp.gather(-1, ids.clamp(max=mask_id - 1)[..., None])[..., 0]
            rank = ranks(steered.late(score or drawn, logp, last), left)
            first = left & (best_of_stretches(rank, left, k) if apart else rank < k[:, None])
            xt = write(xt, first, logp, choose) if score else torch.where(first, ids, xt)
            yield xt


# ---- as many tokens per step as are safe, at least one ----------------------------------------------------

def safest(denoise, xt, mask_id, choose, part_length, last, order, safe):
    """The first tokens of each row in this order, up to the last that is safe, as often as it takes. safe:
    (scores (B, T) of the candidates from the highest down, then others; their numbers 1 ... T) -> bool."""
    score, n = ORDERS[order][1], torch.arange(1, xt.size(1) + 1, device=xt.device)
    for part in parts(xt == mask_id, part_length):
        while (left := part & (xt == mask_id)).any():
            logp = denoise(xt, (xt == mask_id).float().mean(-1))
            rank = ranks(value := steered.late(score, logp, last), left)
            able = safe(value.gather(1, rank.argsort(-1)), n) & (n <= left.sum(-1, keepdim=True))
            reveal = left & (rank < torch.where(able, n, 1).amax(-1, keepdim=True))
            xt = write(xt, reveal, logp, choose)
            yield xt


def threshold(denoise, xt, mask_id, steps, choose, *,
              threshold: Share = 0.9,     # reveal tokens above this probability
              part_length: Natural = 0,   # fill one part of this many tokens at a time; 0: all
              last: Fixed[tuple] = ()):   # ids that are written when nothing else is left
    """Reveal all tokens above a probability, at least one (Fast-dLLM arXiv 2505.22618)."""
    return safest(denoise, xt, mask_id, choose, part_length, last, 'confidence',
                  lambda c, n: c.exp() > threshold)


def factor(denoise, xt, mask_id, steps, choose, *,
           factor: NonNegative = 1.0,  # larger: more tokens per step
           part_length: Natural = 0,   # fill one part of this many tokens at a time; 0: all
           last: Fixed[tuple] = ()):   # ids that are written when nothing else is left
    """Reveal the n surest tokens, n the largest with (n + 1) (1 - p_n) < factor (arXiv 2505.22618)."""
    return safest(denoise, xt, mask_id, choose, part_length, last, 'confidence',
                  lambda c, n: (n + 1) * (1 - c.exp()) < factor)


def eb(denoise, xt, mask_id, steps, choose, *,
       gamma: NonNegative = 0.1,   # bound in nats on the entropies of tokens drawn together
       part_length: Natural = 0,   # fill one part of this many tokens at a time; 0: all
       last: Fixed[tuple] = ()):   # ids that are written when nothing else is left
    """Entropy-bounded: the positions of least entropy whose sum without the largest is gamma (2505.24857)."""
    return safest(denoise, xt, mask_id, choose, part_length, last, 'entropy',
                  lambda score, n: (H := -score).cumsum(-1) - H <= gamma)


RULES = {f.__name__: f for f in (textbook, ancestral, first_hitting, analytic, remdm_cap, remdm_rescale,
                                 remdm_conf, remdm_loop, threshold, factor, eb)}
for name, (words, score) in ORDERS.items():
    RULES[name] = functools.partial(best_first, score=score)
    RULES[name].__doc__ = f"A fixed number of tokens per step, {words}."


def unmask(denoise, xt, mask_id, steps, rule='ancestral', temperature=1.0, top_k=0, top_p=1.0, *,
           cfg: NonNegative = 0.0,  # guidance towards the given text; 0: none
           repetition_penalty: Positive = 1.0,  # above 1: what is written already is less likely
           never: Fixed[tuple] = (),  # ids that are not written
           **knobs):
    """Generator of canvases (B, T), one per network call; the last holds no mask id, given tokens stay. rule:
    of RULES, knobs: its own; cfg, repetition_penalty, never: parts/steered.py. Raises ValueError."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of: {', '.join(RULES)}")
    for name in knobs:
        if name not in (own := knobs_of(RULES[rule])):
            raise ValueError(f"{name} is not for rule={rule}, whose knobs are: {', '.join(own) or 'none'}")
    if (given := xt != mask_id).all():
        return iter(())
    if cfg and (rule == 'analytic' or not given.any()):
        raise ValueError("cfg guides towards a given text (--start) by probabilities (not rule=analytic)")
    denoise = steered.guided(denoise, given, mask_id, cfg) if cfg else denoise
    denoise = steered.without(denoise, never) if never else denoise
    denoise = steered.without_repeating(denoise, repetition_penalty) if repetition_penalty != 1 else denoise
    choose = functools.partial(sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    return RULES[rule](denoise, xt, mask_id, steps, choose, **knobs)
