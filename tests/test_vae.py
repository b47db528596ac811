"""vae.py: encoder, decoder, bound and metrics, against answers known otherwise."""
import itertools
import math

import pytest
import torch

import ar
import vae
from configurator import arguments, settings
from text.windows import END, SPACE, begins, sentences
from tools import latents

SIZES = dict(vocab_size=7, block_size=8, base_context=16, n_layer=2, n_head=2, n_embd=16, n_latent=2,
             d_latent=4, lora_rank=2)
V = 7


def random_model(std=0.3, **knobs):
    torch.manual_seed(0)
    net = vae.Model(vae.Config(**{**SIZES, **knobs}))
    for name, p in net.named_parameters():
        if p.dim() > 1 and name not in ('w_e.weight', 'w_d.weight'):
            torch.nn.init.normal_(p, std=std)
    return net


def text(B=4, seed=1, W=8):
    return torch.randint(V, (B, W), generator=torch.Generator().manual_seed(seed))


# ---- encoder

@pytest.mark.parametrize('knobs', [{}, dict(pooled=True), dict(n_latent=1), dict(n_latent=1, pooled=True),
                                   dict(arch='gpt2'), dict(whole=True)])
def test_the_encoder_sees_the_whole_window_and_nothing_behind_its_end(knobs):
    net = random_model(**knobs).eval()
    x = text()
    x[:, 5:] = V
    mu, _ = net.posterior(x)
    assert mu.shape == (4, net.config.n_latent, 4)
    longer = torch.full((4, 12), V)
    longer[:, :5] = x[:, :5]
    assert torch.allclose(mu, net.posterior(longer)[0], atol=1e-5)  # pads, how many there may be
    for i in range(5):  # every token counts, the last too
        other = x.clone()
        other[:, i] = (other[:, i] + 1) % V
        assert ((mu - net.posterior(other)[0]).abs().amax((1, 2)) > 1e-4).all(), i


def test_the_pooling_weights_are_zero_on_pads_and_sum_to_one():
    """Channel 0 is outside the scores: of a one at position j alone, the weight of j comes out there."""
    net, x = random_model(pooled=True), text()
    x[0, 3:], x[1, 1:] = V, V
    net.queries.data[:, 0] = 0
    h, weights = torch.randn(4, 8, 16), []
    for j in range(8):
        h[..., 0] = torch.arange(8) == j
        net.encoder.trunk = lambda *_: h
        weights.append(net.hidden(x)[..., 0])
    weights = torch.stack(weights, -1)  # (B, n, W)
    assert weights.shape == (4, 2, 8) and torch.allclose(weights.sum(-1), torch.ones(4, 2))
    seen = (x != V)[:, None].expand(-1, 2, -1)
    assert (weights[~seen] == 0).all() and (weights[seen] > 0).all() and (weights[1, :, 0] == 1).all()


def test_an_empty_window_has_latents_that_are_numbers():
    for knobs in ({}, dict(pooled=True)):
        net = random_model(**knobs)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert net.posterior(torch.full((2, 8), V))[0].isfinite().all()


def test_w_e_is_orthogonal_and_w_d_begins_as_its_transpose():
    torch.manual_seed(3)
    net = vae.Model(vae.Config(**SIZES))
    assert net.w_e.weight.shape == (4, 16) and torch.equal(net.w_d.weight, net.w_e.weight.T)
    assert torch.allclose(net.w_e.weight @ net.w_e.weight.T, torch.eye(4), atol=1e-6)
    assert not net.w_e.bias.any() and not net.w_d.bias.any()
    assert net.w_d.weight.data_ptr() != net.w_e.weight.data_ptr()  # not tied afterwards


