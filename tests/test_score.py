"""Score-based diffusion against enumerated posteriors, Gaussians and difference quotients."""
import math

import pytest
import torch

import common
import score
from configurator import arguments, settings
from conftest import Joint, chi_square_p
from parts import gaussian, warp

SIZES = dict(vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=8)


class Exact(score.Model):
    """The model whose prediction is the true posterior of an enumerated joint distribution."""

    def __init__(self, joint, **knobs):
        wide = dict(d_embed=6, sigma_min=0.1, sigma_max=100.0)
        super().__init__(score.Config(**{**SIZES, **wide, **knobs}))
        torch.manual_seed(22)  # points that are apart
        torch.nn.init.normal_(self.embed.weight)
        self.joint = joint

    def logits(self, x, sigma, E, guess=None, segment=None):
        """sum over all sequences with token v at i of p(sequence) N(x; its points, sigma^2), as log."""
        s, V = sigma.clamp(min=1e-3).double(), self.joint.V
        far = ((x.double()[:, :, None] - E.double()) ** 2).sum(-1) / (2 * s[..., None] ** 2)  # (B, T, V)
        onehot = torch.nn.functional.one_hot(self.joint.x, V).double().flatten(1)             # (N, T V)
        log_joint = self.joint.p.log() - far.flatten(1) @ onehot.T                            # (B, N)
        weight = (log_joint - log_joint.amax(-1, keepdim=True)).exp()
        return (weight @ onehot).clamp(min=1e-300).log().float().unflatten(-1, (-1, V)), None


def entropy(joint):
    return -(joint.p * joint.p.log()).sum().item()


def drawn(joint, n):
    return joint.x[torch.multinomial(joint.p, n, replacement=True)]


# ---- the bound --------------------------------------------------------------------------------------------

def true_gap(model, n=5000):
    """How far the bound is above the entropy with the true posterior, by its definition: the divergence of
    the prior from the noised text, and what tokens decoded one by one still say of each other at the end."""
    joint, c, E = model.joint, model.config, score.on_sphere(model.embed.weight).double()
    torch.manual_seed(7)
    x = drawn(joint, n)
    noised = {s: E[x] + s * torch.randn(n, 3, c.d_embed).double() for s in (c.sigma_min, c.sigma_max)}

    def about_all(s):
        """log p(x0, noised) up to a constant, (n, 27); each less the density of the true x0's noise."""
        far = ((noised[s][:, None] - E[joint.x]) ** 2).sum((-1, -2)) / (2 * s * s)
        own = ((noised[s] - E[x]) ** 2).sum((-1, -2)) / (2 * s * s)
        return joint.p.log() - far + own[:, None]
    told = -about_all(c.sigma_max).logsumexp(-1).mean()  # I(x0; noised at sigma_max)
    posterior = about_all(c.sigma_min).softmax(-1)
    agrees = (joint.x[None] == x[:, None]).double()  # (n, 27, 3)
    alone = -torch.einsum('nk,nkt->nt', posterior, agrees).log().sum(-1).mean()
    together = -torch.einsum('nk,nk->n', posterior, agrees.prod(-1)).log().mean()
    prior = 3 * c.d_embed / 2 * math.log1p(c.sigma_max ** -2)
    return (prior - told + alone - together).item()


@pytest.mark.parametrize('stagger', [0.0, 8.0])
def test_with_the_true_posterior_the_bound_falls_to_the_entropy_as_the_range_widens(joint, stagger):
    """On whatever path the noise falls. 4 standard errors; the seed is fixed."""
    gaps = []
    for low, high in ((1.0, 2.0), (0.5, 5.0), (0.1, 100.0)):
        model = Exact(joint, sigma_min=low, sigma_max=high, bound_stagger=stagger)
        gap = true_gap(model)
        gaps.append(gap)
        torch.manual_seed(1)
        with torch.no_grad():
            nats = model.nats(drawn(joint, 6000), 20)
        error = nats.std().item() / 6000 ** 0.5
        assert abs(nats.mean().item() - entropy(joint) - gap) < 4 * error < 0.35
    assert gaps[0] > 1 > 0.5 > gaps[1] > 0.1 > 0.01 > gaps[2], gaps


