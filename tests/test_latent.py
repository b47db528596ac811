"""latent.py: noise, samplers, loss, bound and texts, against answers known otherwise."""
import dataclasses
import json
import math

import pytest
import torch

import latent
import vae
from configurator import settings
from parts import gaussian
from text import latents
from text.windows import END, Passages

VAE = vae.Config(vocab_size=7, block_size=8, base_context=16, n_layer=1, n_head=2, n_embd=16, n_latent=2,
                 d_latent=4, lora_rank=2)
SIZES = dict(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=16, stride=4,
             vae=json.dumps(dataclasses.asdict(VAE)))


def random_model(**knobs):
    torch.manual_seed(0)
    model = latent.Model(latent.Config(**{**SIZES, **knobs}))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval().requires_grad_(False)


def context(model, B, seed=1):
    torch.manual_seed(seed)
    before = torch.randn(B, model.config.n_prev, model.n, model.d)
    return before, torch.ones(B, model.config.n_prev, dtype=torch.bool)


# ---- noise

def test_the_tan_law_has_the_cdf_of_the_arctangent_between_its_ends():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = latent.tan_law(u, 1e-3, 1e3)
    assert torch.allclose(sigma[[0, -1]], torch.tensor([1e-3, 1e3], dtype=torch.float64))
    low, high = 2 / math.pi * math.atan(1e-3), 2 / math.pi * math.atan(1e3)
    assert torch.allclose((2 / math.pi * sigma.atan() - low) / (high - low), u)


def test_the_lognormal_law_has_a_normal_logarithm_cut_off_at_its_ends():
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    sigma = latent.lognormal_law(u, 1e-3, 1e3, -0.5, 0.8)  # the ends are over 8 standard deviations away
    assert abs(sigma.log().mean() + 0.5) < 1e-4 and abs(sigma.log().std() - 0.8) < 1e-3
    sigma = latent.lognormal_law(u, 0.5, 2.0, -0.5, 0.8)
    assert sigma.min() >= 0.5 and sigma.max() <= 2.0
    normal = torch.distributions.Normal(-0.5, 0.8)
    inside = lambda s: normal.cdf(torch.tensor(s, dtype=torch.float64).log())
    share = (inside(1.0) - inside(0.5)) / (inside(2.0) - inside(0.5))
    assert abs((sigma < 1).double().mean() - share) < 1e-4


@pytest.mark.parametrize('weight, expected', [('edm', lambda s: 1.0), ('eps', lambda s: 1 / (1 + s * s)),
                                              ('x0', lambda s: s * s / (1 + s * s))])
@pytest.mark.parametrize('sigma', [0.1, 1.0, 7.0])
def test_a_zero_network_on_normal_latents_has_the_loss_known_in_closed_form(weight, expected, sigma):
    torch.manual_seed(0)
    model = latent.Model(latent.Config(**SIZES, error_weight=weight))  # its head is zero
    z = torch.randn(4000, 2, 4)
    loss, metrics = model(z, *context(model, 4000), sigma=torch.full((4000,), sigma))
    # 32,000 squares of normal numbers: a standard error of sqrt(2 / 32000) = 0.8%
    assert abs(loss / expected(sigma) - 1) < 0.04
    assert abs(metrics['error'] / (sigma ** 2 / (1 + sigma ** 2)) - 1) < 0.04


def test_the_condition_is_dropped_in_a_fifth_of_the_rows():
    model = random_model()
    seen = []
    model.denoise = lambda x, sigma, before, there: seen.append(there) or torch.zeros_like(x)
    torch.manual_seed(3)
    model(torch.randn(20_000, 2, 4), *context(model, 20_000))
    assert abs(seen[0].float().mean() - 0.8) < 0.015  # 5 standard errors


