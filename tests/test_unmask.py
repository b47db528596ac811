"""Samplers against enumerated joints. A chi-square test raises a false alarm once in 10,000; the seeds are
fixed."""
import itertools
import math

import pytest
import torch

import ar
import configurator
import d3pm
import unmask
from parts import steered
from conftest import Joint, chi_square_p


def last(generator):
    for x in generator:
        pass
    return x


@pytest.mark.parametrize('rule, steps', [('ancestral', 10 ** 6), ('random', 3), ('confidence', 3),
                                         ('margin', 3), ('entropy', 3), ('random', 50),
                                         ('first_hitting', 1), ('analytic', 300), ('eb', 1)])
def test_one_token_a_step_with_exact_conditionals_draws_the_joint_in_any_order(joint, rule, steps):
    torch.manual_seed(0)
    blank = torch.full((20000, joint.T), joint.V)
    knobs = dict(gamma=0.0) if rule == 'eb' else {}
    x = last(unmask.unmask(joint.denoise, blank, joint.V, steps, rule, **knobs))
    assert chi_square_p(x, joint.p, joint.V) > 1e-4


def law_of_steps(joint, level):
    """The law of the texts after steps down these levels, by enumeration: every position is revealed in one
    of the steps, in that from t to s with probability t - s, whatever the others do."""
    law, mask = torch.zeros_like(joint.p), torch.full_like(joint.x, joint.V)
    width = [t - s for t, s in itertools.pairwise(level.tolist())]
    for when in itertools.product(range(len(width)), repeat=joint.T):  # the step of each position
        p, when = torch.ones_like(joint.p), torch.tensor(when)
        for i in set(when.tolist()):
            logp = joint.logp(torch.where(when < i, joint.x, mask))
            p = p * torch.where(when == i, logp.gather(-1, joint.x[..., None])[..., 0].exp(), 1).prod(-1)
        law += p * math.prod(width[i] for i in when.tolist())
    return law


@pytest.mark.parametrize('rule', ['textbook', 'ancestral'])
@pytest.mark.parametrize('steps, grid', [(2, 'linear'), (3, 'linear'), (3, 'maskgit')])
def test_textbook_and_ancestral_steps_have_the_law_that_enumeration_gives(joint, rule, steps, grid):
    torch.manual_seed(0)
    law = law_of_steps(joint, unmask.noise_levels(steps, grid))
    assert abs(law.sum() - 1) < 1e-12 and (law - joint.p).abs().max() > 1e-3
    x = last(unmask.unmask(joint.denoise, torch.full((40000, 3), 3), 3, steps, rule, grid=grid))
    assert chi_square_p(x, law, 3) > 1e-4
    assert chi_square_p(x, joint.p, 3) < 1e-4  # the test can tell the two apart


def test_the_textbook_asks_the_network_at_every_step_and_ancestral_where_something_is_revealed():
    """In both every token's own level is crossed in the step that reveals it: 4 standard errors of the share
    that each step reveals of 100,000 tokens."""
    for rule, grid in itertools.product(('textbook', 'ancestral'), ('linear', 'maskgit')):
        torch.manual_seed(0)
        canvases, times = [torch.full((1, 100000), 1)], []
        denoise = lambda xt, t: times.append(t.item()) or torch.zeros(*xt.shape, 1)
        canvases += unmask.unmask(denoise, canvases[0], 1, 5, rule, grid=grid)
        level = unmask.noise_levels(5, grid)
        assert times == pytest.approx(level[:-1].tolist())
        for (before, after), width in zip(itertools.pairwise(canvases), -level.diff(), strict=True):
            assert abs((before != after).double().mean() - width) < 4 * 0.5 / 100000 ** 0.5
    few = torch.full((1, 2), 1)
    assert len(list(unmask.unmask(denoise, few, 1, 50, 'textbook'))) == 50
    assert len(list(unmask.unmask(denoise, few, 1, 50, 'ancestral'))) <= 2


def test_given_tokens_condition_the_joint_and_never_change(joint):
    torch.manual_seed(0)
    given = torch.tensor([joint.V, 1, joint.V])
    conditional = joint.p * (joint.x[:, 1] == 1)
    keep = conditional > 0
    x = given.expand(20000, 3)
    for x in unmask.unmask(joint.denoise, x, joint.V, 10 ** 6, 'ancestral'):
        assert (x[:, 1] == 1).all()
    pairs = x[:, [0, 2]]
    assert chi_square_p(pairs, conditional[keep] / conditional.sum(), joint.V) > 1e-4