def test_with_a_wrong_posterior_the_bound_is_the_cross_entropy():
    true, wrong = Joint(seed=0), Joint(seed=1)
    torch.manual_seed(1)
    nats = Exact(wrong).nats(drawn(true, 20000), 8)
    cross = -(true.p * wrong.p.log()).sum().item()
    assert abs(nats.mean().item() - cross) < 5 * nats.std().item() / 20000 ** 0.5
    assert cross > entropy(true) + 0.1


def test_a_fresh_model_scores_log_V_since_it_knows_the_noise_but_no_text():
    """The evidence alone is the posterior of uniform tokens: exact. 5 standard errors; the seed is fixed."""
    torch.manual_seed(0)
    model = score.Model(score.Config(**{**SIZES, 'vocab_size': 11, 'block_size': 8}, bound_stagger=0.0))
    with torch.no_grad():
        nats = model.nats(torch.randint(11, (4000, 8)), 20)
    assert abs(nats.mean() - 8 * math.log(11)) < 5 * nats.std() / 4000 ** 0.5 < 0.6


def test_predictions_that_are_uniform_whatever_is_seen_score_worse_than_log_V():
    torch.manual_seed(0)
    model = score.Model(score.Config(**{**SIZES, 'vocab_size': 11, 'block_size': 8}, bound_stagger=0.0))
    model.logits = lambda x, sigma, E, guess, segment: (torch.zeros(*x.shape[:2], 11), None)
    x = torch.randint(11, (4000, 8))
    with torch.no_grad():
        nats = model.nats(x, 20)
    E = score.on_sphere(model.embed.weight)
    precision = 1.5 ** -2 - 60.0 ** -2  # D is the mean of all embeddings, so the integral is this by hand
    far = (E[x] - E.mean(0)).square().sum((-1, -2)) / 2 * precision
    expected = far.mean().item() + 8 * (math.log(11) + 32 * math.log1p(60.0 ** -2))
    assert abs(nats.mean().item() - expected) < 5 * (nats - far).std().item() / 4000 ** 0.5
    assert expected > 8 * math.log(11) + 50


def test_the_prior_term_is_the_divergence_of_the_noised_text_from_the_prior():
    """KL(N(e, s^2 I) || N(0, (s^2 + 1) I)) of a point of norm sqrt(d), by torch.distributions."""
    from torch.distributions import Independent, Normal, kl_divergence
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES, sigma_max=2.0))
    x, E = torch.tensor([[0, 2, 1]]), score.on_sphere(model.embed.weight)
    sure = torch.full((1, 3, 3), -1e9).scatter(-1, x[..., None], 0.0)  # all else is known, and costs nothing
    model.logits = lambda *seen: (sure, None)
    prior = Independent(Normal(torch.zeros(3, 64), math.hypot(2, 1)), 2)
    kl = kl_divergence(Independent(Normal(E[x[0]], 2.0), 2), prior)
    assert torch.allclose(model.nats(x, 3), kl, atol=1e-3)


def test_the_likelihood_left_to_right_is_a_distribution_and_exact_with_the_true_posterior(joint):
    """With sigma_max = 100 noise says next to nothing of its token."""
    assert torch.allclose(Exact(joint).nats_left(joint.x).double(), -joint.p.log(), atol=0.05)
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES))
    torch.nn.init.normal_(model.head.weight)
    nats = model.nats_left(joint.x).detach()
    assert abs((-nats).exp().sum() - 1) < 1e-5 and nats.std() > 0.1


# ---- samplers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('first', ['together', 'random', 'left'])
@pytest.mark.parametrize('rule', ['euler', 'heun', 'dpmpp_2m'])
def test_the_probability_flow_draws_the_true_law_in_any_fixed_order(joint, rule, first):
    """Chi-square over 27 sequences, 4,000 draws; a false alarm has probability 1e-4, the seed is fixed."""
    model = Exact(joint)
    torch.manual_seed(2)
    steps = 50 if rule == 'heun' else 100
    *_, samples = model.sample(torch.full((4000, 3), 3), steps, rule=rule, first=first, stagger=2.0)
    assert chi_square_p(samples, joint.p, 3) > 1e-4