def test_latents_leave_encode_with_mean_0_and_variance_1_over_the_windows_they_were_measured_on():
    net, x = random_model(), text(600)
    before = net.encode(x)
    net.measure(x)
    z = net.encode(x)
    assert (z.mean(0).abs() < 1e-4).all() and torch.allclose(z.square().mean(0), torch.ones(2, 4), atol=0.01)
    assert not torch.allclose(before.std(0), torch.ones(2, 4), atol=0.1)
    assert torch.allclose(net.raw(z), net.posterior(x)[0], atol=1e-5)
    again = vae.Model(net.config)
    again.load_state_dict(net.state_dict())  # the scale is in the checkpoint
    assert torch.allclose(again.encode(x), z)


def test_a_dimension_that_never_varies_stays_small_and_dropout_is_off_while_the_scale_is_measured():
    net, x = random_model(lora_dropout=0.5), text(300)
    for layer in net.encoder.modules():
        if hasattr(layer, 'B'):
            torch.nn.init.normal_(layer.B)
    with torch.no_grad():
        net.w_e.weight *= 10
        net.w_e.weight[1] = 0
    net.train()
    net.measure(x)
    mu = net.eval().posterior(x)[0]
    assert torch.allclose(net.mean, mu.mean(0), atol=1e-4)
    assert torch.allclose(net.std[:, [0, 2, 3]], mu.std(0)[:, [0, 2, 3]], atol=1e-4)
    assert (net.std[:, 1] == 0.05).all() and net.encode(x).isfinite().all()


@pytest.mark.parametrize('n, starts, middles', [(1, [0], [4]), (2, [0, 4], [2, 6]),
                                                (4, [0, 2, 4, 6], [1, 3, 5, 7])])
def test_queries_stand_in_the_middle_of_their_segments_and_latents_where_these_begin(n, starts, middles):
    """What NOTES.md found to decide: by the positions that the two networks are called with."""
    net, seen = random_model(n_latent=n), {}
    for name in ('encoder', 'decoder'):
        part = getattr(net, name)
        def trunk(h, *others, name=name, trunk=part.trunk, **knobs):
            seen[name] = knobs['where'].tolist()
            return trunk(h, *others, **knobs)
        part.trunk = trunk
    net.logits(net.posterior(text())[0], text(), text()[:, :3])
    assert seen['encoder'] == [*middles, *range(8)]
    assert seen['decoder'] == [*(3 + i for i in starts), 0, 1, 2, *range(3, 11)]


# ---- decoder

def test_the_first_target_is_predicted_from_bos_and_each_from_the_tokens_before_it_alone():
    net = random_model()
    z, x, prefix = torch.randn(4, 2, 4), text(), text(seed=2)
    logits = net.logits(z, x, prefix)
    assert logits.shape == (4, 8, V)
    for i in range(8):
        other = x.clone()
        other[:, i] = (other[:, i] + 1) % V
        changed = (net.logits(z, other, prefix) - logits).abs().amax((0, 2)) > 1e-5
        assert changed.tolist() == [j > i for j in range(8)]
    assert ((net.logits(z + 1, x, prefix) - logits).abs().amax(-1) > 1e-5).all()  # z is seen everywhere
    assert ((net.logits(z, x, text(seed=3)) - logits).abs().amax(-1) > 1e-5).all()  # so is the prefix


def test_an_empty_prefix_is_not_seen_and_a_shorter_one_ends_at_the_same_place():
    net = random_model()
    z, x, prefix = torch.randn(4, 2, 4), text(), text(seed=2)
    prefix[:, :5] = V
    logits = net.logits(z, x, prefix)
    h, seen, where = net.opening(z, prefix)
    assert seen.tolist() == [[True] * 2 + [False] * 5 + [True] * 3] * 4
    moved = h.clone()
    moved[:, 2:7] = 9  # what stands there does not matter
    net.opening = lambda *_: (moved, seen, where)
    assert torch.allclose(net.logits(z, x, prefix), logits, atol=1e-5)