def test_autoregressive_sampling_draws_the_distribution_that_nats_reports():
    torch.manual_seed(0)
    joint = Joint()
    model = ar.Model(ar.Config(vocab_size=3, block_size=3, n_layer=2, n_head=1, n_embd=8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    p = (-model.nats(joint.x)).exp().double().detach()
    assert abs(p.sum() - 1) < 1e-5
    x = last(model.sample(torch.full((40000, 3), 3), steps=1))
    assert chi_square_p(x, p / p.sum(), 3) > 1e-4


@pytest.mark.parametrize('B', [1, 7])
def test_a_thousand_steps_on_256_tokens_cost_at_most_256_calls_at_any_batch_size(B):
    torch.manual_seed(0)
    calls = []
    denoise = lambda xt, t: calls.append(t) or torch.zeros(*xt.shape, 4).log_softmax(-1)
    x = last(unmask.unmask(denoise, torch.full((B, 256), 4), 4, 1000))
    assert len(calls) <= 256 and (x < 4).all()
    assert all((a > b)[b > 0].all() for a, b in zip(calls, calls[1:]))  # every row's own time falls


def test_the_number_of_steps_of_a_row_that_reveal_something_has_the_mean_that_theory_gives():
    """T (1 - (1 - 1/T)^L) for a row of any batch (MDLM); 4 standard errors."""
    torch.manual_seed(0)
    canvases = [torch.full((4000, 20), 2)]
    denoise = lambda xt, t: torch.zeros(*xt.shape, 2).log_softmax(-1)
    canvases += unmask.unmask(denoise, canvases[0], 2, 30)
    own = sum((a != b).any(-1).double() for a, b in zip(canvases, canvases[1:]))
    assert abs(own.mean() - 30 * (1 - (1 - 1 / 30) ** 20)) < 4 * own.std() / 4000 ** 0.5


def test_a_single_sample_costs_the_calls_that_theory_gives_and_a_batch_the_most_of_its_rows():
    """The denoiser's calls themselves, counted; 4 standard errors."""
    torch.manual_seed(0)
    calls = []
    denoise = lambda xt, t: calls.append(len(xt)) or torch.zeros(*xt.shape, 2).log_softmax(-1)
    for steps in (5, 12, 60):
        numbers = []
        for _ in range(300):
            calls.clear()
            last(unmask.unmask(denoise, torch.full((1, 12), 2), 2, steps))
            numbers.append(len(calls))
        numbers = torch.tensor(numbers).double()
        theory = steps * (1 - (1 - 1 / steps) ** 12)
        assert abs(numbers.mean() - theory) < 4 * numbers.std() / 300 ** 0.5 + 1e-9
        calls.clear()
        last(unmask.unmask(denoise, torch.full((500, 12), 2), 2, steps))
        assert numbers.max() - 2 <= len(calls) <= 12  # 500 rows cost no more calls than their busiest


def test_every_row_goes_from_one_of_its_own_steps_to_the_next():
    torch.manual_seed(0)
    xt, times = torch.where(torch.rand(50, 9) < 0.7, 4, 1), []
    denoise = lambda xt, t: times.append(t) or torch.zeros(*xt.shape, 4).log_softmax(-1)
    canvases = [xt, *unmask.unmask(denoise, xt, 4, 5)]
    level = unmask.noise_levels(5).float()
    for (before, after), t in zip(itertools.pairwise(canvases), times, strict=True):
        done = (before < 4).all(-1)
        assert torch.isin(t[~done], level[:-1]).all() and (t[done] == 0).all()
        assert ((before != after).any(-1) == ~done).all()  # no call is in vain but for a row that is done
    assert all((a > b)[b > 0].all() for a, b in zip(times, times[1:]))


@pytest.mark.parametrize('apart', [False, True])
@pytest.mark.parametrize('rule', unmask.ORDERS)
@pytest.mark.parametrize('steps', [1, 3, 4, 10, 25])
def test_ordered_rules_reveal_exact_counts_and_leave_no_mask(rule, steps, apart):
    torch.manual_seed(0)
    logits = torch.randn(4, 10, 5)
    xt = torch.full((4, 10), 5)
    xt[:, 0], xt[2:, 5] = 3, 2  # given tokens, more in some rows
    left = [xt.eq(5).sum(-1)]
    for x in unmask.unmask(lambda xt, t: logits.log_softmax(-1), xt, 5, steps, rule, apart=apart):
        left.append(x.eq(5).sum(-1))
        assert (x[:, 0] == 3).all() and (x[2:, 5] == 2).all()
    revealed = -torch.stack(left).diff(dim=0)
    assert left[-1].sum() == 0 and len(revealed) == min(steps, 9)
    for row, n in zip(revealed.T, left[0]):
        after = [int(n) * (steps - i) // steps for i in range(steps + 1)]
        shares = [a - b for a, b in zip(after, after[1:])]
        assert max(shares) - min(shares) <= 1
        assert [k for k in row.tolist() if k] == [k for k in shares if k] and row.sum() == n


@pytest.mark.parametrize('counts', [(1, 1), (2, 3), (4, 0), (7, 5)])
def test_apart_takes_the_first_of_every_stretch_by_hand(counts):
    torch.manual_seed(0)
    left, k = torch.rand(2, 12) < 0.8, torch.tensor(counts)
    rank = unmask.ranks(torch.rand(2, 12), left)
    chosen = unmask.best_of_stretches(rank, left, k)
    for row in range(2):
        places = left[row].nonzero()[:, 0].tolist()
        expected = []
        for i in range(counts[row]):  # the i-th of k equal parts of the list
            part = [p for number, p in enumerate(places) if number * counts[row] // len(places) == i]
            expected.append(min(part, key=lambda p: rank[row, p].item()))
        assert chosen[row].nonzero()[:, 0].tolist() == expected


def test_ties_are_broken_at_random_not_left_to_right():
    torch.manual_seed(0)
    first = unmask.ranks(torch.zeros(6000, 6), torch.ones(6000, 6, dtype=torch.bool)) == 0
    assert ((first.double().mean(0) - 1 / 6).abs() < 4 * (5 / 36 / 6000) ** 0.5).all()  # false alarm 4e-4


def test_scores_prefer_the_surest_position():
    logp = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.45, 0.05], [0.45, 0.28, 0.27]]).log()[None]
    score = lambda order, logp: unmask.ORDERS[order][1](logp)
    assert score('confidence', logp).argmax() == 1
    assert score('margin', logp).argmax() == 2
    assert score('entropy', logp).argmax() == 1
    assert torch.allclose(score('margin', logp), torch.tensor([[0.1, 0.05, 0.17]]))
    assert torch.allclose(score('entropy', torch.tensor([[[0.0, -torch.inf]]])), torch.zeros(1, 1))


def test_llada_writes_first_the_token_that_is_the_surest_of_those_drawn():
    logp = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.45, 0.05], [0.45, 0.28, 0.27]]).log()[None]
    drawn = torch.tensor([[0, 2, 1]])  # their probabilities: 0.4, 0.05, 0.28
    frames = unmask.best_first(lambda xt, t: logp, torch.full((1, 3), 3), 3, 3, score=None,
                               choose=lambda p: drawn[0, (logp[0] == p[:, None]).all(-1).long().argmax(-1)])
    assert [x.tolist() for x in frames] == [[[0, 3, 3]], [[0, 3, 1]], [[0, 2, 1]]]