def test_a_window_that_is_not_there_is_not_seen_and_one_that_is_there_is():
    model, x, sigma = random_model(n_prev=2), torch.randn(3, 2, 4), torch.tensor([0.3, 1.0, 5.0])
    before, there = context(model, 3)
    there[:, 0] = False
    other = before.clone()
    other[:, 0] = 9
    D = model.denoise(x, sigma, before, there)
    assert torch.equal(D, model.denoise(x, sigma, other, there))
    assert not torch.allclose(D, model.denoise(x, sigma, other, there | True))


# ---- samplers

def test_the_karras_grid_falls_from_high_to_low_and_ends_at_zero():
    grid = gaussian.karras(10, 0.01, 100.0)
    assert len(grid) == 11 and grid[-1] == 0 and (grid[1:] < grid[:-1]).all()
    assert torch.allclose(grid[[0, -2]], torch.tensor([100.0, 0.01]))
    root = grid[:-1] ** (1 / 7)
    assert torch.allclose(root.diff(), root.diff().mean().expand(9), rtol=1e-3)
    assert torch.allclose(gaussian.karras(1, 0.01, 100.0), torch.tensor([100.0, 0.0]))


def run(rule, steps, x, denoise=None, **knobs):
    levels = gaussian.karras(steps, 0.01, 100.0).double()
    path = lambda k, *_: levels[k].expand(x.shape[:2])
    exact = lambda x, sigma: (x / (1 + sigma[..., None] ** 2),) * 2  # of N(0, 1)
    *_, D = latent.RULES[rule](denoise or exact, x, path(0), path, steps, **knobs)
    return D


@pytest.mark.parametrize('rule, knobs', [('euler', {}), ('heun', {}), ('dpmpp_2m', {}), ('dpmpp_2m_sde', {}),
                                         ('dpmpp_2m_sde', dict(eta=0.5)), ('dpmpp_2m_sde', dict(eta=1.0))])
def test_with_the_exact_denoiser_of_normal_latents_samples_have_variance_one(rule, knobs):
    torch.manual_seed(0)
    x = math.hypot(100, 1) * torch.randn(4000, 2, 5, dtype=torch.float64)
    steps = 400 if rule == 'euler' else 100
    D = run(rule, steps, x, **knobs)
    # 40,000 draws: the standard error of a variance is 0.007; what is left is the solver's
    assert abs(D.var() - 1) < (0.04 if rule == 'euler' else 0.03) and abs(D.mean()) < 0.025


def test_without_new_noise_the_sde_sampler_is_the_ode_sampler():
    torch.manual_seed(0)
    x = 100 * torch.randn(3, 2, 5, dtype=torch.float64)
    curved = lambda x, sigma: (torch.tanh(x / (1 + sigma[..., None])),) * 2
    assert torch.allclose(run('dpmpp_2m_sde', 12, x, curved, eta=0.0), run('dpmpp_2m', 12, x, curved))
    assert not torch.allclose(run('dpmpp_2m_sde', 12, x, curved, eta=0.5), run('dpmpp_2m', 12, x, curved))