@pytest.mark.parametrize('first', score.ORDERS)
@pytest.mark.parametrize('rule', score.RULES)
def test_every_sampler_writes_what_the_given_tokens_leave_possible(rule, first):
    """A law of three sequences which share no token: one given token decides."""
    joint = Joint()
    joint.p = torch.full_like(joint.p, 1e-12)
    for row in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        joint.p[(joint.x == torch.tensor(row)).all(-1)] = 1 / 3
    canvas = torch.full((30, 3), 3)
    canvas[:, 1] = torch.arange(30) % 3
    torch.manual_seed(0)
    *_, samples = Exact(joint).sample(canvas, 12, rule=rule, first=first)
    assert (samples == torch.stack([(canvas[:, 1] + 2) % 3, canvas[:, 1], (canvas[:, 1] + 1) % 3], 1)).all()
    *_, samples = Exact(joint).sample(torch.full((60, 3), 3), 40, rule=rule, first=first)
    assert (joint.p[(samples[:, None] == joint.x).all(-1).byte().argmax(-1)] > 0.1).all()


@pytest.mark.parametrize('rule, order', [('euler', 1), ('heun', 2), ('dpmpp_2m', 2)])
def test_the_error_of_a_sampler_falls_as_its_order_says(rule, order):
    """On Gaussian data D = x / (sigma^2 + 1), and x falls as sqrt(sigma^2 + 1)."""
    def end(steps):
        even = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = (10 * 0.01 ** (even + 0.3 * even * (1 - even))).tolist() + [0.0]  # unequal log ratios
        x, sigma, seen = torch.full((1, 1, 1), 20.0).double(), torch.full((1, 1), 10.0).double(), []
        path = lambda k, logp, sigma: torch.full_like(sigma, levels[k])

        def denoise(x, sigma):
            if sigma[0, 0] < 0.1001:
                seen.append(x.item())
            return None, x / (sigma[..., None] ** 2 + 1)
        list(score.RULES[rule](denoise, x, sigma, path, steps))
        return seen[-1]
    true = 20 * math.sqrt((0.1 ** 2 + 1) / (10 ** 2 + 1))
    errors = [abs(end(steps) - true) for steps in (33, 65, 129)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < 0.35, errors


@pytest.mark.parametrize('rule', score.RULES)
def test_given_tokens_are_clean_points_all_along_and_no_level_ever_rises(joint, rule):
    model, seen = Exact(joint), []
    exact = model.logits
    model.logits = lambda x, sigma, E, guess=None: seen.append((x, sigma, E)) or exact(x, sigma, E)
    canvas = torch.tensor([[3, 1, 3], [3, 3, 0]])
    frames = list(model.sample(canvas, 9, rule=rule, first='sure'))
    assert len(frames) == len(seen) == (17 if rule == 'heun' else 9)
    given = canvas < 3
    for x, sigma, E in seen:
        assert (sigma[given] == 0).all() and torch.equal(x[given], E[canvas[given]])
    assert all((f[given] == canvas[given]).all() for f in frames)
    if rule != 'heun':
        assert all((b[1] <= a[1]).all() for a, b in zip(seen, seen[1:]))
    assert torch.allclose(seen[0][1][~given], torch.tensor(100.0)) and torch.allclose(seen[-1][1][~given],
                                                                                      torch.tensor(0.1))


def test_the_order_says_which_tokens_lose_their_noise_first(joint):
    def levels(first, rows=200):
        model, seen = Exact(joint), []
        exact = model.logits
        model.logits = lambda x, sigma, E, guess=None: seen.append(sigma) or exact(x, sigma, E)
        torch.manual_seed(0)
        list(model.sample(torch.full((rows, 3), 3), 9, first=first, rule='euler', stagger=3.0))
        return torch.stack(seen[1:-1])
    together, left, random, sure = map(levels, ('together', 'left', 'random', 'sure'))
    assert (together == together[..., :1]).all()
    assert (left.diff(dim=-1) >= 0).all() and (left.diff(dim=-1) > 0).any()
    places = random[3].argmin(-1)
    assert set(places.tolist()) == {0, 1, 2} and ((random[:-1].diff(dim=0) <= 0).all())
    assert torch.equal(random[3].argmax(-1), random[4].argmax(-1))  # the same order at every step
    assert not torch.equal(sure[3].sort(-1).values, together[3])


def test_the_surest_token_loses_its_noise_first():
    model, seen = score.Model(score.Config(**SIZES)), []

    def certain_in_the_middle(x, sigma, E, guess=None):
        seen.append(sigma)
        return torch.tensor([[0.0, 0, 1], [0, 0, 9], [0, 0, 3]]).expand(len(x), 3, 3), None
    model.logits = certain_in_the_middle
    list(model.sample(torch.full((2, 3), 3), 9, first='sure', stagger=3.0))
    levels = torch.stack(seen)  # the middle first, then the last, then the first
    assert (levels[:, :, 1] <= levels[:, :, 2]).all() and (levels[:, :, 2] <= levels[:, :, 0]).all()
    assert (levels[4, :, 1] < levels[4, :, 0]).all()


@pytest.mark.parametrize('rule', score.RULES)
def test_a_token_whose_level_stays_does_not_move(rule):
    levels = torch.tensor([[9.0, 9.0], [5.0, 9.0], [3.0, 2.0], [0.0, 0.0]])
    x, seen = torch.randn(1, 2, 4), []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return None, 0.3 * x
    list(score.RULES[rule](denoise, x, levels[:1], lambda k, logp, sigma: levels[k:k + 1], 3))
    at = lambda level: [x[0, 1] for x, sigma in seen if sigma[0, 1] == level]
    assert len(at(9.0)) >= 2 and all(torch.allclose(point, x[0, 1]) for point in at(9.0))
    assert not torch.allclose(at(2.0)[0], x[0, 1]) and not torch.allclose(seen[-1][0][0, 0], x[0, 0])


def test_the_multistep_solver_does_not_extrapolate_from_a_step_that_was_hardly_one():
    """D went from 0 to 1 while the token moved by a ten-thousandth: the next point lies between 0 and 2."""
    levels = torch.tensor([10.0, 9.999, 5.0, 2.0, 0.0])
    answers, seen = iter((0.0, 1.0, 1.0, 1.0)), []

    def denoise(x, sigma):
        seen.append(x.item())
        return None, torch.full_like(x, next(answers))
    list(gaussian.dpmpp_2m(denoise, torch.zeros(1, 1, 1), levels[:1, None],
                        lambda k, logp, sigma: levels[k:k + 1, None], 4))
    assert all(-0.01 <= x <= 2 for x in seen) and seen[2] > 0.4


@pytest.mark.parametrize('first', ['random', 'left', 'sure'])
@pytest.mark.parametrize('rule', ['euler', 'dpmpp_2m'])
def test_points_stay_as_large_as_the_noise_says_where_tokens_start_to_move_in_mid_step(joint, rule, first):
    model, large = Exact(joint), []
    exact = model.logits
    model.logits = lambda x, sigma, E, guess=None: large.append(
        (x.square().mean(-1) / (sigma ** 2 + 1)).max().item()) or exact(x, sigma, E)
    torch.manual_seed(0)
    list(model.sample(torch.full((200, 3), 3), 17, rule=rule, first=first, stagger=2.7))
    assert max(large) < 8  # the largest of 10,000 chi-squares of 6 degrees of freedom, over 6, is about 6


def test_the_denoised_point_is_in_the_convex_hull_of_the_embeddings(joint):
    """In every direction it reaches no further than the furthest embedding."""
    model, points = Exact(joint), []

    def spy(denoise, x, sigma, path, steps):
        points.append(denoise(x, sigma)[1])
        yield denoise(x, sigma)[0]
    score.RULES['spy'] = spy
    try:
        for how in (dict(), dict(temperature=0.3), dict(temperature=0.0), dict(top_k=1), dict(top_p=0.5)):
            list(model.sample(torch.full((20, 3), 3), 1, rule='spy', **how))
    finally:
        del score.RULES['spy']
    E, direction = score.on_sphere(model.embed.weight), torch.randn(6, 500)
    for D in points:
        assert ((D @ direction) <= (E @ direction).amax(0) + 1e-4).all()
    corner = lambda D: (D[..., None, :] - E).square().sum(-1).amin(-1)
    assert corner(points[2]).max() < 1e-6 < corner(points[0]).min()  # temperature 0: an embedding itself


# ---- embeddings, noise, time warp -------------------------------------------------------------------------

def test_embeddings_have_norm_sqrt_d_and_anisotropy_tells_orthogonal_from_collapsed():
    E = score.on_sphere(torch.randn(5, 9))
    assert torch.allclose(E.norm(dim=-1), torch.full((5,), 3.0))
    assert abs(score.anisotropy(torch.eye(4))) < 1e-6 and abs(score.anisotropy(torch.ones(4, 6)) - 1) < 1e-6
    pair = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert abs(score.anisotropy(5 * pair) - 0.6) < 1e-6


def test_preconditioning_is_what_least_squares_gives():
    torch.manual_seed(0)
    for sigma in (0.3, 1.0, 4.0):
        c_in, c_skip, c_out = gaussian.precondition(torch.tensor(sigma))
        e = torch.randn(200000)
        x = e + sigma * torch.randn(200000)
        assert abs((c_in * x).std() - 1) < 0.01
        assert abs((x * e).mean() / (x * x).mean() - c_skip) < 0.01   # the best multiple of x
        assert abs((e - c_skip * x).std() - c_out) < 0.01             # and what is left for the network
        assert abs(c_skip / c_out ** 2 - 1 / sigma ** 2) < 1e-4       # the evidence
        assert abs(1 / c_out ** 2 - (sigma ** 2 + 1) / sigma ** 2) < 1e-4


def test_the_evidence_is_the_posterior_of_a_token_by_its_own_point():
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES, sigma_min=0.1))
    E = score.on_sphere(model.embed.weight)
    sigma = torch.tensor([[0.5, 2.0, 9.0]])
    x = E[torch.tensor([[0, 2, 1]])] + sigma[..., None] * torch.randn(1, 3, 64)
    far = (x[:, :, None] - E).square().sum(-1) / (2 * sigma[..., None] ** 2)
    assert torch.allclose(model.logits(x, sigma, E)[0].softmax(-1), (-far).softmax(-1), atol=1e-4)


