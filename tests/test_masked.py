"""The masked bound against enumerated joints, finite differences and injected noise."""
import itertools
import math

import numpy as np
import pytest
import torch

import configurator
import d3pm
import masked
import sedd
from ar import token_nats
from parts.schedules import SCHEDULES, noise
from text.windows import Rows
from conftest import Joint


def saying(f):
    """The forward of a network that says f(x, time), (B, T, V)."""
    def forward(x, mask=None, time=None, only=None):
        out = f(x, time)
        return out if only is None else out[only]
    return forward


def exact_model(joint, concept=masked, **knobs):
    """A model whose network is the joint's exact conditionals."""
    sizes = dict(vocab_size=joint.V, block_size=joint.T, n_layer=1, n_head=1, n_embd=2)
    model = concept.Model(concept.Config(**sizes, **knobs))
    model.gpt = torch.nn.Module()
    model.gpt.forward = saying(lambda x, time: joint.logp(x))
    return model


def subsets(T):
    return torch.tensor(list(itertools.product([False, True], repeat=T)))[1:]


def test_with_exact_conditionals_the_count_form_of_the_bound_is_minus_log_p(joint):
    model, T = exact_model(joint), joint.T
    for x, p in zip(joint.x, joint.p):
        bound = sum((T / m.sum() * model.masked_nats(x[None], m[None])).item()
                    / math.comb(T, int(m.sum())) / T for m in subsets(T))
        assert abs(bound + p.log().item()) < 1e-12


def test_with_exact_conditionals_the_integral_form_of_the_bound_is_minus_log_p(joint):
    model, T = exact_model(joint, loss_weight='elbo', t_law='uniform'), joint.T
    nodes, weights = np.polynomial.legendre.leggauss(4)  # exact for the polynomials t^(k-1) (1-t)^(T-k)
    for x, p in list(zip(joint.x, joint.p))[::5]:
        bound = 0.0
        for node, weight in zip((nodes + 1) / 2, weights / 2):
            t = torch.tensor([node], dtype=torch.float64)
            for m in subsets(T):
                probability = float(node) ** int(m.sum()) * (1 - float(node)) ** int((~m).sum())
                loss, _ = model(x[None], t=t, u=(~m).double()[None])  # u = 0 is masked, u = 1 is not
                bound += weight * probability * loss.item() * T
        assert abs(bound + p.log().item()) < 1e-12


def test_nats_estimates_the_bound_without_bias(joint):
    """4 standard errors: a false alarm in 16,000 runs; the seed is fixed."""
    torch.manual_seed(0)
    model = exact_model(joint)
    # a wrong network: the bound is loose but computable
    model.gpt.forward = saying(lambda x, time: joint.logp(x) * 0.5)
    x, T = joint.x[5], joint.T
    bound = sum((T / m.sum() * model.masked_nats(x[None], m[None])).item() / math.comb(T, int(m.sum())) / T
                for m in subsets(T))
    for n in (1, 2, 5):
        draws = model.nats(x.expand(4000, T), n)
        assert abs(draws.mean() - bound) < 4 * draws.std() / 4000 ** 0.5
        assert bound > -joint.p[5].log()


def test_stratified_draws_have_a_lower_variance_than_independent_ones(joint):
    torch.manual_seed(0)
    model, x = exact_model(joint), joint.x[7].expand(4000, joint.T)
    assert model.nats(x, 3).var() < 0.8 * model.nats(x, 1).var() / 3


def test_a_uniform_network_scores_exactly_log_V():
    model = masked.Model(masked.Config(vocab_size=7, block_size=8, n_layer=1, n_head=1, n_embd=4))
    x = torch.randint(7, (5, 8))
    assert torch.allclose(model.nats(x, 2), torch.full((5,), 8 * math.log(7)))  # the head starts at zero
    assert torch.allclose(model.nats_left(x), torch.full((5,), 8 * math.log(7)))