def test_rows_of_a_batch_do_not_influence_each_other(joint):
    """Rows that are given nearly everything finish early; the joint of the others is untouched."""
    torch.manual_seed(0)
    xt = torch.full((40000, 3), joint.V)
    xt[::2] = joint.x[4]
    x = last(unmask.unmask(joint.denoise, xt, joint.V, 10 ** 6))
    assert (x[::2] == joint.x[4]).all() and chi_square_p(x[1::2], joint.p, joint.V) > 1e-4


def test_sampling_a_token_is_categorical_down_to_the_rare_tokens():
    torch.manual_seed(0)
    p = torch.tensor([0.9, 0.0999, 1e-4]).double()
    x = unmask.sample_tokens(p.log().float().expand(400000, 3))
    assert chi_square_p(x[:, None], p, 3) > 1e-4


def test_drawing_in_parts_draws_each_from_its_own_row(monkeypatch):
    monkeypatch.setattr(unmask, 'LARGEST', 12)
    token = torch.randint(5, (7, 3))
    logp = torch.full((7, 3, 5), -torch.inf).scatter(-1, token[..., None], 0.0)
    assert torch.equal(unmask.sample_tokens(logp), token)


def test_a_big_vocabulary_of_unlikely_tokens_stays_unlikely():
    """50,000 tokens with 5e-7 together: one of them is drawn in 1,000 draws once in 2,000 runs. Noise in
    float32 has zeros, which make any token win: 2 draws. The seed is fixed."""
    torch.manual_seed(0)
    logp = torch.full((50001,), 1e-11).log()
    logp[7] = 0.0
    assert (unmask.sample_tokens(logp.expand(1000, -1)) == 7).all()


def test_temperature_zero_is_the_best_token_and_temperature_sharpens():
    logp = torch.tensor([0.5, 0.3, 0.2]).log().expand(40000, 3)
    assert (unmask.sample_tokens(logp, temperature=0) == 0).all()
    torch.manual_seed(0)
    sharp = torch.tensor([0.25, 0.09, 0.04]).double()
    assert chi_square_p(unmask.sample_tokens(logp, temperature=0.5)[:, None], sharp / sharp.sum(), 3) > 1e-4