def test_logits_are_the_preconditioned_output_of_edm_decoded_by_the_embeddings():
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES))
    torch.nn.init.normal_(model.head.weight)
    E, sigma = score.on_sphere(model.embed.weight), torch.tensor([[2.0, 5.0, 50.0]])
    x = E[torch.tensor([[0, 2, 1]])] + sigma[..., None] * torch.randn(1, 3, 64)
    logits, out = model.logits(x, sigma, E)
    s = sigma[..., None]
    D = x / (s ** 2 + 1) + s / (s ** 2 + 1).sqrt() * out
    assert torch.allclose(logits, D @ E.T * (s ** 2 + 1) / s ** 2, atol=1e-2) and out.abs().mean() > 0.1


def test_noise_levels_go_from_low_to_high_and_their_slope_is_the_difference_quotient():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for low, high, rho in ((1.0, 10.0, 1.0), (0.1, 100.0, 7.0)):
        sigma, slope = gaussian.noise_level(t, low, high, rho)
        assert abs(sigma[0] - low) < 1e-9 and abs(sigma[-1] - high) < 1e-9 and (sigma.diff() > 0).all()
        above, below = (gaussian.noise_level(t + h, low, high, rho)[0] for h in (1e-6, -1e-6))
        assert torch.allclose(slope, (above - below) / 2e-6, rtol=1e-5)
    assert torch.allclose(gaussian.noise_level(t, 1.0, 10.0, 1.0)[0], 1 + 9 * t)