@pytest.mark.parametrize('weight, law', [('elbo', 'uniform'), ('flat', 'uniform'), ('flat', 'bell')])
def test_the_first_loss_averages_to_log_V(weight, law):
    torch.manual_seed(0)
    model = masked.Model(masked.Config(vocab_size=7, block_size=64, n_layer=1, n_head=1, n_embd=4,
                                       loss_weight=weight, t_law=law))
    losses = [model(torch.randint(7, (64, 64)))[0].item() for _ in range(50)]
    assert abs(np.mean(losses) / math.log(7) - 1) < 0.02


@pytest.mark.parametrize('masking', ['bernoulli', 'count'])
def test_the_first_loss_of_texts_cut_to_random_lengths_averages_to_log_V(masking):
    """The mean over all tokens that are seen: 4 standard errors, the seed is fixed."""
    torch.manual_seed(0)
    model = masked.Model(masked.Config(vocab_size=7, block_size=16, n_layer=1, n_head=1, n_embd=4,
                                       masking=masking, loss_weight='elbo', t_law='uniform'))
    rows = Rows(torch.randint(7, (1000,)), None, 16, random_length=1.0)
    losses = torch.stack([model(**rows.batch(256)[0])[0].detach() for _ in range(200)]) / math.log(7)
    error = losses.std() / 200 ** 0.5
    assert error < 0.005 and abs(losses.mean() - 1) < 4 * error + 1e-3
    seen = []
    model.masked_nats = lambda x, m, segment, *rest: seen.append(m & (segment < 0)) or torch.zeros(len(x))
    model(**rows.batch(256)[0])
    assert not seen[0].any()  # what is cut off is not masked


def test_the_likelihood_left_to_right_is_a_distribution_and_exact_with_exact_conditionals(joint):
    assert torch.allclose(exact_model(joint).nats_left(joint.x), -joint.p.log(), atol=1e-12)
    torch.manual_seed(0)
    real = masked.Model(masked.Config(vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=4))
    torch.nn.init.normal_(real.gpt.head.weight)
    assert abs((-real.nats_left(joint.x)).exp().sum().item() - 1) < 1e-5


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_schedule_agrees_with_finite_differences_and_reaches_both_ends_exactly(name):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    m, slope = noise(name, t)
    after, before = (noise(name, t + dt)[0] for dt in (1e-6, -1e-6))
    assert torch.allclose(slope, (after - before) / 2e-6, rtol=1e-6, atol=1e-9)
    assert (m.diff() > 0).all() and (slope > 0).all()
    for dtype in (torch.float32, torch.float64):
        ends, slope = noise(name, torch.tensor([0, 1], dtype=dtype))
        assert ends.tolist() == [0, 1] and slope.isfinite().all()
    m, slope = noise(name, masked.uniform(torch.zeros(1)))
    assert (slope / m).isfinite()  # torch.rand may be 0


def test_the_schedules_are_the_published_ones():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    level = lambda name: noise(name, t)[0]
    assert torch.allclose(level('linear'), t)
    assert torch.allclose(level('cosine'), 1 - (math.pi * t / 2).cos())
    assert torch.allclose(level('cosine_sqr'), 1 - (math.pi * t / 2).cos() ** 2)
    sigma = 1e-4 ** (1 - t) * 20 ** t
    assert torch.allclose(level('geometric'), 1 - (-sigma).exp(), atol=2e-4)  # which misses the ends by 1e-4
    steps = torch.linspace(0, 1, 100001, dtype=torch.float64)
    area = torch.cumulative_trapezoid((-3 * steps ** 2 + 5 * steps - 4) ** 2, steps)
    assert torch.allclose(level('polynomial')[1:], (area / area[-1])[9999::10000], atol=1e-8)
    assert torch.allclose(level('log_uniform'), (1e-3 ** (1 - t) - 1e-3) / (1 - 1e-3))