def test_top_k_and_top_p_keep_what_they_say():
    logp = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = lambda **how: unmask.truncate(logp, **how).isfinite().tolist()
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_p=0.4) == [False, True, False, False]
    assert kept(top_p=0.41) == [False, True, False, True]
    assert kept(top_p=0.95) == [True, True, True, True]
    assert kept(top_k=0, top_p=1.0) == [True] * 4 and kept(top_p=1e-9) == [False, True, False, False]


# ---- the rules one by one ---------------------------------------------------------------------------------

LOGP = torch.tensor([[0.97, 0.02, 0.01], [0.6, 0.3, 0.1], [0.9, 0.06, 0.04], [0.4, 0.3, 0.3]]).log()[None]
ALL = torch.ones(1, 4, dtype=torch.bool)


def picked(rule, logp, candidates, **knobs):
    """What a rule reveals in its first step where `candidates` (B, T) are masked: (B, T) bool."""
    V = logp.size(-1)
    xt = torch.zeros(candidates.shape, dtype=torch.long).masked_fill(candidates, V)
    first = next(unmask.unmask(lambda xt, t: logp, xt, V, 1, rule, **knobs))
    return candidates & (first < V)


def test_threshold_takes_every_sure_position_and_at_least_one():
    assert picked('threshold', LOGP, ALL, threshold=0.85).tolist() == [[True, False, True, False]]
    assert picked('threshold', LOGP, ALL, threshold=0.99).tolist() == [[True, False, False, False]]
    some = torch.tensor([[False, True, False, True]])
    assert picked('threshold', LOGP, some, threshold=0.99).tolist() == [[False, True, False, False]]


def test_the_factor_rule_takes_the_largest_n_that_its_inequality_allows():
    """(n + 1) (1 - c_n): 2 * 0.03, 3 * 0.1, 4 * 0.4, 5 * 0.6."""
    for factor, n in ((0.05, 1), (0.29, 1), (0.31, 2), (1.59, 2), (1.61, 3), (2.9, 3), (3.1, 4)):
        revealed = picked('factor', LOGP, ALL, factor=factor)[0]
        assert revealed.tolist() == [n > rank for rank in (0, 2, 1, 3)], factor


def test_entropy_bounded_takes_the_prefix_whose_entropy_but_for_the_largest_is_within_gamma():
    a, b, c, _ = (-(LOGP.exp() * LOGP).sum(-1))[0].sort().values.tolist()
    for gamma, n in ((0.0, 1), (a - 1e-4, 1), (a + 1e-4, 2), (a + b + 1e-4, 3), (a + b + c + 1e-4, 4)):
        assert picked('eb', LOGP, ALL, gamma=gamma).sum() == n


@pytest.mark.parametrize('rule, knobs', [('threshold', dict(threshold=0.9)), ('factor', dict(factor=1.0)),
                                         ('eb', dict(gamma=0.1))])
def test_what_is_safe_in_a_row_does_not_depend_on_the_batch(rule, knobs):
    torch.manual_seed(0)
    logp, candidates = (torch.randn(50, 9, 4) * 4).log_softmax(-1), torch.rand(50, 9) < 0.6
    together = picked(rule, logp, candidates, **knobs)
    alone = torch.cat([picked(rule, a[None], b[None], **knobs) if b.any() else b[None]
                       for a, b in zip(logp, candidates)])
    assert (together.any(-1) == candidates.any(-1)).all() and torch.equal(together, alone)


def test_the_sure_rules_end_when_all_is_written_whatever_the_steps(joint):
    calls = lambda steps, rule, **knobs: len(list(unmask.unmask(
        joint.denoise, torch.full((4, 3), 3), 3, steps, rule, **knobs)))
    assert calls(50, 'threshold', threshold=1e-9) == calls(50, 'factor', factor=1e9) == 1
    assert calls(1, 'threshold', threshold=1.0) == calls(1, 'factor', factor=0.0) == 3
    assert calls(50, 'eb', gamma=1e9) == 1 and calls(1, 'eb', gamma=0.0) == 3


def test_analytic_steps_reveal_by_the_sum_of_the_scores_and_a_call_more_writes_what_is_left():
    """Shares of 40,000 masks after each of 4 steps; 4 standard errors of at most 0.01. With Z < 1 masks are
    left, and the network is asked once more at the end of time (SEDD's Denoiser)."""
    torch.manual_seed(0)
    for Z in (1.0, 0.5, 1.5):
        times = []

        def scores(xt, t):
            times.append(t.item())
            return torch.full((*xt.shape, 4), Z / 4).log()
        left = [x.eq(4).double().mean() for x in
                unmask.unmask(scores, torch.full((1, 40000), 4), 4, 4, 'analytic')]
        expected = torch.tensor([1 - min(1, Z / k) for k in (4, 3, 2, 1)]).cumprod(0)
        assert all(abs(a - b) < 0.01 for a, b in zip(left, expected)) and left[-1] == 0
        assert times == [1.0, 0.75, 0.5, 0.25] + [0.0] * (Z < 1)