def test_the_warp_is_a_law_of_t_and_quantile_inverts_it():
    torch.manual_seed(0)
    for slopes in (torch.zeros(100), 3 * torch.randn(100)):
        cdf = warp.warp_cdf(slopes)
        assert cdf[0] == 0 and abs(cdf[-1] - 1) < 1e-6 and (cdf.diff() > 0).all()
        u = torch.linspace(0, 1, 1001)
        t, density = warp.quantile(cdf, u)
        assert (t.diff() >= 0).all() and t[0] == 0 and abs(t[-1] - 1) < 1e-4
        i = (t * 100).long().clamp(max=99)
        assert torch.allclose(cdf[i] + (t * 100 - i) * cdf.diff()[i], u, atol=1e-4)
        inside = (t * 100 - i > 1e-3) & (t * 100 - i < 1 - 1e-3)  # at an end it may be that of either bin
        assert torch.allclose(density[inside], 100 * cdf.diff()[i][inside], rtol=1e-3)
    assert torch.allclose(warp.quantile(warp.warp_cdf(torch.zeros(100)), u)[0], u, atol=1e-4)


def test_the_rate_of_the_bound_is_the_slope_of_the_precision():
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES)).double()
    torch.nn.init.normal_(model.slopes)
    u = torch.rand(50, dtype=torch.float64)
    precision = lambda u: model.level(u)[0] ** -2
    assert torch.allclose(model.level(u)[1], (precision(u - 1e-7) - precision(u + 1e-7)) / 2e-7, rtol=1e-3)


