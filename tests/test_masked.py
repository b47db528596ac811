"""The masked bound against enumerated joints, finite differences and injected noise."""
import itertools
import math

import numpy as np
import pytest
import torch

import masked


def exact_model(joint, **knobs):
    """A masked.Model whose network is the joint's exact conditionals."""
    model = masked.Model(masked.Config(vocab_size=joint.V, block_size=joint.T, n_layer=1, n_head=1, n_embd=2,
                                       **knobs))
    model.gpt = torch.nn.Module()
    model.gpt.forward = lambda x, mask=None: joint.logp(x)
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
    model, T = exact_model(joint, loss_weight='elbo'), joint.T
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
    model.gpt.forward = lambda x, mask=None: joint.logp(x) * 0.5
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


@pytest.mark.parametrize('weight', ['elbo', 'flat'])
@pytest.mark.parametrize('law', ['uniform', 'bell'])
def test_the_first_loss_averages_to_log_V(weight, law):
    torch.manual_seed(0)
    model = masked.Model(masked.Config(vocab_size=7, block_size=64, n_layer=1, n_head=1, n_embd=4,
                                       loss_weight=weight, t_law=law))
    losses = [model(torch.randint(7, (64, 64)))[0].item() for _ in range(50)]
    assert abs(np.mean(losses) / math.log(7) - 1) < 0.02


def test_the_likelihood_left_to_right_is_a_distribution_and_exact_with_exact_conditionals(joint):
    assert torch.allclose(exact_model(joint).nats_left(joint.x), -joint.p.log(), atol=1e-12)
    torch.manual_seed(0)
    real = masked.Model(masked.Config(vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=4))
    torch.nn.init.normal_(real.gpt.head.weight)
    assert abs((-real.nats_left(joint.x)).exp().sum().item() - 1) < 1e-5


def test_the_linear_schedule_agrees_with_finite_differences():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    alpha, weight = masked.linear(t)
    slope = (masked.linear(t + 1e-6)[0] - masked.linear(t - 1e-6)[0]) / 2e-6
    assert torch.allclose(weight, -slope / (1 - alpha), rtol=1e-6)
    assert masked.linear(torch.tensor(0.0))[0] == 1 and masked.linear(torch.tensor(1.0))[0] == 0


def test_low_discrepancy_times_are_one_to_a_stratum():
    t = masked.low_discrepancy(torch.tensor(0.37), 16)
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


def test_a_row_cut_to_a_random_length_scores_as_the_short_row_would():
    torch.manual_seed(0)
    model = masked.Model(masked.Config(vocab_size=5, block_size=8, n_layer=2, n_head=1, n_embd=8))
    torch.nn.init.normal_(model.gpt.head.weight)
    for block in model.gpt.blocks:
        torch.nn.init.normal_(block.attn.proj.weight)
    x, m, inside = torch.randint(5, (3, 8)), torch.rand(3, 8) < 0.5, torch.arange(8) < 5
    cut = model.masked_nats(x, m & inside, inside[None, None, None].expand(3, 1, 1, 8))
    assert torch.allclose(cut, model.masked_nats(x[:, :5], m[:, :5]), atol=1e-5)


def test_random_lengths_do_not_recompile():
    model = masked.Model(masked.Config(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=8,
                                       random_length=0.5))
    graphs = []
    loss_fn = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
                            fullgraph=True)
    for _ in range(5):
        assert loss_fn(torch.randint(5, (4, 8)))[0].isfinite()
    assert len(graphs) == 1


def test_wrong_knobs_are_refused_by_name():
    for knobs, name in ((dict(loss_weight='flt'), 'loss_weight'), (dict(t_law='x'), 't_law'),
                        (dict(random_length=2.0), 'random_length'), (dict(n_head=5), 'n_head'),
                        (dict(dropout=1.0), 'dropout'), (dict(n_layer=0), 'n_layer')):
        with pytest.raises(ValueError, match=name):
            masked.Config(**knobs)