def test_what_the_last_call_of_the_analytic_sampler_writes_comes_from_the_canvas_it_sees():
    """A network that names the number of masks it sees: the tokens of the last call are of that canvas."""
    torch.manual_seed(0)

    def scores(xt, t):
        n = (xt == 200).sum(-1).clamp(max=199)
        return torch.nn.functional.one_hot(n, 200)[:, None].expand(-1, xt.size(1), -1).float().mul(0.4).log()
    *_, before, end = unmask.unmask(scores, torch.full((1, 150), 200), 200, 3, 'analytic')
    asked = before == 200
    assert asked.any() and (end[asked] == asked.sum()).all() and torch.equal(end[~asked], before[~asked])


def test_scores_that_are_not_normalised_are_for_some_models_alone():
    with pytest.raises(ValueError, match='d3pm'):
        model = d3pm.Model(d3pm.Config(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4, T=10))
        next(model.sample(torch.full((1, 4), 3), 4, 'analytic'))


def test_normalised_scores_make_the_analytic_step_the_ancestral_one(joint):
    """Two steps: the law by enumeration, as for ancestral above."""
    torch.manual_seed(0)
    blank = torch.full((30000, joint.T), joint.V)
    a, b = (last(unmask.unmask(joint.denoise, blank, 3, 2, rule)) for rule in ('ancestral', 'analytic'))
    a, b = (torch.bincount(x @ torch.tensor([9, 3, 1]), minlength=27).double() for x in (a, b))
    statistic = ((a - b) ** 2 / (a + b)).sum()  # two samples of equal size: chi-square with 26 degrees
    assert torch.special.gammaincc(torch.tensor(13.0), statistic / 2) > 1e-4


# ---- ReMDM ------------------------------------------------------------------------------------------------

def remdm_law(joint, path, sigma_of):
    """The law of the texts after steps of levels (t, s, sigma), by enumeration of all 4^3 canvases and all
    moves between them, from the published posterior (arXiv 2503.00307, eq. 5)."""
    V, canvases = joint.V, list(itertools.product(range(joint.V + 1), repeat=joint.T))
    p = joint.logp(torch.tensor(canvases)).exp()
    law = torch.zeros(len(canvases), dtype=torch.float64)
    law[canvases.index((V,) * joint.T)] = 1.0
    for t, s, remask in path:
        a, b, sigma = 1 - t, 1 - s, sigma_of(t, s) if remask else 0.0  # alpha_t, alpha_s
        move = torch.zeros(len(canvases), len(canvases), dtype=torch.float64)
        for i, z in enumerate(canvases):
            one = []  # of every position: the law of its next state
            for j, v in enumerate(z):
                q = torch.zeros(V + 1, dtype=torch.float64)
                if v < V:
                    q[v], q[V] = 1 - sigma, sigma
                else:
                    q[:V], q[V] = (b - (1 - sigma) * a) / (1 - a) * p[i, j], (1 - b - sigma * a) / (1 - a)
                one.append(q)
            move[i] = torch.einsum('a,b,c->abc', *one).flatten()
        law = law @ move
    keep = [i for i, z in enumerate(canvases) if V not in z]
    return law[keep]


@pytest.mark.parametrize('rule', ['remdm_cap', 'remdm_rescale', 'remdm_loop'])
def test_a_few_steps_of_remasking_have_the_law_that_enumeration_gives(rule):
    torch.manual_seed(0)
    joint, eta, steps = Joint(seed=3), 0.4, 6
    most = lambda t, s: min(1.0, s / (1 - t)) if t < 1 else 1.0 * (s > 0)
    even = [(1 - i / steps, 1 - (i + 1) / steps, True) for i in range(steps)]
    path = {'remdm_cap': even, 'remdm_rescale': even}.get(rule)
    capped, rescaled = (lambda t, s: min(eta, most(t, s))), (lambda t, s: eta * most(t, s))
    sigma = rescaled if rule == 'remdm_rescale' else capped
    knobs = dict(eta=eta)
    if path is None:  # times 1 .. 0 in sixths: above `on` down to 0.4, from 2/3 to 1/3 stay there, then to 0
        knobs |= dict(on=4 / 6, off=2 / 6, alpha_on=0.6)
        path = [(1.0, 0.7, False), (0.7, 0.4, False), (0.4, 0.4, True), (0.4, 0.4, True),
                (0.4, 0.2, False), (0.2, 0.0, False)]
    law = remdm_law(joint, path, sigma)
    assert abs(law.sum() - 1) < 1e-9
    x = last(unmask.unmask(joint.denoise, torch.full((100000, 3), 3), 3, steps, rule, **knobs))
    assert chi_square_p(x, law, 3) > 1e-4
    for other in (lambda t, s: 0.0, lambda t, s: sigma(t, s) / 2):  # the test can tell other laws apart
        assert chi_square_p(x, remdm_law(joint, path, other), 3) < 1e-3