def test_the_warp_learns_to_visit_noise_levels_in_proportion_to_the_rise_of_the_loss():
    """The loss is a step at t = 0.4: half of its rise lies in [0.39, 0.41]; the law follows."""
    torch.manual_seed(0)
    slopes = torch.nn.Parameter(torch.full((100,), math.log(0.02)))
    adam = torch.optim.Adam([slopes], lr=0.03)
    for _ in range(1500):
        t = torch.rand(2048)
        loss = 2 * t + 2 * ((t - 0.39) / 0.02).clamp(0, 1)
        (warp.warped_loss(slopes, t) - loss).square().mean().backward()
        adam.step()
        adam.zero_grad()
    cdf = warp.warp_cdf(slopes.detach())
    inside = cdf[41] - cdf[39]
    assert abs(inside - ((1 - warp.FLOOR) * (2 + 0.04) / 4 + warp.FLOOR * 0.02)) < 0.03
    t = torch.rand(1000)
    assert (warp.warped_loss(slopes, t) - (2 * t + 2 * ((t - 0.39) / 0.02).clamp(0, 1))).abs().max() < 0.2


def test_staggered_quantiles_fall_from_1_to_0_each_in_its_share_of_the_way():
    order, left = torch.linspace(0, 1, 5), torch.linspace(0, 1, 1001)[:, None]
    for stagger in (0.0, 1.0, 8.0):
        u = score.staggered(left, order, stagger)
        assert (u[-1] == 1).all() and (u[0] == 0).all() and (u.diff(dim=0) >= 0).all()
        assert (u.diff(dim=1) >= 0).all()  # the first have less noise
        moving = ((u > 0) & (u < 1)).double().mean(0)
        assert torch.allclose(moving, torch.full((5,), 1 / (1 + stagger)).double(), atol=3e-3)


# ---- training ---------------------------------------------------------------------------------------------

def noised(model, x, **how):
    """What the network is shown in a training step: x, sigma, guess."""
    seen, own = [], model.logits

    def spy(noisy, sigma, E, guess=None, segment=None):
        seen.append((noisy, sigma, guess, E))
        return own(noisy, sigma, E, guess, segment)
    model.logits = spy
    loss, metrics = model(x, **how)
    model.logits = own
    return seen, loss, metrics


def test_every_token_has_a_noise_level_of_its_own_or_all_of_a_row_the_same():
    torch.manual_seed(0)
    x = torch.randint(3, (400, 3))
    for share in (1.0, 0.0, 0.5):
        seen, _, _ = noised(score.Model(score.Config(**SIZES, per_token=share, given_share=0.0)), x)
        sigma = seen[0][1]
        differ = (sigma != sigma[:, :1]).any(-1).double().mean()
        assert abs(differ - share) < 0.1 and (share == 0.5 or differ == share)
        assert len(sigma[:, 0].unique()) > 390 and (sigma > 1.499).all() and (sigma < 60.01).all()


def test_a_tilt_makes_clean_tokens_more_common():
    medians = []
    for tilt in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        model = score.Model(score.Config(**SIZES, tilt=tilt))
        medians.append(model.draw_quantiles(500, 3, 'cpu').median().item())
    assert all(abs(median - 0.5 ** tilt) < 0.05 for median, tilt in zip(medians, (0.5, 1.0, 2.0)))


def test_given_tokens_enter_clean_and_are_outside_the_loss():
    torch.manual_seed(0)
    model = score.Model(score.Config(**{**SIZES, 'block_size': 12}, given_share=1.0))
    x = torch.randint(3, (300, 12))
    seen, loss, metrics = noised(model, x)
    noisy, sigma, _, E = seen[0]
    held = sigma == 0
    assert 0.3 < held.double().mean() < 0.6 and torch.equal(noisy[held], E[x[held]])
    assert ((noisy - E[x]).square().sum(-1) > 0)[~held].all()
    own, wrong = model.logits, torch.full((300, 12, 3), 50.0).scatter(-1, x[..., None], -50.0)
    for where, expected in ((held, metrics['cross_entropy'].item()), (~held, 100 + math.log(2))):
        def spoiled(noisy, sigma, E, guess=None, segment=None):
            logits, F = own(noisy, sigma, E)
            return torch.where(where[..., None], wrong, logits), F
        torch.manual_seed(0)
        score.Model(model.config)  # the same draws again
        torch.randint(3, (300, 12))
        model.logits = spoiled
        assert abs(model(x)[1]['cross_entropy'].item() - expected) < 1e-3