def test_more_steps_bring_every_solver_to_the_same_point():
    x = 100 * torch.randn(1, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    two = lambda x, sigma: (2 * torch.tanh(2 * x / sigma[..., None] ** 2),) * 2  # two points, -2 and 2
    best = run('heun', 2000, x, two)
    for rule in ('euler', 'dpmpp_2m', 'dpmpp_2m_sde'):
        assert (run(rule, 500, x, two) - best).abs().max() < 0.02, rule


def test_the_expected_latents_are_what_the_highest_noise_level_of_training_tells():
    """The exact denoiser of N(m, 1) is (sigma^2 m + x) / (sigma^2 + 1)."""
    model, seen = random_model(sigma_high=50.0), []
    before, there = context(model, 400)
    mean = torch.tensor([0.0, 2.0, 0.0, -3.0])

    def denoise(x, sigma, *_):
        seen.append(sigma)
        variance = sigma[:, None, None].square()
        return (variance * mean + x) / (variance + 1)
    model.denoise = denoise
    found = model.expected(before, there)
    assert found.shape == (400, 2, 4) and (torch.cat(seen) == 50).all()
    # what is left of x has a standard deviation of 1 / 50; 6 of them for 3,200 numbers
    assert (found - mean).abs().max() < 6 / 50


def test_guidance_of_weight_zero_is_plain_and_any_other_is_not():
    model = random_model()
    before, there = context(model, 3)

    def last(**knobs):
        torch.manual_seed(5)
        *_, D = model.sample_latents(before, there, 6, **knobs)
        return D
    def by_hand():
        levels = gaussian.karras(6, latent.LOW, latent.HIGH)
        torch.manual_seed(5)
        x = math.hypot(latent.HIGH, 1) * torch.randn(3, 2, 4)
        path = lambda k, *_: levels[k].expand(3, 2)
        denoise = lambda x, sigma: (model.denoise(x, sigma[:, 0], before, there),) * 2
        *_, D = gaussian.dpmpp_2m(denoise, x, path(0), path, 6)
        return D
    assert torch.allclose(last(cfg=0.0), by_hand(), atol=1e-5)
    assert not torch.allclose(last(cfg=1.0), by_hand())
    nowhere = there & False
    torch.manual_seed(5)
    *_, without = model.sample_latents(before, nowhere, 6)
    assert torch.allclose(last(cfg=-1.0), without, atol=1e-5)  # D + (-1)(D - D0) = D0


# ---- the network

def test_the_denoiser_is_the_network_behind_edm_s_preconditioning_and_knows_the_noise_level():
    """c_in, c_skip, c_out and the network's input, written out again."""
    model = random_model()
    before, there = context(model, 3)
    x, sigma, seen = torch.randn(3, 2, 4), torch.tensor([0.2, 1.0, 9.0]), []
    trunk = model.gpt.trunk
    model.gpt.trunk = lambda h, *others: seen.append(h) or trunk(h, *others)
    D = model.denoise(x, sigma, before, there)
    variance = sigma.square()[:, None, None] + 1
    assert torch.allclose(seen[0][:, -2:] - model.slot[-2:], model.project(x / variance.sqrt()), atol=1e-5)
    F = trunk(seen[0], torch.ones(3, 1, 1, 5, dtype=torch.bool))[:, -2:] @ model.head.weight.T
    assert F.abs().max() > 0.1
    assert torch.allclose(D, x / variance + sigma[:, None, None] / variance.sqrt() * F, atol=1e-5)
    assert (torch.pdist(seen[0][:, 0]) > 0.1).all()


# ---- the bound

def test_the_bound_hangs_on_the_window_before_by_the_diffusion_and_on_the_prefix_by_the_decoder():
    model, x = random_model(), torch.randint(7, (4, 8), generator=torch.Generator().manual_seed(0))
    read, window_nats = [], model.vae.window_nats

    def nats(prefix, before):
        torch.manual_seed(0)
        return model.nats(x, 4, prefix, before)
    model.vae.window_nats = lambda z, x, prefix, s: read.append(prefix) or window_nats(z, x, prefix, s)
    plain = nats(None, None)
    nothing = torch.full_like(x, 7)
    assert (read.pop() == 7).all() and torch.equal(plain, nats(nothing, nothing[:, None]))
    assert ((nats(x, None) - plain).abs() > 1e-3).all() and torch.equal(read.pop(), x)
    assert ((nats(None, x[:, None]) - plain).abs() > 1e-3).all() and (read.pop() == 7).all()


def test_the_bound_is_that_of_a_normal_prior_when_the_denoiser_is_exact_for_it():
    """With D = x / (1 + sigma^2) the diffusion's prior at sigma_0 is N(0, 1 + sigma_0^2), so the bound
    without the text is KL(N(z, sigma_0^2) || N(0, 1 + sigma_0^2)), which is known."""
    torch.manual_seed(0)
    model = latent.Model(latent.Config(**SIZES, decode_sigma=0.3)).eval()  # its head is zero: D is exact
    x = torch.randint(7, (6, 8))
    model.vae.window_nats = lambda z, x, prefix, s: torch.zeros(len(x))
    z = model.vae.encode(x).detach()
    known = (math.log((1 + 0.3 ** 2) / 0.3 ** 2) + (0.3 ** 2 + z ** 2) / (1 + 0.3 ** 2) - 1).sum((1, 2)) / 2
    with torch.no_grad():
        draws = model.nats(x.repeat(40, 1), 50).view(40, 6).double()
    error = draws.std(0) / 40 ** 0.5
    # 6 rows at 5 standard errors, themselves estimated from 40 batches: false alarms below 1e-4
    assert ((draws.mean(0) - known).abs() < 5 * error).all() and (error < 0.1 * known).all()


def test_the_decoder_reads_latents_with_the_noise_of_decode_sigma_in_its_own_units():
    model = random_model(decode_sigma=0.5)
    model.vae.mean.fill_(3.0), model.vae.std.fill_(4.0)
    x, seen = torch.randint(7, (2000, 8)), []
    model.vae.window_nats = lambda z, x, prefix, s: seen.append((z, s)) or torch.zeros(len(x))
    model.nats(x, 1)
    noise = seen[0][0] - model.vae.posterior(x)[0]
    assert abs(noise.std() - 0.5 * 4.0) < 0.06 and abs(noise.mean()) < 0.1  # 16,000 numbers
    assert 1 + seen[0][1] ** 2 == pytest.approx(0.5 ** 2 * 4.0 ** 2)  # told beside the 1


# ---- texts

def test_a_prompt_s_end_is_what_is_encoded_and_context_says_how_much_of_it():
    model, seen = random_model(), []
    encode = model.vae.encode
    model.vae.encode = lambda x: seen.append(x.clone()) or encode(x)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3] + [7] * 5])
    for context, expected in ((0, [3, 4, 5, 6, 0, 1, 2, 3]), (3, [7] * 5 + [1, 2, 3])):
        seen.clear()
        list(model.sample(ids, 2, context=context))
        assert seen[0].tolist() == [expected]