def test_many_small_steps_of_remasking_draw_the_joint():
    """By enumeration, without noise: the law approaches the joint as the steps get smaller."""
    joint = Joint(V=2)
    distance = []
    for n in (4, 16, 64):
        law = remdm_law(joint, [(1 - i / n, 1 - (i + 1) / n, True) for i in range(n)],
                        lambda t, s: 0.5 / n * (s > 0))
        distance.append((law - joint.p).abs().sum().item())
    assert distance[0] > 2.5 * distance[1] > 6 * distance[2]


def test_a_step_of_remasking_leaves_the_noise_level_where_the_grid_says():
    denoise = lambda xt, t: torch.zeros(*xt.shape, 4).log_softmax(-1)
    for sigma in (0.0, 0.1, 1.0):  # 1: as much as possible
        torch.manual_seed(0)
        before, xs = unmask.remdm(denoise, torch.full((1, 200000), 4), 4, unmask.sample_tokens,
                                  torch.tensor([1.0, 0.6, 0.5]), lambda most, written: most.clamp(max=sigma))
        assert abs((before == 4).double().mean() - 0.6) < 4 * (0.24 / 200000) ** 0.5
        assert abs((xs == 4).double().mean() - 0.5) < 4 * (0.25 / 200000) ** 0.5 * 2
        went = ((before < 4) & (xs == 4)).double().sum() / (before < 4).sum()
        assert abs(went - sigma) < 4 * (0.25 / 80000) ** 0.5


@pytest.mark.parametrize('rule', [r for r in unmask.RULES if r.startswith('remdm')])
def test_remasking_spares_given_tokens_and_leaves_no_mask(joint, rule):
    torch.manual_seed(0)
    xt = torch.full((50, 3), 3)
    xt[:, 1] = 2
    frames = list(unmask.unmask(joint.denoise, xt, 3, 40, rule))
    assert all((x[:, 1] == 2).all() for x in frames) and (frames[-1] < 3).all()
    written_again = sum(((a < 3) & (b == 3)).sum() for a, b in zip(frames, frames[1:]))
    assert written_again > 0


def test_remasking_knows_how_likely_each_token_was_when_it_was_written(joint):
    torch.manual_seed(0)
    canvases, seen, said = [torch.full((40, 3), 3)], [], []

    def sigma(most, written):
        seen.append(written)
        return most * 0.5

    def denoise(xt, t):
        said.append(joint.denoise(xt, t))
        return said[-1]
    level = unmask.noise_levels(8)[:-1]  # masks are left, so every step asks the denoiser
    canvases += unmask.remdm(denoise, canvases[0], 3, unmask.sample_tokens, level, sigma)
    assert len(canvases) == len(seen) + 1 and any(((a < 3) & (b == 3)).any()
                                                  for a, b in zip(canvases, canvases[1:]))
    expected = torch.full((40, 3), torch.inf)
    for before, after, written, logp in zip(canvases, canvases[1:], seen, said):
        assert torch.allclose(written, expected)
        p = logp.gather(-1, after.clamp(max=2)[..., None])[..., 0]
        expected = torch.where(after == 3, torch.inf, torch.where(before == 3, p, expected))


def test_remasking_by_confidence_prefers_the_tokens_that_were_unlikely():
    torch.manual_seed(0)
    p = torch.tensor([[0.9, 0.1]]).log()
    denoise = lambda xt, t: p.expand(*xt.shape, 2)
    gone = torch.zeros(2)
    for _ in range(300):
        frames = list(unmask.unmask(denoise, torch.full((1, 30), 2), 2, 10, 'remdm_conf'))
        for a, b in zip(frames, frames[1:]):
            for v in (0, 1):
                gone[v] += ((a == v) & (b == 2)).sum()
    assert gone[1] / gone[0] > 1.4 * 0.1 / 0.9


# ---- guidance, grids and blocks ---------------------------------------------------------------------------

