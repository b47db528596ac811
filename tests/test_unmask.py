"""Samplers against enumerated joints. Chi-square tests fail by chance once in 10,000; their seeds are
fixed."""
import itertools

import pytest
import torch

import ar
import unmask
from conftest import Joint, chi_square_p


def last(generator):
    for x in generator:
        pass
    return x


@pytest.mark.parametrize('rule, steps', [('ancestral', 10 ** 6), ('random', 3), ('confidence', 3),
                                         ('margin', 3), ('entropy', 3), ('random', 50)])
def test_one_token_a_step_with_exact_conditionals_draws_the_joint_in_any_order(joint, rule, steps):
    torch.manual_seed(0)
    blank = torch.full((40000, joint.T), joint.V)
    x = last(unmask.unmask(joint.denoise, blank, joint.V, steps, rule))
    assert chi_square_p(x, joint.p, joint.V) > 1e-4


def test_ancestral_in_two_steps_has_the_law_that_enumeration_gives(joint):
    torch.manual_seed(0)
    expected = torch.zeros_like(joint.p)
    for when in itertools.product([0, 1], repeat=joint.T):  # the step of each position, all equally likely
        first = torch.tensor(when) == 0
        blank = torch.full_like(joint.x, joint.V)
        p0 = joint.logp(blank).exp().gather(-1, joint.x[..., None])[..., 0]
        p1 = joint.logp(torch.where(first, joint.x, blank)).exp().gather(-1, joint.x[..., None])[..., 0]
        expected += torch.where(first, p0, p1).prod(-1) / 2 ** joint.T
    assert abs(expected.sum() - 1) < 1e-12 and (expected - joint.p).abs().max() > 1e-3
    x = last(unmask.unmask(joint.denoise, torch.full((40000, joint.T), joint.V), joint.V, 2, 'ancestral'))
    assert chi_square_p(x, expected, joint.V) > 1e-4
    assert chi_square_p(x, joint.p, joint.V) < 1e-4  # the test can tell the two apart


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


def test_the_number_of_calls_has_the_mean_that_theory_gives():
    """T (1 - (1 - 1/T)^L) for one row (MDLM); 4 standard errors."""
    torch.manual_seed(0)
    event, _ = unmask.events(torch.ones(4000, 20, dtype=torch.bool), 30)
    calls = event.amax(-1).double() + 1
    assert abs(calls.mean() - 30 * (1 - (1 - 1 / 30) ** 20)) < 4 * calls.std() / 4000 ** 0.5


def test_events_number_the_distinct_steps_of_each_row():
    torch.manual_seed(0)
    masked_ = torch.rand(50, 9) < 0.7
    event, time = unmask.events(masked_, 5)
    assert (event[~masked_] == -1).all() and (event[masked_] >= 0).all()
    for e, t, m in zip(event, time, masked_):
        steps = sorted({round((1 - v) * 5) for v in t[m].tolist()})
        assert e[m].tolist() == [steps.index(round((1 - v) * 5)) for v in t[m].tolist()]


@pytest.mark.parametrize('rule', [r for r in unmask.RULES if r != 'ancestral'])
@pytest.mark.parametrize('steps', [1, 3, 4, 10, 25])
def test_ordered_rules_reveal_exact_counts_and_leave_no_mask(rule, steps):
    torch.manual_seed(0)
    logits = torch.randn(4, 10, 5)
    xt = torch.full((4, 10), 5)
    xt[:, 0], xt[2:, 5] = 3, 2  # given tokens, more in some rows
    left = [xt.eq(5).sum(-1)]
    for x in unmask.unmask(lambda xt, t: logits.log_softmax(-1), xt, 5, steps, rule):
        left.append(x.eq(5).sum(-1))
        assert (x[:, 0] == 3).all() and (x[2:, 5] == 2).all()
    revealed = -torch.stack(left).diff(dim=0)
    assert left[-1].sum() == 0 and len(revealed) == min(steps, 9)
    for row, n in zip(revealed.T, left[0]):
        share = [int(n) // steps + (i < int(n) % steps) for i in range(steps)]
        assert row.tolist() == share[:len(row)]


def test_ties_are_broken_at_random_not_left_to_right():
    torch.manual_seed(0)
    first = unmask.best(torch.zeros(6000, 6), torch.ones(6000, 6, dtype=torch.bool),
                        torch.ones(6000, dtype=torch.long))
    assert ((first.double().mean(0) - 1 / 6).abs() < 4 * (5 / 36 / 6000) ** 0.5).all()  # false alarm 4e-4


def test_scores_prefer_the_surest_position():
    logp = torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.45, 0.05], [0.45, 0.28, 0.27]]).log()[None]
    assert unmask.confidence(logp).argmax() == 1
    assert unmask.margin(logp).argmax() == 2
    assert unmask.entropy(logp).argmax() == 1
    assert torch.allclose(unmask.entropy(torch.tensor([[[0.0, -torch.inf]]])), torch.zeros(1, 1))


def test_rows_of_a_batch_do_not_influence_each_other(joint):
    """Rows that are given nearly everything finish early; the joint of the others is untouched."""
    torch.manual_seed(0)
    xt = torch.full((40000, 3), joint.V)
    xt[::2] = joint.x[4]
    x = last(unmask.unmask(joint.denoise, xt, joint.V, 10 ** 6))
    assert (x[::2] == joint.x[4]).all() and chi_square_p(x[1::2], joint.p, joint.V) > 1e-4


def test_draw_is_categorical_down_to_the_rare_tokens():
    torch.manual_seed(0)
    p = torch.tensor([0.9, 0.0999, 1e-4]).double()
    x = unmask.draw(p.log().float().expand(400000, 3))
    assert chi_square_p(x[:, None], p, 3) > 1e-4


def test_temperature_zero_is_the_best_token_and_temperature_sharpens():
    logp = torch.tensor([0.5, 0.3, 0.2]).log().expand(40000, 3)
    assert (unmask.draw(logp, temperature=0) == 0).all()
    torch.manual_seed(0)
    sharp = torch.tensor([0.25, 0.09, 0.04]).double()
    assert chi_square_p(unmask.draw(logp, temperature=0.5)[:, None], sharp / sharp.sum(), 3) > 1e-4


def test_top_k_and_top_p_keep_what_they_say():
    logp = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = lambda **how: unmask.truncate(logp, **how).isfinite().tolist()
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_p=0.4) == [False, True, False, False]
    assert kept(top_p=0.41) == [False, True, False, True]
    assert kept(top_p=0.95) == [True, True, True, True]
    assert kept(top_k=0, top_p=1.0) == [True] * 4 and kept(top_p=1e-9) == [False, True, False, False]


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match='ancestral, random'):
        unmask.unmask(None, torch.zeros(1, 1), 1, 1, 'confidense')


def test_an_autoregressive_model_refuses_what_it_cannot_do():
    model = ar.Model(ar.Config(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4))
    for canvas in ([[3, 3, 1, 3]], [[1, 3, 3, 2]]):
        with pytest.raises(ValueError, match='left to right'):
            next(model.sample(torch.tensor(canvas)))
    with pytest.raises(ValueError, match='rule'):
        next(model.sample(torch.tensor([[3, 3]]), rule='margin'))