def test_another_context_gives_other_latents_and_the_same_seed_the_same():
    model, ids = random_model(), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3] + [7] * 16])
    drawn, write = [], model.vae.write
    model.vae.write = lambda z, *others: drawn.append(z) or write(z, *others)
    for context in (0, 0, 2):
        torch.manual_seed(0)
        list(model.sample(ids, 4, context=context))
    first, again, other = (torch.stack(drawn[i:i + 2]) for i in (0, 2, 4))
    assert torch.equal(first, again) and not torch.allclose(first[0], other[0], atol=1e-3)


def test_windows_are_drawn_in_turn_each_from_the_latents_before_and_decoded_after_the_text_so_far():
    model = random_model(n_prev=2)
    draws, writes = [], []
    model.sample_latents = lambda before, there, *_: draws.append((before, there)) or iter(
        [torch.full((1, 2, 4), float(len(draws)))])
    model.vae.write = lambda z, prefix, *_: writes.append((z, prefix)) or torch.full((1, 8), len(writes))
    ids = torch.tensor([[6, 6, 6] + [7] * 24])
    *_, canvas = model.sample(ids, 4, windows=3)
    assert canvas.tolist() == [[6] * 3 + [1] * 8 + [2] * 8 + [3] * 8]
    assert [there.tolist() for _, there in draws] == [[[False, True]], [[True, True]], [[True, True]]]
    assert (draws[2][0][0, 0] == 1).all() and (draws[2][0][0, 1] == 2).all()
    assert torch.equal(writes[1][0], model.vae.raw(torch.full((1, 2, 4), 2.0)))
    assert [prefix.tolist() for _, prefix in writes[::2]] == [[[7] * 5 + [6] * 3], [[2] * 8]]