def test_low_discrepancy_times_are_one_to_a_stratum():
    model = masked.Model(masked.Config(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4,
                                       t_law='uniform'))
    drawn, _, _ = model.draw_noise(torch.zeros(16, 6, dtype=torch.long), None, None)
    for t in (masked.low_discrepancy(torch.tensor(0.37), 16), (drawn - 1e-3) / (1 - 1e-3)):
        assert ((t * 16).long().sort().values == torch.arange(16)).all()


def test_bell_times_are_the_logistic_of_a_normal():
    t = masked.bell(torch.tensor([0.0, 0.158655, 0.5, 0.841345, 1.0]), center=0.3, width=0.5)
    assert (torch.allclose(t[1:4], torch.tensor([-0.2, 0.3, 0.8]).sigmoid(), atol=1e-4)
            and 0 < t[0] < t[4] < 1)


def test_exactly_masks_exactly_k_and_every_position_alike():
    torch.manual_seed(0)
    k = torch.arange(5).repeat(2000)
    m = masked.exactly(k, torch.rand(10000, 4))
    assert (m.sum(-1) == k).all()
    assert ((m.double().mean(0) - 0.5).abs() < 4 * 0.5 / 100).all()  # 4 standard errors at most


def test_denoise_is_normalised_and_copies_clean_tokens():
    torch.manual_seed(0)
    model = masked.Model(masked.Config(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4))
    torch.nn.init.normal_(model.gpt.head.weight)
    xt = torch.tensor([[5, 1, 5, 3, 0, 5]])
    logp = model.denoise(xt)
    assert logp.dtype == torch.float32 and torch.allclose(logp.exp().sum(-1), torch.ones(1, 6))
    assert (logp.exp()[0, [1, 3, 4], [1, 3, 0]] == 1).all() and (logp[0, [0, 2, 5]] > -100).all()


@pytest.mark.parametrize('concept, knobs', [(masked, {}), (masked, dict(time_input=True)), (d3pm, {}),
                                            (masked, dict(shift=True)), (masked, dict(arch='gpt2'))])
def test_denoise_runs_the_head_where_there_are_masks_and_the_network_for_rows_with_any(concept, knobs):
    torch.manual_seed(0)
    model = concept.Model(concept.Config(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4, **knobs))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    xt = torch.tensor([[5, 1, 5, 3, 0, 5], [1, 2, 3, 4, 0, 1], [5, 5, 5, 5, 5, 5]])
    t, shapes = torch.tensor([0.3, 0.0, 0.9]), []
    hook = model.gpt.register_forward_hook(lambda net, args, out: shapes.append((len(args[0]), len(out))))
    logp = model.denoise(xt, t)
    assert shapes == [(2, 9)]
    assert torch.equal(logp[1].exp(), torch.eye(5)[xt[1]]) and torch.equal(model.denoise(xt[1:2])[0], logp[1])
    hook.remove()
    everywhere = model.logits(xt, t).log_softmax(-1)
    assert torch.allclose(logp[xt == 5], everywhere[xt == 5], atol=1e-5)


def test_a_row_cut_to_a_random_length_scores_as_the_short_row_would():
    torch.manual_seed(0)
    model = masked.Model(masked.Config(vocab_size=5, block_size=8, n_layer=2, n_head=1, n_embd=8))
    torch.nn.init.normal_(model.gpt.head.weight)
    for block in model.gpt.blocks:
        torch.nn.init.normal_(block.attn.proj.weight)
    x, m, inside = torch.randint(5, (3, 8)), torch.rand(3, 8) < 0.5, torch.arange(8) < 5
    segment = torch.where(inside, 0, -1).expand(3, 8)
    assert torch.allclose(model.masked_nats(x, m & inside, segment), model.masked_nats(x[:, :5], m[:, :5]),
                          atol=1e-5)
    model = d3pm.Model(d3pm.Config(vocab_size=5, block_size=8, n_layer=2, n_head=1, n_embd=8))
    level = torch.rand(3)
    torch.nn.init.normal_(model.gpt.head.weight)
    cut, short = (model.step_nats(a, b, c, level, level / 2, copy=0.5)
                  for a, b, c in ((x, m & inside, segment), (x[:, :5], m[:, :5], None)))
    assert torch.allclose(cut, short, atol=1e-5)  # the loss at clean tokens, too