def test_a_given_token_leaves_no_doubt_whatever_the_least_noise_and_the_network_is_told_its_level():
    torch.manual_seed(0)
    model, told = score.Model(score.Config(**SIZES, sigma_min=20.0)), []
    trunk = model.gpt.trunk
    model.gpt.trunk = lambda h, time: told.append((h, time)) or trunk(h, time=time)
    E = score.on_sphere(model.embed.weight)
    x, sigma = E[torch.tensor([[0, 2, 1]])], torch.tensor([[0.0, 1.0, 1e6]])
    logits, _ = model.logits(x, sigma, E)
    assert logits.softmax(-1)[0, 0, 0] > 0.999
    (h, time), = told
    assert torch.allclose(h[0, 0], model.read(E[0]), atol=1e-5)
    assert torch.allclose(time, torch.tensor([[0, 0.5, 1.0]]))


def test_the_time_warp_learns_from_the_loss_and_the_loss_not_from_the_time_warp():
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES, given_share=0.0))
    x, u, noise = torch.randint(3, (4, 3)), torch.rand(4, 3), torch.randn(4, 3, 64)
    loss, metrics = model(x, u=u, noise=noise)
    assert torch.allclose(loss, metrics['cross_entropy'])
    gradient, = torch.autograd.grad(loss, [model.slopes])
    E = score.on_sphere(model.embed.weight)
    sigma, _, t = model.level(u)
    logits, _ = model.logits(E[x] + sigma[..., None] * noise, sigma, E)
    nats = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0].detach()
    warp_loss = (warp.warped_loss(model.slopes, t) - nats).square().mean()
    expected, = torch.autograd.grad(warp_loss, [model.slopes])
    assert torch.allclose(gradient, expected, atol=1e-6) and gradient.abs().max() > 1e-3


def test_given_spans_are_of_any_length_half_of_them_scattered():
    torch.manual_seed(0)
    held = score.spans(4000, 8)
    lengths = held.sum(-1)
    assert set(lengths.tolist()) == set(range(8))
    runs = (held.int().diff(dim=-1) == 1).sum(-1) + held[:, 0].int()
    middle = (lengths > 2) & (lengths < 6)
    assert 0.5 < (runs[middle] == 1).double().mean() < 0.75  # 0.5, and the scattered that happen to be spans
    assert (held.double().mean(0) - held.double().mean()).abs().max() < 0.12


def test_self_conditioning_shows_the_first_half_of_the_rows_their_first_guess():
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES, self_condition=True))
    seen, _, _ = noised(model, torch.randint(3, (5, 3)))
    (noisy, sigma, none, E), (_, _, guess, _) = seen
    assert none is None and len(noisy) == 2 and guess.shape == (5, 3, 64)
    assert torch.allclose(guess[:2], model.logits(noisy, sigma, E)[0].softmax(-1) @ E)
    assert (guess[2:] == 0).all()
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(1, 3, 64)
    with_guess, without = (model.logits(x, torch.ones(1, 3), E, g)[0] for g in (guess[:1], None))
    assert not torch.allclose(with_guess, without, atol=1e-3)


def test_weights_and_squared_error_of_the_loss_by_hand():
    for knobs in (dict(), dict(loss_weight='edm'), dict(mse=0.5), dict(mse=0.5, loss_weight='edm')):
        torch.manual_seed(0)
        model = score.Model(score.Config(**SIZES, given_share=0.0, **knobs))
        torch.nn.init.normal_(model.head.weight, std=0.2)
        x, u, noise = torch.randint(3, (4, 3)), torch.rand(4, 3), torch.randn(4, 3, 64)
        loss, _ = model(x, u=u, noise=noise)
        E = score.on_sphere(model.embed.weight)
        s = model.level(u)[0][..., None]
        noisy = E[x] + s * noise
        logits, F = model.logits(noisy, s[..., 0], E)
        ce = -logits.log_softmax(-1).gather(-1, x[..., None])
        weight = (s ** 2 + 1) / s ** 2
        expected = (ce * weight if 'loss_weight' in knobs else ce).mean()
        D = noisy / (s ** 2 + 1) + s / (s ** 2 + 1).sqrt() * F
        expected = expected + knobs.get('mse', 0) * (weight * (D - E[x]) ** 2).mean()
        assert torch.allclose(loss, expected, rtol=1e-4), knobs