def test_trace_decodes_what_the_sampler_thinks_at_every_step_and_changes_nothing():
    model, ids, texts, handed = random_model(), torch.full((2, 16), 7), [], []
    write = model.vae.write
    for trace in (True, False):
        latents = []
        model.vae.write = lambda z, *others: latents.append(z) or write(z, *others)
        torch.manual_seed(0)
        texts.append(list(model.sample(ids, 5, trace=trace)))
        assert model.revises == trace  # a window's tokens change from step to step
        handed.append(torch.stack(latents))
    assert [len(canvases) for canvases in texts] == [10, 2]
    assert torch.equal(handed[0][[4, 9]], handed[1])  # the second window is of the same numbers, too
    assert not torch.allclose(handed[0][3], handed[0][4], atol=1e-3)
    assert torch.equal(texts[0][4], texts[1][0]) and torch.equal(texts[0][9], texts[1][1])


def test_of_a_prompt_in_sentences_the_last_ones_are_encoded_as_training_would_cut_them():
    config = dataclasses.replace(VAE, sentences=True)
    model, seen = random_model(vae=json.dumps(dataclasses.asdict(config))), []
    model.vae.ends[3] = END
    encode = model.vae.encode
    model.vae.encode = lambda x: seen.append(x) or encode(x)
    prompt = [0, 3, *[1] * 9, 2, 2]  # of the 11 tokens of its second sentence 8 fill a window, then 3
    list(model.sample(torch.tensor([prompt + [7] * 8]), 2, windows=1))
    assert seen[0].tolist() == [[1, 2, 2] + [7] * 5]


def test_a_sampler_tells_the_decoder_of_no_more_noise_than_training_did():
    for noise, expected in ((4.0, latent.DECODER_NOISE), (1.5, 1.5), (0.0, 0.0)):
        config = json.dumps(dataclasses.asdict(dataclasses.replace(VAE, latent_noise=noise)))
        model, told = random_model(vae=config, decode_sigma=100.0), []
        model.vae.write = lambda z, prefix, length, tau, s: told.append(s) or torch.zeros(1, 8).long()
        list(model.sample(torch.full((1, 8), 7), 2))
        list(model.sample(torch.full((1, 8), 7), 2, decoder_noise=2.5))
        assert told == [expected, min(2.5, noise)] and model.decoder_noise == expected
        window_nats = model.vae.window_nats
        model.vae.window_nats = lambda z, x, prefix, s: told.append(s) or window_nats(z, x, prefix, s)
        model.nats(torch.zeros(1, 8).long())
        assert (told[2] > 50) == (noise > 0)  # the bound's: the truth, if the decoder knows what that is


@pytest.mark.parametrize('knobs, words', [
    (dict(rule='eular'), ['eular', 'euler']), (dict(rule='heun', eta=0.5), ['eta', 'heun']),
    (dict(context=9), ['context', '8']), (dict(cfg=1.0), ['cfg', '--start']), (dict(gamma=1.0), ['gamma']),
    (dict(top_k=3), ['top_k', 'dpmpp_2m_sde', 'eta']), (dict(temperature=0.5), ['temperature', 'tau'])])
def test_what_latent_diffusion_cannot_do_is_said(knobs, words):
    with pytest.raises(ValueError) as e:
        list(random_model().sample(torch.full((1, 8), 7), 2, **knobs))
    assert all(word in str(e.value) for word in words)


# ---- the embedded VAE and the latents on disk

def test_training_mode_never_wakes_the_embedded_vae():
    config = dataclasses.replace(VAE, lora_dropout=0.5)
    model = latent.Model(latent.Config(**{**SIZES, 'vae': json.dumps(dataclasses.asdict(config))}))
    for layer in model.vae.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.shape == (16, 2):
            torch.nn.init.ones_(layer.weight)
    model.train()
    assert model.training and not any(m.training for m in model.vae.modules())
    assert not any(p.requires_grad for p in model.vae.parameters())