def test_guidance_of_scale_0_changes_nothing_and_more_moves_towards_the_given(joint):
    torch.manual_seed(0)
    xt = torch.tensor([[1, 3, 3], [0, 3, 2]])
    given, t = xt != 3, torch.full((2,), 0.6)
    plain = joint.denoise(xt, t)
    none = steered.guided(joint.denoise, given, 3, 0.0)(xt, t)
    assert torch.allclose(none.exp(), plain.exp())
    without = joint.denoise(torch.full_like(xt, 3), t)
    twice = steered.guided(joint.denoise, given, 3, 1.0)(xt, t)[0, 1]
    assert torch.allclose(twice, (2 * plain - without)[0, 1].log_softmax(-1))
    xt[1, 1] = 1  # written meanwhile
    times = []
    both = steered.guided(lambda xt, t: times.append(t) or joint.denoise(xt, t), given, 3, 1.0)(xt, t)
    assert not both.isnan().any() and times[0].tolist() == pytest.approx([0.6] * 4)
    xt[1, 1] = 3
    calls = joint.calls
    frames = list(unmask.unmask(joint.denoise, xt, 3, 5, 'confidence', cfg=1.5))
    assert joint.calls - calls == len(frames)
    assert (frames[-1][given] == xt[given]).all() and (frames[-1] < 3).all()
    with pytest.raises(ValueError, match='--start'):
        unmask.unmask(joint.denoise, torch.full((1, 3), 3), 3, 5, cfg=1.0)


def test_the_grid_of_maskgit_reveals_few_tokens_first_and_ends_at_zero():
    level = unmask.noise_levels(8, 'maskgit')
    assert level[0] == 1 and level[-1] == 0 and (level.diff() < 0).all()
    assert torch.allclose(level[:-1], torch.cos(torch.arange(8).double() * torch.pi / 16))
    k = unmask.tokens_a_step(torch.tensor([64]), level)[0]
    assert k.sum() == 64 and (k.diff() >= -1).all() and k[0] < k[-1] / 4


@pytest.mark.parametrize('rule', ['llada', 'threshold', 'factor', 'eb', 'random'])
def test_blocks_are_written_one_after_the_other_behind_each_rows_prompt(rule):
    torch.manual_seed(0)
    prompts = torch.tensor([1, 3, 4])
    xt = torch.where(torch.arange(12) < prompts[:, None], 1, 5)
    logits = torch.randn(3, 12, 5)
    frames = list(unmask.unmask(lambda xt, t: logits.log_softmax(-1), xt, 5, 11, rule, part_length=4))
    number = (torch.arange(12) - prompts[:, None]) // 4
    for x in frames:
        for row, block in zip(x == 5, number):
            if row.any():
                begun = block[row].min()  # blocks behind it are as they were
                assert row[block > begun].all()
    assert (frames[-1] < 5).all() and (rule not in unmask.ORDERS or len(frames) == 11)