@pytest.mark.parametrize('knobs', [dict(self_condition=True, given_share=0.5, mse=0.1, loss_weight='edm'),
                                   dict(reads='scaled', per_token=0.5, time_warp=False)], ids=str)
def test_every_option_traces_as_one_graph(knobs):
    model, segment = score.Model(score.Config(**SIZES, **knobs)), torch.tensor([[0, 0, 1]] * 4)
    loss, _ = torch.compile(model, backend='eager', fullgraph=True)(torch.randint(3, (4, 3)), segment)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_half_precision_keeps_the_evidence_exact():
    torch.manual_seed(0)
    model = score.Model(score.Config(**SIZES, sigma_min=0.1))
    E = score.on_sphere(model.embed.weight)
    x, sigma = E[torch.tensor([[0, 1, 2]])] + 0.1 * torch.randn(1, 3, 64), torch.full((1, 3), 0.1)
    with torch.autocast('cpu', torch.bfloat16):
        low = model.logits(x, sigma, E)[0]
    assert torch.allclose(low, model.logits(x, sigma, E)[0], rtol=1e-6) and low.abs().max() > 5000
    with torch.autocast('cpu', torch.bfloat16):
        D = score.denoised(torch.randn(2, 3, 3), E)
    assert D.dtype == torch.float32 and not torch.equal(D, D.bfloat16().float())


def test_half_precision_of_the_network_does_not_bias_the_bound():
    torch.manual_seed(0)
    model = score.Model(score.Config(**{**SIZES, 'vocab_size': 11, 'block_size': 8}))
    x, bounds = torch.randint(11, (200, 8)), []
    for low in (True, False):
        common.seed_everything(0)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=low):
            bounds.append(model.nats(x, 4).mean())  # a fresh network adds 0 in either precision
    assert torch.allclose(*bounds, rtol=1e-5)


@pytest.mark.parametrize('knob, words', [
    ('sigma_min=60', 'sigma_max=60.0 sigma_min < sigma_max'), ('sigma_min=0.001', '0.01 <= sigma_min'),
    ('sigma_min=0', 'positive'), ('vocab_size=1', 'vocab_size'), ('rho=0', 'positive'),
    ('d_embed=0', 'at least 1'), ('per_token=1.5', '[0, 1]'), ('given_share=-0.1', '[0, 1]'),
    ('reads=hard', 'soft, scaled'), ('loss_weight=elbo', 'flat, edm'), ('mse=-1', 'negative'),
    ('tilt=0', 'positive'), ('bound_stagger=-1', 'negative')])
def test_an_impossible_option_is_named(knob, words, mistake):
    told = mistake(lambda argv: settings(argv, '', score.Config), f'--{knob}')
    assert knob.split('=')[0] in told and all(word in told for word in words.split())


@pytest.mark.parametrize('knobs, word', [(dict(rule='ancestral'), 'renoise'), (dict(first='best'), 'sure'),
                                         (dict(cfg=1.0), 'cfg'), (dict(eta=0.1), 'eta')])
def test_an_impossible_option_of_sampling_is_named(joint, knobs, word):
    model = Exact(joint)
    with pytest.raises(ValueError, match=word):
        list(model.sample(torch.full((1, 3), 3), 4, **arguments(model.sample, knobs, {})))


def test_one_step_and_a_full_canvas_are_no_special_cases(joint):
    model = Exact(joint)
    for rule in score.RULES:
        frames = list(model.sample(torch.full((2, 3), 3), 1, rule=rule))
        assert len(frames) == 1 and (frames[0] < 3).all()
    assert list(model.sample(torch.tensor([[0, 1, 2]]), 4)) == []


def test_equal_seeds_give_equal_texts(joint):
    model, texts = Exact(joint), []
    for seed in (1, 1, 2):
        common.seed_everything(seed)
        *_, text = model.sample(torch.full((40, 3), 3), 8)
        texts.append(text)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