def test_latents_are_those_of_every_window_and_come_from_disk_the_second_time(tmp_path, monkeypatch):
    model = random_model()
    tokens = torch.randint(7, (100,), dtype=torch.int16)
    source = model.cut(tokens, None, tmp_path)
    expected = model.vae.encode(source.windows.window(torch.arange(len(source.windows))))
    assert torch.allclose(source.z.float(), expected, atol=2e-3) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(model.vae, 'encode', lambda x: pytest.fail("encoded again"))
    assert torch.equal(model.cut(tokens, None, tmp_path).z, source.z)


def test_another_vae_another_text_or_another_stride_has_another_file(tmp_path):
    model, tokens = random_model(), torch.randint(7, (100,), dtype=torch.int16)
    cut = lambda tokens, stride: Passages(tokens, 8, 7, stride)
    latents.cached(model.vae, cut(tokens, 4), tmp_path)
    latents.cached(model.vae, cut(tokens.flip(0), 4), tmp_path)
    latents.cached(model.vae, cut(tokens, 2), tmp_path)
    model.vae.w_e.weight[0, 0] += 1
    latents.cached(model.vae, cut(tokens, 4), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_batch_holds_the_latents_of_windows_and_of_those_that_end_where_they_begin():
    tokens = torch.arange(60, dtype=torch.int16)
    cut = Passages(tokens, 8, 99, 4, n_prev=2)
    z = cut.start[:, None, None].float()  # a latent that is its window's start
    now, before, there = latents.Latents(cut, z).inputs(torch.tensor([0, 2, 5])).values()
    assert now[:, 0, 0].tolist() == [0, 8, 20]
    assert there.tolist() == [[False, False], [False, True], [True, True]]
    assert before[there][:, 0, 0].tolist() == [0, 4, 12]


def test_the_model_carries_its_vae_and_takes_its_weights_from_the_base():
    torch.manual_seed(1)
    base = vae.Model(VAE)
    model = random_model()
    model.inherit(base.state_dict(), [])
    x = torch.randint(7, (4, 8))
    assert torch.allclose(model.vae.encode(x), base.encode(x)) and 'vae.w_e.weight' in model.state_dict()
    assert all(torch.equal(p, base.state_dict()[name]) for name, p in model.vae.state_dict().items())


def test_training_draws_latents_and_evaluation_scores_the_windows_themselves_side_by_side(tmp_path):
    model, tokens = random_model(n_prev=2), torch.randint(7, (100,), dtype=torch.int16)
    batch, count = model.cut(tokens, None, tmp_path).batch(5)
    assert count == 5 * 8 and {name: tuple(t.shape) for name, t in batch.items()} == dict(
        z=(5, 2, 4), before=(5, 2, 2, 4), there=(5, 2))
    rows = model.cut(tokens, None).all()
    assert rows['x'].tolist() == tokens[:96].view(12, 8).tolist()
    assert torch.equal(rows['before'][1:, 1], rows['x'][:-1])
    assert torch.equal(rows['prefix'][1:], rows['x'][:-1])
    assert model(**batch)[0].isfinite() and model.nats(**rows, n=2).shape == (12,)


@pytest.mark.parametrize('knob, words', [
    ('sigma_low=2000', ['sigma_low=2000', 'sigma_high=1000']), ('decode_sigma=1000', ['decode_sigma']),
    ('sigma_low=0', ['sigma_low', 'positive']), ('n_prev=0', ['n_prev', 'at least 1']),
    ('stride=3', ['stride=3', 'block_size=8']), ('condition_drop=2', ['condition_drop', '[0, 1]']),
    ('sigma_law=cosine', ['tan, lognormal']), ('error_weight=flat', ['edm, eps, x0'])])
def test_impossible_settings_are_named(knob, words, mistake):
    flags = [f'--{name}={value}' for name, value in SIZES.items()]
    told = mistake(lambda argv: settings(argv, '', latent.Config), *flags, f'--{knob}')
    assert all(word in told for word in words)