def test_random_lengths_do_not_recompile():
    model = masked.Model(masked.Config(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=8))
    rows = Rows(torch.randint(5, (100,)), None, 8, random_length=0.5)
    graphs = []
    loss_fn = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
                            fullgraph=True)
    for _ in range(5):
        assert loss_fn(**rows.batch(4)[0])[0].isfinite()
    assert len(graphs) == 1


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('masking', ['bernoulli', 'count'])
def test_every_schedule_and_both_maskings_train_towards_the_same_bound(name, masking, joint):
    """4 standard errors: a false alarm in 16,000 runs a case; the seed is fixed. The network is a wrong one,
    so that the bound is not the likelihood."""
    torch.manual_seed(0)
    model = exact_model(joint, schedule=name, masking=masking, loss_weight='elbo', t_law='uniform')
    model.gpt.forward = saying(lambda x, time: joint.logp(x) * 0.5)
    x, T = joint.x[5], joint.T
    bound = sum((T / m.sum() * model.masked_nats(x[None], m[None])).item() / math.comb(T, int(m.sum())) / T
                for m in subsets(T))
    n = 40000
    draws = T * torch.stack([model(x.expand(400, T), t=masked.uniform(torch.rand(400)))[0]
                             for _ in range(n // 400)])
    missing = 1e-3 * bound  # `uniform` keeps t off [0, 0.001]
    assert abs(draws.mean() - bound) < 4 * draws.std() / len(draws) ** 0.5 + missing


def variances(model, x):
    """Of the training loss of a row, by enumeration: at a random time, and at a given one in the mean."""
    T, t = len(x), masked.uniform((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    if model.config.masking == 'count':
        u = torch.tensor(list(itertools.permutations(range(T)))).double() / T
        chance = torch.full((len(t), len(u)), 1 / len(u))
    else:
        u, m = (~subsets(T)).double(), noise(model.config.schedule, t)[0][:, None]
        chance = m ** (u == 0).sum(-1) * (1 - m) ** (u == 1).sum(-1)  # without a mask there is no loss
    factor = torch.ones(chance.numel(), dtype=torch.float64, requires_grad=True)
    model.masked_nats = lambda *seen: factor * masked.Model.masked_nats(model, *seen)
    loss, _ = model(x.expand(len(factor), T), t=t.repeat_interleave(len(u)), u=u.repeat(len(t), 1))
    rows = (torch.autograd.grad(loss, factor)[0] * len(factor)).view_as(chance)
    mean, square = (chance * rows).sum(-1), (chance * rows ** 2).sum(-1)
    return (square.mean() - mean.mean() ** 2).item(), (square - mean ** 2).mean().item()


def test_stratified_times_a_change_of_variables_and_counts_each_lower_the_variance(joint):
    """The same expectation (test above). Of many rows with stratified times that at a given time is left."""
    x, found = joint.x[7], {}
    for name, knobs in dict(plain={}, log_uniform=dict(schedule='log_uniform'),
                            count=dict(masking='count')).items():
        found[name] = variances(exact_model(joint, loss_weight='elbo', t_law='uniform', **knobs), x)
    assert found['count'][0] < 0.1 * found['plain'][0] and all(b < a for a, b in found.values())
    assert found['count'][1] < 0.1 * found['log_uniform'][1] < 0.1 * 0.5 * found['plain'][1]
    assert all(b < 0.5 * a for a, b in (found['count'], found['log_uniform']))


def test_a_unigram_network_scores_the_entropy_and_not_a_part_of_it():
    """Every schedule reaches both ends, so no prior or reconstruction term is missing."""
    torch.manual_seed(0)
    p = torch.tensor([0.6, 0.3, 0.1])
    x = torch.multinomial(p, 64 * 2000, replacement=True).view(2000, 64)
    entropy = -(p * p.log()).sum()
    for name in SCHEDULES:
        for T in (1, 7, 1000) if name != 'linear' else (0, 1, 7, 1000):  # T = 0 asks no schedule
            concept, steps = (d3pm, dict(T=T, carry_over=True)) if T else (masked, {})
            model = concept.Model(concept.Config(vocab_size=3, block_size=64, n_layer=1, n_head=1, n_embd=2,
                                                 schedule=name, t_law='uniform', **steps))
            model.gpt.forward = saying(lambda x, time: p.log().expand(*x.shape, 3))
            nats = model.nats(x, 4) / 64
            assert abs(nats.mean() - entropy) < 4 * nats.std() / 2000 ** 0.5 + 4 * 0.005, (name, T)


# ---- D3PM -------------------------------------------------------------------------------------------------

def test_the_loss_of_a_step_of_d3pm_is_the_KL_of_matrices():
    """Against q(xs | xt, x0) and p(xs | xt) by Bayes' rule on explicit (V+1) x (V+1) transition matrices."""
    torch.manual_seed(0)
    V, out = 4, torch.randn(1, 1, 5, dtype=torch.float64)
    p = out[0, 0].softmax(-1)

    def transition(a):  # one row a source: keeps its token with probability a
        Q = a * torch.eye(V + 1, dtype=torch.float64)
        Q[:, V] += 1 - a
        return Q
    for m, m_next in ((0.5, 0.25), (1.0, 0.9), (0.01, 0.0), (1.0, 0.0)):
        to_next, step = transition(1 - m_next), transition((1 - m) / (1 - m_next))
        for v in range(V):
            q = to_next[v] * step[:, V]
            prediction = (p @ to_next) * step[:, V]
            q, prediction = q / q.sum(), prediction / prediction.sum()
            kl = torch.special.xlogy(q, q / prediction).sum()
            columns = (torch.tensor([[z]], dtype=torch.float64) for z in (m, m_next))
            ours = d3pm.step_kl(out, torch.tensor([[v]]), *columns) * (m - m_next) / m
            assert abs(ours.item() - kl.item()) < 1e-12


def step_bound(model, x):
    """The bound in T steps by enumeration of all masks in every step."""
    every, T = subsets(len(x)), model.config.T
    m, m_next, weight = model.levels(torch.arange(1, T + 1, dtype=torch.float64).repeat_interleave(7) / T)
    hidden = every.repeat(T, 1)
    chance = m ** hidden.sum(-1) * (1 - m) ** (~hidden).sum(-1)
    nats = model.step_nats(x.expand(hidden.shape), hidden, None, m, m_next)
    return (model.copy_nats(x[None], None, None) + (chance * weight / T * nats).sum()).item()


def never_mask(joint):
    """The joint's conditionals with a column for [MASK] that is never predicted."""
    return saying(lambda x, time: torch.nn.functional.pad(joint.logp(x), (0, 1), value=-torch.inf))


def test_the_bound_of_d3pm_falls_to_the_entropy_as_T_grows():
    joint = Joint(V=2, T=3)
    means = []
    for T in (1, 3, 10, 30, 300):
        model, subs = exact_model(joint, d3pm, T=T), exact_model(joint, d3pm, T=T, carry_over=True)
        model.gpt.forward = never_mask(joint)
        bounds = [step_bound(model, x) for x in joint.x]
        # no mass on [MASK] and nothing to copy: SUBS
        assert all(abs(step_bound(subs, x) - bound) < 1e-9 for x, bound in zip(joint.x, bounds))
        means.append(sum(p * bound for p, bound in zip(joint.p.tolist(), bounds)))
    entropy = -(joint.p * joint.p.log()).sum().item()
    gaps = [mean - entropy for mean in means]
    assert all(a > 2 * b > 0 for a, b in zip(gaps, gaps[1:])) and gaps[-1] < 2e-3


@pytest.mark.parametrize('T', [1, 10, 1000])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_d3pm_is_finite_at_its_first_step_with_finite_gradients(T, schedule):
    torch.manual_seed(0)
    model = d3pm.Model(d3pm.Config(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4, T=T,
                                   schedule=schedule, loss_weight='elbo', t_law='uniform'))
    torch.nn.init.normal_(model.gpt.head.weight)
    x = torch.randint(5, (4, 6))
    loss, _ = model(x, t=torch.full((4,), 1 / T), u=torch.zeros(4, 6))  # u = 0: all masked
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.nats(x, 3).isfinite().all()


def test_the_estimate_in_steps_has_the_mean_of_the_enumeration(joint):
    """4 standard errors: a false alarm in 16,000 runs; the seed is fixed."""
    torch.manual_seed(0)
    model = exact_model(joint, d3pm, T=7)
    wrong = torch.randn(4, 4)
    model.gpt.forward = saying(lambda x, time: wrong[x])  # predicts [MASK] too, and copies badly
    draws = model.nats(joint.x[5].expand(20000, joint.T), 3)
    assert abs(draws.mean() - step_bound(model, joint.x[5])) < 4 * draws.std() / 20000 ** 0.5


def test_d3pm_is_trained_to_copy_and_pays_for_what_it_does_not_copy():
    torch.manual_seed(0)
    model = d3pm.Model(d3pm.Config(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4, T=10))
    x = torch.randint(5, (4, 6))
    uniform = torch.full((4,), 6 * math.log(6))  # 6 outputs
    assert torch.allclose(model.copy_nats(x, None, None), uniform)
    loss, _ = model(x, u=torch.ones(4, 6))  # nothing masked
    assert loss > 0 and loss.isfinite()
    times = []
    model = d3pm.Model(d3pm.Config(vocab_size=5, block_size=6, n_layer=1, n_head=1, n_embd=4, T=10,
                                   time_input=True))
    model.gpt.forward = saying(lambda x, time: times.append(time) or torch.zeros(*x.shape, 6))
    model.copy_nats(x, None, None)
    assert times[0].tolist() == [0] * 4  # the time of clean text


# ---- SEDD -------------------------------------------------------------------------------------------------

def sedd_model(**knobs):
    return sedd.Model(sedd.Config(vocab_size=5, block_size=6, n_layer=2, n_head=1, n_embd=8, **knobs))


def test_the_loss_of_sedd_is_the_published_score_entropy():
    """Sum over y != x of s_y - r_y log s_y + K(r_y), K(a) = a (log a - 1), divided by (1 - m) / m."""
    torch.manual_seed(0)
    out, x, m = torch.randn(1, 1, 5, dtype=torch.float64), torch.tensor([[3]]), 0.3
    factor = (1 - m) / m  # r of the true token; 0 for the others
    s = factor * sedd.log_scores(out)[0, 0].exp()
    published = s.sum() - factor * s[3].log() + factor * (math.log(factor) - 1)
    assert abs(sedd.score_entropy(out, x).item() - published.item() / factor) < 1e-12


def test_sedd_fed_the_true_score_is_subs_and_any_other_sum_costs_Z_minus_1_minus_log_Z():
    torch.manual_seed(0)
    out, x = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(5, (3, 4))
    normal = out.log_softmax(-1) + math.log(5)
    assert torch.allclose(sedd.score_entropy(normal, x), token_nats(normal, x), atol=1e-12)
    Z = sedd.log_scores(out).exp().sum(-1)
    assert torch.allclose(sedd.score_entropy(out, x) - token_nats(out, x), Z - 1 - Z.log(), atol=1e-12)
    assert (sedd.score_entropy(out, x) >= 0).all()


def test_the_analytic_rule_takes_the_sum_of_the_scores_of_sedd_and_the_others_do_not():
    """A network whose scores add up to 2: in 4 steps the first reveals a half, by ancestral a quarter.
    4 standard errors at most."""
    torch.manual_seed(0)
    model = sedd_model()
    model.gpt.forward = saying(lambda x, time: torch.full((*x.shape, 5), math.log(2.0)))
    for rule, share in (('analytic', 0.5), ('ancestral', 0.25)):
        xs = next(model.sample(torch.full((1, 10000), 5), 4, rule))
        assert abs((xs < 5).double().mean() - share) < 0.02


def test_the_network_of_sedd_sees_the_time_once_it_has_learned_to():
    torch.manual_seed(0)
    model, x = sedd_model(), torch.tensor([[5, 1, 5, 2, 5, 0]])
    torch.nn.init.normal_(model.gpt.head.weight)
    for block in model.gpt.blocks:
        torch.nn.init.normal_(block.mlp.proj.weight)
    at = lambda t: model.denoise(x, torch.tensor([t]))
    assert torch.equal(at(0.2), at(0.9))  # FiLM starts as the identity
    for block in model.gpt.blocks:
        torch.nn.init.normal_(block.film.weight)
    assert torch.equal(model.denoise(x), at(0.5))  # the share of masks, if nothing else is said
    assert not torch.allclose(at(0.2), at(0.9)) and torch.allclose(at(0.9).exp().sum(-1), torch.ones(1, 6))


def test_counts_give_a_timed_network_the_time_of_its_masks(joint):
    """The k-th smallest of T uniform numbers is Beta(k, T + 1 - k): the bound of a network that depends on
    the time, against its integral over the time by quadrature. 4 standard errors; the seed is fixed."""
    torch.manual_seed(0)
    model, T, x = exact_model(joint, sedd), joint.T, joint.x[5]
    model.gpt.forward = saying(lambda x, time: joint.logp(x) * (1 + time[:, None, None]))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    bound = 0.0
    for t, w in zip((nodes + 1) / 2, weights / 2):
        level = torch.tensor([t])
        for s in subsets(T):
            bound += w * t ** int(s.sum()) * (1 - t) ** int((~s).sum()) / t * model.masked_nats(
                x[None], s[None], None, level).item()
    draws = model.nats(x.expand(20000, T), 2)
    assert abs(draws.mean() - bound) < 4 * draws.std() / 20000 ** 0.5


def test_training_with_counts_tells_a_timed_network_the_level_at_which_just_these_are_masked():
    torch.manual_seed(0)
    model, u, seen = sedd_model(masking='count'), torch.rand(4, 6), []
    model.gpt.forward = saying(lambda x, time: seen.append((x, time)) or torch.zeros(*x.shape, 5))
    model(torch.randint(5, (4, 6)), t=torch.tensor([0.1, 0.4, 0.6, 1.0]), u=u)
    (x, time), = seen
    assert (x == 5).sum(-1).tolist() == [1, 3, 4, 6] and torch.equal(x == 5, u <= time[:, None])


@pytest.mark.parametrize('concept, knobs, word', [
    (masked, dict(loss_weight='flt'), 'loss_weight'), (masked, dict(t_law='x'), 't_law'),
    (masked, dict(n_head=5), 'n_head'), (masked, dict(dropout=1.0), 'dropout'),
    (masked, dict(n_layer=0), 'n_layer'), (masked, dict(schedule='cos'), 'schedule'),
    (masked, dict(masking='x'), 'masking'), (masked, dict(schedule='cosine'), 't_law=uniform'),
    (masked, dict(loss_weight='elbo', t_law='bell'), 't_law=uniform'), (masked, dict(T=10), '--T'),
    (sedd, dict(time_input=False), 'time_input'), (d3pm, dict(T=0), 'T=0'),
    (d3pm, dict(masking='count'), 'masking=count'), (masked, dict(lora_rank=-1), 'lora_rank=-1')], ids=str)
def test_wrong_knobs_are_refused_by_name(concept, knobs, word, mistake):
    assert word in mistake(lambda argv: configurator.build(knobs, concept.Config))