def llada_generate(logits_of, prompt, length, steps, block, mask):
    """What LLaDA's generate.py does at temperature 0 (arXiv 2502.09992 and its code), in our own words:
    blocks of `block` behind the prompt, steps / blocks each, the surest masks of the block first. Returns all
    canvases and the sizes of the steps."""
    x = torch.cat([prompt, torch.full((length,), mask)])
    canvases, sizes, blocks = [], [], length // block
    for b in range(blocks):
        begin = len(prompt) + b * block
        base, more = divmod(block, steps // blocks)
        for i in range(steps // blocks):
            p = logits_of(x).softmax(-1)
            sure, token = p.max(-1)
            sure = sure.masked_fill(x != mask, -1)
            sure[begin + block:] = -1
            chosen = sure.topk(base + (i < more)).indices
            x = x.clone()
            x[chosen] = token[chosen]
            canvases.append(x)
            sizes.append(len(chosen))
    return canvases, sizes


@pytest.mark.parametrize('prompt', [0, 5, 8, 13])
@pytest.mark.parametrize('steps, block', [(24, 8), (12, 8), (6, 24), (9, 8), (15, 8)])
def test_at_temperature_0_texts_are_those_of_lladas_published_algorithm(prompt, steps, block):
    """The network's answer depends on the whole canvas, so an order that differs shows. Where steps do not
    divide a block LLaDA gives the tokens left over to its first steps, and we spread them."""
    generator = torch.Generator().manual_seed(prompt + steps)
    V, T = 7, prompt + 24
    mix = torch.randn(T * (V + 1), T * V, generator=generator)

    def logits_of(x):
        return (torch.nn.functional.one_hot(x, V + 1).float().flatten() @ mix).view(T, V)

    def denoise(xt, t):
        return torch.stack([logits_of(x) for x in xt]).log_softmax(-1)
    start = torch.randint(V, (prompt,), generator=generator)
    theirs, sizes = llada_generate(logits_of, start, 24, steps, block, V)
    xt = torch.cat([start, torch.full((24,), V)])[None]
    ours = list(unmask.unmask(denoise, xt, V, steps, 'llada', temperature=0.0, part_length=block))
    own = (torch.stack([xt, *ours[:-1]]) == V).sum((1, 2)) - (torch.stack(ours) == V).sum((1, 2))
    if steps == 15:  # 8 tokens in 5 steps
        assert own.tolist() == [2, 2, 1, 2, 1] * 3 and sizes == [2, 2, 2, 1, 1] * 3
    else:
        assert own.tolist() == sizes and all(torch.equal(a[0], b) for a, b in zip(ours, theirs, strict=True))


def test_the_steps_are_shared_by_what_is_to_be_written():
    assert unmask.shares(16, [8, 8]) == [8, 8] and unmask.shares(20, [8, 8, 4]) == [8, 8, 4]
    assert unmask.shares(27, [11, 16]) == [11, 16] and unmask.shares(64, [32, 32]) == [32, 32]
    assert unmask.shares(1, [4, 4, 4]) == [1, 1, 1] and unmask.shares(9, [1, 1]) == [1, 1]
    for sizes in ([3, 1, 7], [1], [2, 90, 2, 6], [1, 1, 1]):
        for steps in range(len(sizes), sum(sizes) + 1):
            shares = unmask.shares(steps, sizes)
            assert sum(shares) == steps and min(shares) >= 1 and all(a <= b for a, b in zip(shares, sizes))


def test_every_step_count_is_honoured():
    denoise = lambda xt, t: torch.zeros(*xt.shape, 2).log_softmax(-1)
    for steps in range(1, 129):
        assert len(list(unmask.unmask(denoise, torch.full((1, 128), 2), 2, steps, 'random'))) == steps
        assert len(unmask.noise_levels(steps)) == steps + 1
        n = torch.arange(130)
        after = torch.stack([n * (steps - i) // steps for i in range(steps + 1)], dim=-1)  # in integers
        k, own = unmask.tokens_a_step(n, unmask.noise_levels(steps)), -after.diff(dim=-1)
        assert k.shape == (130, steps) and torch.equal(k.sort(-1).values, own.sort(-1).values)
    assert unmask.tokens_a_step(torch.tensor([3, 2]), unmask.noise_levels(9)).shape == (2, 3)  # none in vain


def test_a_full_canvas_needs_no_call():
    for rule in unmask.RULES:
        assert list(unmask.unmask(None, torch.zeros(2, 3, dtype=torch.long), 5, 4, rule)) == []


@pytest.mark.parametrize('rule', unmask.RULES)
def test_every_rule_fills_the_canvas_and_keeps_what_is_given(joint, rule):
    torch.manual_seed(0)
    xt = torch.full((20, 3), 3)
    xt[::2, 0] = 1
    for steps in (1, 2, 4):
        for x in unmask.unmask(joint.denoise, xt, 3, steps, rule, temperature=0.7, top_k=2, top_p=0.95):
            assert (x[::2, 0] == 1).all()
        assert (x < 3).all()


def test_a_knob_of_another_rule_is_refused_by_name():
    xt = torch.full((1, 3), 3)
    for rule, knob, own in (('confidence', 'gamma', 'grid, apart, part_length'), ('eb', 'grid', 'gamma'),
                            ('first_hitting', 'part_length', 'none'), ('random', 'score', 'grid'),
                            ('ancestral', 'choose', 'grid')):
        with pytest.raises(ValueError, match=f'{knob} is not for rule={rule}, whose knobs are: {own}'):
            unmask.unmask(None, xt, 3, 4, rule, **{knob: 1})


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match='ancestral, first_hitting'):
        unmask.unmask(None, torch.zeros(1, 1), 1, 1, 'confidense')


def test_prompts_of_different_lengths_share_a_batch():
    torch.manual_seed(0)
    model = ar.Model(ar.Config(vocab_size=5, block_size=8, n_layer=2, n_head=1, n_embd=8))
    for name, p in model.named_parameters():
        if name.endswith('weight'):
            torch.nn.init.normal_(p, std=0.5)
    canvas = torch.tensor([[1, 2, 3, 4, 5, 5, 5, 5], [0, 5, 5, 5, 5, 5, 5, 5], [5] * 8])
    *_, texts = model.sample(canvas, temperature=0)
    for row, text in zip(canvas, texts):
        *_, alone = model.sample(row[None], temperature=0)
        assert torch.equal(alone[0], text) and (text[row < 5] == row[row < 5]).all()


def test_an_autoregressive_model_refuses_what_it_cannot_do():
    model = ar.Model(ar.Config(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4))
    for canvas in ([[3, 3, 1, 3]], [[1, 3, 3, 2]], [[1, 1, 3], [3, 1, 3]]):
        with pytest.raises(ValueError, match='left to right'):
            next(model.sample(torch.tensor(canvas)))
    with pytest.raises(ValueError, match='rule is not for this model'):
        configurator.arguments(model.sample, dict(rule='margin'), dict(temperature=1.0))