def test_a_base_without_adapters_and_latents_that_are_hidden_is_the_autoregressive_model():
    """Fresh adapters change nothing, so with the latents masked the decoder is the base after [BOS]."""
    torch.manual_seed(0)
    base = ar.Model(ar.Config(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=16))
    for p in base.parameters():
        torch.nn.init.normal_(p, std=0.3)
    net = vae.Model(vae.Config(**SIZES))
    net.inherit(base.state_dict(), [b'a'] * V)
    opening = net.opening

    def hidden(z, prefix, decoder_noise):
        h, seen, where = opening(z, prefix, decoder_noise)
        seen[:, :2] = False
        return h, seen, where
    net.opening = hidden
    x = text()
    logits = net.logits(torch.randn(4, 2, 4), x, torch.full_like(x, V))
    assert torch.allclose(logits, base.logits(x), atol=1e-4)


@pytest.mark.parametrize('knobs', [{}, dict(arch='gpt2'), dict(n_latent=1), dict(whole=True)])
def test_writing_with_the_cache_is_writing_without(knobs):
    net = random_model(**knobs).eval()
    z, prefix = torch.randn(4, net.config.n_latent, 4), text(seed=2)
    prefix[1, :5] = V
    prefix[2] = V
    cached = net.write(z, prefix, 8)
    x = torch.full((4, 8), V)
    for i in range(8):
        x[:, i] = net.logits(z, x, prefix)[:, i].argmax(-1)
    assert torch.equal(cached, x) and len(set(map(tuple, x.tolist()))) > 1


def test_at_tau_zero_writing_is_greedy_and_the_same_every_time_and_else_it_is_not():
    net = random_model().eval()
    z, nothing = net.posterior(text(16))[0], torch.full((16, 8), V)
    for tau, texts in ((0.0, 1), (0.5, 3)):
        assert len({tuple(net.write(z, nothing, 8, tau).flatten().tolist()) for _ in range(3)}) == texts


def test_tau_is_the_variance_of_the_noise_and_the_temperature_of_the_tokens(monkeypatch):
    net, seen, heat = random_model(), [], []
    opening = net.opening
    monkeypatch.setattr(net, 'opening', lambda z, *others: seen.append(z) or opening(z, *others))
    monkeypatch.setattr(vae, 'sample_tokens', lambda logp, t: heat.append(t) or logp.argmax(-1))
    net.write(torch.zeros(5000, 2, 4), torch.full((5000, 1), V), 1, 0.3)
    assert abs(seen[0].var() - 0.3) < 0.011 and heat == [0.3]  # 40,000 numbers: 5 standard errors


def test_of_a_learned_variance_tau_takes_its_share(monkeypatch):
    net, seen = random_model(learned_variance=True).eval().requires_grad_(False), []
    net.w_var.weight.zero_()
    net.w_var.bias.copy_(torch.tensor([0.0, -1.0, -2.0, 1.0]))
    net.measure(text(20))
    assert torch.allclose(net.blur ** 2, torch.tensor([0.0, -1.0, -2.0, 1.0]).exp().expand(2, 4))
    opening = net.opening
    monkeypatch.setattr(net, 'opening', lambda z, *others: seen.append(z) or opening(z, *others))
    net.write(torch.zeros(5000, 2, 4), torch.full((5000, 1), V), 1, 0.3)
    # 10,000 numbers each: 5 standard errors are 7%
    assert torch.allclose(seen[0].var((0, 1)), 0.3 * net.blur[0] ** 2, rtol=0.07)


def test_windows_that_are_sentences_end_where_windows_py_ends_them(monkeypatch):
    net = random_model(sentences=True).eval()
    net.ends[3], net.ends[4], net.ends[5] = END, END, SPACE
    x = torch.randint(V, (300, 8), generator=torch.Generator().manual_seed(0))
    queue = iter(x.T)
    monkeypatch.setattr(vae, 'sample_tokens', lambda logp, tau: next(queue)[:, None])
    written = net.write(torch.randn(300, 2, 4), torch.full((300, 8), V), 8)
    for row, ids in zip(written, x):
        _, length, _ = sentences(ids, 8, net.ends, None)
        assert row.tolist() == ids[:length[0]].tolist() + [V] * (8 - length[0])
    assert len(set((written == V).sum(-1).tolist())) > 4


# ---- base and adapters

def test_the_base_never_changes_and_both_adapters_learn():
    net = random_model(kl_warmup=0)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        net(text(), text(seed=2))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in net.state_dict().items() if not torch.equal(p, before[name])}
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    assert changed == learned and not any('.linear' in name or '.embed' in name for name in learned)
    for who in ('encoder', 'decoder', 'queries', 'w_e', 'w_d'):
        assert any(name.startswith(who) for name in learned), who


def test_encoder_and_decoder_stand_on_the_same_tensors_and_the_copies_of_whole_do_not():
    for whole in (False, True):
        net = vae.Model(vae.Config(**SIZES, whole=whole))
        a, b = net.encoder.embed.weight, net.decoder.embed.weight
        assert (a.data_ptr() == b.data_ptr()) == (not whole) and a.requires_grad == whole
        for net, causal in ((net.encoder, False), (net.decoder, True)):
            assert [block.attn.causal for block in net.blocks] == [causal] * 2


def test_a_base_of_another_size_is_refused_by_the_name_of_the_tensor():
    base = ar.Model(ar.Config(vocab_size=V, block_size=16, n_layer=2, n_head=2, n_embd=32))
    with pytest.raises(ValueError, match='embed.weight'):
        vae.Model(vae.Config(**SIZES)).inherit(base.state_dict(), [b'a'] * V)


# ---- the objective

def test_the_kl_is_half_the_squared_norm_if_the_variance_is_one_and_the_known_integral_if_not():
    torch.manual_seed(0)
    mu, logvar = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.allclose(vae.kl_to_prior(mu, torch.zeros_like(mu)), mu ** 2 / 2)
    known = torch.distributions.kl_divergence(torch.distributions.Normal(mu, (logvar / 2).exp()),
                                              torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(vae.kl_to_prior(mu, logvar), known)


def test_beta_rises_as_a_sine_squared_over_optimizer_steps():
    at = lambda n: vae.beta(torch.tensor(float(n)), 0.01, 5000).item()
    assert at(0) == 0 and at(2500) == pytest.approx(0.005) and at(5000) == at(9000) == pytest.approx(0.01)
    assert vae.beta(torch.tensor(1.0), 0.01, 0) == pytest.approx(0.01)


def test_the_prefix_is_dropped_in_half_of_the_rows():
    net, seen = random_model(), []
    logits = net.logits
    net.logits = lambda z, x, prefix, s: seen.append(prefix) or logits(z, x, prefix, s)
    net(text(4000), text(4000, seed=2))
    dropped = (seen[0] == V).all(-1)
    assert abs(dropped.float().mean() - 0.5) < 0.04  # 5 standard errors
    assert torch.equal(seen[0][~dropped], text(4000, seed=2)[~dropped])


def test_the_encoder_sees_in_training_the_very_window_that_is_scored():
    net, seen = random_model(), []
    posterior = net.posterior
    net.posterior = lambda x: seen.append(x) or posterior(x)
    net(text(), text(seed=2))
    assert torch.equal(seen[0], text())


def test_the_loss_is_the_mean_over_the_tokens_that_there_are():
    net = random_model(prefix_drop=0.0, word_dropout=0.0, latent_noise=0.0)
    net.clock.steps.fill_(10 ** 6)
    x, prefix = text(), text(seed=2)
    x[0, 3:] = V
    torch.manual_seed(5)
    loss, metrics = net(x, prefix)
    torch.manual_seed(5)
    torch.rand(4, 1)  # of the prefix
    mu, _ = net.posterior(x)
    z = mu + torch.randn_like(mu)
    p = net.logits(z, x, prefix).log_softmax(-1)
    nats = -sum(p[b, i, x[b, i]] for b in range(4) for i in range(8) if x[b, i] != V)
    assert loss.item() == pytest.approx((nats + 0.01 * mu.square().sum() / 2).item() / 27, rel=1e-5)
    assert metrics['nats'].item() == pytest.approx(nats.item() / 27, rel=1e-5)
    assert metrics['kl'].item() == pytest.approx(mu.square().sum().item() / 8, rel=1e-5)


def test_free_bits_take_the_gradient_from_dimensions_that_tell_less():
    net = random_model(free_bits=1e6, kl_weight=1.0, latent_noise=0.0)
    net.clock.steps.fill_(10 ** 6)
    torch.manual_seed(5)
    loss, metrics = net(text())
    assert loss.item() == pytest.approx(metrics['nats'].item() + 1e6 * 8 * 4 / 32, rel=1e-4)
    grad = torch.autograd.grad(loss, net.w_e.weight)[0]
    plain = random_model(free_bits=0.0, kl_weight=0.0, latent_noise=0.0)
    torch.manual_seed(5)
    assert torch.allclose(grad, torch.autograd.grad(plain(text())[0], plain.w_e.weight)[0], atol=1e-5)


def test_word_dropout_hides_any_share_of_a_row_from_the_decoder_alone():
    net, seen, encoded = random_model(word_dropout=0.6, latent_noise=0.0), [], []
    logits, posterior = net.logits, net.posterior
    net.logits = lambda z, x, prefix, s: seen.append(x) or logits(z, x, prefix, s)
    net.posterior = lambda x: encoded.append(x) or posterior(x)
    x = text(4000)
    net(x)
    hidden = seen[0] == V
    share = hidden.float().mean(-1)
    assert torch.equal(seen[0][~hidden], x[~hidden]) and torch.equal(encoded[0], x)
    assert abs(share.mean() - 0.3) < 0.02  # 5 standard errors
    # binomial of 8 with a chance uniform in [0, 0.6]: variance p(1 - p) / 8 + 0.6^2 / 12, on the average
    assert abs(share.var() - (0.3 - 0.12) / 8 - 0.03) < 0.006


def test_rows_whose_latents_are_noisy_hide_no_words():
    net, seen = random_model(kl_warmup=0), []
    logits = net.logits
    net.logits = lambda z, x, prefix, s: seen.append((x, s)) or logits(z, x, prefix, s)
    net(text(400))
    (read, s), = seen
    hidden = (read == V).any(-1)
    assert not hidden[s[:, 0, 0] > 0].any() and hidden[s[:, 0, 0] == 0].float().mean() > 0.5


def test_short_windows_are_cut_for_encoder_and_decoder_alike():
    net, seen = random_model(short=0.5), []
    posterior = net.posterior
    net.posterior = lambda x: seen.append(x) or posterior(x)
    net(text(4000))
    length = (seen[0] != V).sum(-1)
    assert abs((length < 8).float().mean() - 0.5 * 7 / 8) < 0.04 and length.min() == 1


def test_half_of_the_rows_have_further_noise_of_which_the_decoder_is_told_and_the_encoder_learns_nothing():
    net, seen = random_model(latent_noise=4.0, kl_weight=0.0, kl_warmup=10), []
    logits = net.logits
    net.logits = lambda z, x, prefix, s: seen.append((z, s)) or logits(z, x, prefix, s)
    net.clock.steps.fill_(9)
    net(text(100))
    assert not seen.pop()[1].any()  # not before the KL has its weight
    net.clock.steps.fill_(10)
    x = text(4000)
    _, metrics = net(x)
    (z, s), mu = seen[0], net.posterior(x)[0]
    noise, noisy = (z - mu)[:, 0, 0], s[:, 0, 0] > 0
    assert abs(noisy.float().mean() - 0.5) < 0.04  # 5 standard errors
    # s uniform in [0, 4]: of the noisy rows the variance is 1 + E s^2 = 1 + 16 / 3; 5 standard errors
    assert abs(noise[noisy].var() - 19 / 3) < 1.4 and abs(noise[~noisy].var() - 1) < 0.16
    scaled = noise / (1 + s[:, 0, 0] ** 2).sqrt()
    assert abs(scaled[noisy].var() - 1) < 0.16  # it is told what there is
    assert metrics['kl'].item() == pytest.approx(mu.square().sum().item() / 2 / 4000, rel=1e-4)
    grad = torch.autograd.grad(z[noisy].sum(), net.w_e.weight, retain_graph=True, allow_unused=True)[0]
    assert grad is None or not grad.any()
    assert torch.autograd.grad(z[~noisy].sum(), net.w_e.weight)[0].any()


def test_the_decoder_noise_changes_what_the_decoder_says():
    net = random_model()
    torch.nn.init.normal_(net.noise_embedding)
    z, x, prefix = torch.randn(4, 2, 4), text(), text(seed=2)
    assert not torch.allclose(net.logits(z, x, prefix, 0.0), net.logits(z, x, prefix, 2.0), atol=1e-3)
    each = torch.tensor([0.0, 0.0, 2.0, 2.0])[:, None, None]
    both = net.logits(z, x, prefix, each)
    assert torch.allclose(both[:2], net.logits(z, x, prefix, 0.0)[:2], atol=1e-5)
    assert torch.allclose(both[2:], net.logits(z, x, prefix, 2.0)[2:], atol=1e-5)


def test_a_learned_variance_begins_at_one_and_gets_a_gradient():
    _, logvar = vae.Model(vae.Config(**SIZES, learned_variance=True)).posterior(text())
    assert not logvar.any()
    net = random_model(learned_variance=True)
    net.clock.steps.fill_(10 ** 6)
    net(text())[0].backward()
    assert net.w_var.bias.grad.abs().sum() > 0


# ---- what a latent tells

def test_active_units_are_the_dimensions_that_vary_between_windows():
    mu = torch.randn(500, 2, 4, generator=torch.Generator().manual_seed(0))
    mu[:, 0, 1], mu[:, 1, 2] = 5.0, mu[:, 1, 2] * 0.05
    assert vae.active_units(mu) == 6


def test_mutual_information_is_zero_for_latents_that_tell_nothing_and_log_b_for_those_that_tell_all():
    torch.manual_seed(0)
    mu, noise = torch.randn(64, 2, 4), torch.randn(64, 2, 4)
    same = torch.zeros_like(mu)
    assert vae.mutual_information(noise, same, same).abs() < 1e-5
    everything = vae.mutual_information(100 * mu + noise, 100 * mu, same).item()
    assert everything == pytest.approx(math.log(64), abs=1e-3)
    # one dimension, mu ~ N(0, s^2): I = log(1 + s^2) / 2
    mu = 2.0 * torch.randn(4000, 1, 1)
    z = mu + torch.randn_like(mu)
    estimate = vae.mutual_information(z, mu, torch.zeros_like(mu)).item()
    assert estimate == pytest.approx(math.log(5) / 2, abs=0.05)


# ---- the bound

def exact(net, x, prefix):
    """-log p(x | prefix) of a VAE with one latent dimension, by quadrature."""
    z = torch.linspace(-8, 8, 801)
    prior = (-z ** 2 / 2 - math.log(2 * math.pi) / 2)
    x, prefix = (ids.repeat(801, 1) for ids in (x, prefix))
    nats = net.window_nats(z.repeat_interleave(len(x) // 801).view(-1, 1, 1), x, prefix).view(801, -1)
    return -((prior[:, None] - nats).logsumexp(0) + math.log(0.02))


@pytest.mark.parametrize('learned', [False, True])
def test_the_bound_is_above_the_truth_and_falls_to_it_with_more_draws(learned):
    """The seed is fixed."""
    net = random_model(n_latent=1, d_latent=1, learned_variance=learned, std=0.5)
    torch.nn.init.normal_(net.w_d.bias)  # without it the decoder's first norm leaves of z its sign alone
    net.eval().requires_grad_(False)
    net.w_e.weight *= 0.2  # far from the prior's mean 300 draws would be too few
    x, prefix = text(3), text(3, seed=2)
    true = exact(net, x, prefix)
    torch.manual_seed(0)
    one = net.nats(x.repeat(1000, 1), 1, prefix.repeat(1000, 1)).view(1000, 3)
    many = net.nats(x.repeat(20, 1), 300, prefix.repeat(20, 1)).view(20, 3)
    one_error, error = one.std(0) / 1000 ** 0.5, many.std(0) / 20 ** 0.5
    assert (one.mean(0) > true + one_error).all() and (one.mean(0) > many.mean(0) + one_error).all()
    # 4 standard errors; what is left of 300 draws' own gap is half their variance
    assert ((many.mean(0) - true - many.var(0) / 2).abs() < 4 * error).all() and (error < 0.05).all()


def test_one_draw_is_the_negative_elbo_whose_kl_is_known():
    net = random_model().eval().requires_grad_(False)
    x, prefix = text(3), text(3, seed=2)
    torch.manual_seed(0)
    many, before = x.repeat(600, 1), prefix.repeat(600, 1)
    draws = net.nats(many, 1, before).view(600, 3)
    mu, logvar = net.posterior(x)
    z = mu.repeat(600, 1, 1)
    torch.manual_seed(1)
    rec = net.window_nats(z + torch.randn_like(z), many, before).view(600, 3)
    known = rec.mean(0) + vae.kl_to_prior(mu, logvar).sum((1, 2))
    error = ((draws.var(0) + rec.var(0)) / 600).sqrt()
    assert ((draws.mean(0) - known).abs() < 5 * error).all()  # 3 rows at 5 standard errors


def test_the_probabilities_of_all_windows_that_are_sentences_sum_to_one():
    """A window is W tokens, or fewer if it ends a sentence: that it ends has its probability, too."""
    W, vocab = 4, 3
    net = random_model(vocab_size=vocab, block_size=W, sentences=True).eval().requires_grad_(False)
    net.ends[1], net.ends[2] = END, SPACE
    windows = []
    for k in range(1, W + 1):
        x = torch.tensor(list(itertools.product(range(vocab), repeat=k)))
        over = begins(torch.nn.functional.pad(net.ends[x], (0, 1)))  # were the next token a word
        kept = ~over[:, :-1].any(-1) & (over[:, -1] | (k == W))
        windows.append(torch.nn.functional.pad(x[kept], (0, W - k), value=vocab))
    x = torch.cat(windows)
    assert 10 < len(windows[-1]) < len(x)
    z, prefix = torch.randn(1, 2, 4).expand(len(x), -1, -1), torch.tensor([[0, 2, 1]]).expand(len(x), -1)
    assert (-net.window_nats(z, x, prefix)).exp().sum() == pytest.approx(1, abs=1e-4)


def test_training_on_sentences_counts_their_ends_as_the_bound_does():
    net, seen = random_model(sentences=True, word_dropout=0.0, kl_weight=0.0), []
    net.ends[1] = END
    logits = net.logits
    net.logits = lambda z, x, *others: seen.append(z) or logits(z, x, *others)
    x = torch.tensor([[2, 3, 1, V, V, V, V, V], [2, 3, 4, V, V, V, V, V]])  # the second: a text's end
    loss, _ = net(x)
    net.logits = logits
    rows = net.window_nats(seen[0], x, torch.full_like(x, V))
    assert loss.item() == pytest.approx(rows.sum().item() / 6, rel=1e-4)
    net.ends[1] = 0
    assert torch.allclose(net.window_nats(seen[0], x, torch.full_like(x, V))[1], rows[1])
    assert net.window_nats(seen[0], x, torch.full_like(x, V))[0] < rows[0] - 0.01


def test_padding_costs_nothing():
    net = random_model().eval()
    x = text(2)
    x[:, 5:] = V
    z, prefix = torch.randn(2, 2, 4), text(2, seed=2)
    assert torch.allclose(net.window_nats(z, x, prefix), net.window_nats(z, x[:, :5], prefix), atol=1e-5)


# ---- texts

def test_prompts_of_different_lengths_are_continued_each_from_its_own_end():
    net = random_model().eval()
    xt = torch.full((2, 12), V)
    xt[0, :5], xt[1, :2] = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 6])
    z = [torch.randn(2, 2, 4) for _ in range(2)]
    queue = iter(z)
    *_, canvas = net.write_windows(xt, lambda: iter([next(queue)]), windows=1)
    alone = net.write(z[0][1:], torch.tensor([[V] * 6 + [5, 6]]), 8)
    assert torch.equal(canvas[0, :5], xt[0, :5]) and torch.equal(canvas[1, :2], xt[1, :2])
    assert canvas[1, 2:10].tolist() == alone[0].tolist()
    assert (canvas[0] < V).all() and (canvas[1, 10:] == V).all()


@pytest.mark.parametrize('knob, words', [
    ('block_size=9', ['block_size=9', '18', '16']), ('n_latent=9', ['n_latent=9', 'block_size=8']),
    ('d_latent=0', ['d_latent', 'at least 1']), ('free_bits=-1', ['free_bits', 'negative']),
    ('short=1.5', ['short', '[0, 1]']), ('dropout=0.1', ['dropout', 'whole'])])
def test_impossible_settings_are_named(knob, words, mistake):
    flags = [f'--{name}={value}' for name, value in SIZES.items()]
    told = mistake(lambda argv: settings(argv, '', vae.Config), *flags, f'--{knob}')
    assert all(word in told for word in words)


def test_matrices_that_no_adapter_fits_are_named():
    with pytest.raises(ValueError, match='query.*qkv'):
        vae.Model(vae.Config(**{**SIZES, 'lora_targets': 'query'}))


@pytest.mark.parametrize('knobs', [dict(rule='euler'), dict(top_k=3), dict(cfg=1.0), dict(temperature=0.5)])
def test_what_a_vae_cannot_do_is_said_with_what_it_can(knobs):
    with pytest.raises(ValueError, match=f'{next(iter(knobs))}.*tau, decoder_noise, windows'):
        arguments(random_model().sample, knobs, {})


def test_a_text_is_written_window_after_window_as_many_as_asked_for():
    net, xt = random_model().eval(), torch.full((2, 30), V)
    xt[:, :3] = 1
    for windows, full in ((0, 30), (2, 19), (9, 30)):
        torch.manual_seed(0)
        canvases = list(net.sample(xt, windows=windows))
        assert [(row < V).sum() for row in canvases[-1]] == [full, full]
        assert len(canvases) == (2 if windows == 2 else 4)
        assert all(torch.equal(a[a < V], b[a < V]) for a, b in zip(canvases, canvases[1:]))


def test_the_way_between_two_latents_starts_and_ends_at_them_and_keeps_their_norm():
    torch.manual_seed(0)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    b = b / b.norm() * a.norm()
    way = [latents.slerp(a, b, share) for share in (0, 0.25, 0.5, 1)]
    assert torch.allclose(way[0], a, atol=1e-5) and torch.allclose(way[-1], b, atol=1e-5)
    assert all(torch.allclose(z.norm(), a.norm()) for z in way)
    cosine = lambda u, v: (u.flatten() @ v.flatten() / u.norm() / v.norm()).item()
    assert cosine(way[2], a) == pytest.approx(cosine(way[2], b), abs=1e-5)
    assert torch.allclose(latents.slerp(a, a, 0.3), a)


def test_windows_come_back_greedily_without_noise_and_differently_with_it():
    net, x = random_model().eval(), text(16)
    z, nothing = net.posterior(x)[0], torch.full((16, 8), V)
    again = lambda tau: tuple(net.write(z, nothing, 8, tau).flatten().tolist())
    assert len({again(0.0) for _ in range(3)}) == 1 and len({again(0.5) for _ in range(3)}) == 3
