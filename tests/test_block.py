"""Block diffusion against the twin, enumeration and an uncached run."""
import itertools
import math

import pytest
import torch

import block
import configurator
import masked
import model
from conftest import chi_square_p
from test_unmask import last


def random_model(n, T=8, V=3, seed=0, **knobs):
    torch.manual_seed(seed)
    net = block.Model(block.Config(vocab_size=V, block_size=T, n_layer=2, n_head=1, n_embd=8, block_length=n,
                                   **knobs))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.6)
    return net


def test_the_mask_has_the_three_parts_of_the_paper():
    seen = block.block_mask(4, 2).int().tolist()
    assert seen == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0],
                    [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0],
                    [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0],
                    [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_a_masked_token_is_predicted_from_its_block_and_the_clean_blocks_before_and_nothing_else():
    """One forward over both halves against a forward for every block over [clean before, noisy block]."""
    net, x = random_model(2), torch.randint(3, (5, 8))
    m = torch.rand(5, 8) < 0.5
    together = net.masked_nats(x, m)
    noisy = x.where(~m, 3)
    for b in range(4):
        text = torch.cat([x[:, :2 * b], noisy[:, 2 * b:2 * b + 2]], dim=1)
        group = torch.arange(text.size(1)) // 2
        logp = net.gpt(text, group[:, None] >= group).log_softmax(-1)[:, 2 * b:]
        nats = -logp.gather(-1, x[:, 2 * b:2 * b + 2, None])[..., 0] * m[:, 2 * b:2 * b + 2]
        assert torch.allclose(together[:, b], nats.sum(-1), atol=1e-5)


def test_with_blocks_of_one_the_bound_is_the_autoregressive_likelihood_of_the_same_network():
    net, x = random_model(1, T=5).double(), torch.tensor(list(itertools.product(range(3), repeat=5)))
    nats = net.nats(x)
    assert net.bound == 'exact'
    assert abs((-nats).exp().sum() - 1) < 1e-9  # a distribution over all 243 texts
    for i in range(5):  # token i from [MASK] at i and the clean tokens before it, one position at a time
        text = torch.cat([x[:, :i], torch.full((243, 1), 3)], dim=1)
        logp = net.gpt(text, torch.ones(i + 1, i + 1, dtype=torch.bool).tril()).log_softmax(-1)[:, -1]
        nats = nats + logp.gather(-1, x[:, i:i + 1])[:, 0]
    assert nats.abs().max() < 1e-9


def test_with_one_block_the_bound_is_that_of_masked_diffusion():
    net = random_model(6, T=6)
    twin = masked.Model(masked.Config(vocab_size=3, block_size=6, n_layer=2, n_head=1, n_embd=8))
    twin.gpt.load_state_dict(net.gpt.state_dict())
    x, m = torch.randint(3, (7, 6)), torch.rand(7, 6) < 0.5
    assert torch.allclose(net.masked_nats(x, m)[:, 0], twin.masked_nats(x, m), atol=1e-5)


def test_the_estimate_has_the_mean_of_the_enumerated_bound():
    """4 standard errors: a false alarm in 16,000 runs; the seed is fixed."""
    net, x = random_model(3, T=6), torch.tensor([[0, 2, 1, 1, 0, 2]])
    subsets = torch.tensor(list(itertools.product([False, True], repeat=3)))[1:]
    bound = 0.0
    for s in subsets:  # both blocks masked alike: each is scored by itself
        k = int(s.sum())
        bound += (net.masked_nats(x, s.repeat(2)[None]).sum() * 3 / k / 3 / math.comb(3, k)).item()
    draws = net.nats(x.expand(20000, 6), 2)
    assert abs(draws.mean() - bound) < 4 * draws.std() / 20000 ** 0.5


def test_the_first_loss_averages_to_log_V():
    for knobs in (dict(block_length=1), dict(block_length=4), dict(block_length=8, loss_weight='elbo'),
                  dict(block_length=8, mask_low=0.1, mask_high=0.6)):
        torch.manual_seed(0)
        net = block.Model(block.Config(vocab_size=7, block_size=32, n_layer=1, n_head=1, n_embd=4, **knobs))
        losses = [net(torch.randint(7, (64, 32)))[0].item() for _ in range(30)]
        assert abs(sum(losses) / 30 / math.log(7) - 1) < 0.02


def resampled(n, low, high, size, generator):
    """Numbers of masks as BD3-LM draws them: t uniform on [low, high], each token masked with probability t,
    drawn anew at the same t until the share of masks lies in [low, high]; 0 masks left out."""
    t = low + (high - low) * torch.rand(size, 1, generator=generator, dtype=torch.float64)
    k = torch.full((size,), -1)
    while (todo := (k < 0)).any():
        drawn = (torch.rand(int(todo.sum()), n, generator=generator) < t[todo]).sum(-1)
        k[todo] = torch.where((drawn / n >= low) & (drawn / n <= high), drawn, -1)
    return k[k > 0]


@pytest.mark.parametrize('n, low, high', [(4, 0.45, 0.95), (16, 0.3, 0.8), (16, 0.2, 0.6), (8, 0.0, 0.5),
                                          (8, 0.0, 1.0), (4, 0.5, 0.75)])
def test_the_clipped_law_is_that_of_drawing_until_the_share_is_within(n, low, high):
    """Chi-square; fails by chance once in 10,000; the seed is fixed."""
    law = block.mask_law(n, low, high)
    k = resampled(n, low, high, 40000, torch.Generator().manual_seed(n))
    p = law[law > 0]
    observed = torch.bincount(k, minlength=n + 1).double()
    assert abs(law.sum() - 1) < 1e-9 and observed[law == 0].sum() == 0
    statistic = ((observed[law > 0] - p * len(k)) ** 2 / (p * len(k))).sum()
    assert torch.special.gammaincc(torch.tensor((len(p) - 1) / 2).double(), statistic / 2) > 1e-4


def test_training_masks_shares_within_the_bounds_by_that_law():
    """3,200 blocks, stratified: every number of masks comes as often as the law says, to 2%."""
    for n, low, high in ((8, 0.3, 0.8), (4, 0.45, 0.95), (8, 0.0, 1.0)):
        net, seen = random_model(n, T=16, mask_low=low, mask_high=high), []
        net.masked_nats = lambda x, m: seen.append(m.view(-1, n).sum(-1)) or torch.zeros(len(x), 16 // n)
        for _ in range(4):
            net(torch.randint(3, (50 * n, 16)))
        k = torch.cat(seen)
        assert low * n <= k.min() and k.max() <= high * n
        assert (torch.bincount(k, minlength=n + 1) / len(k) - block.mask_law(n, low, high)).abs().max() < 0.02


def test_the_share_of_masks_of_a_block_has_nothing_to_do_with_its_place():
    """Even shares, one to a stratum, but in no order: unshuffled, each is the last one's successor."""
    net, seen = random_model(16, T=256), []
    net.masked_nats = lambda x, m: seen.append(m.view(-1, 16).sum(-1)) or torch.zeros(len(x), 16)
    net(torch.randint(3, (1, 256)))
    assert seen[0].sort().values.diff().max() <= 2 and (seen[0].diff().abs() > 1).sum() > 4


@pytest.mark.parametrize('rule', ['ancestral', 'confidence', 'first_hitting'])
@pytest.mark.parametrize('start', [0, 3, 4])
def test_cached_sampling_equals_uncached(rule, start):
    net, V = random_model(4, T=12, V=5), 5
    canvas = torch.full((3, 12), V)
    canvas[:, :start] = torch.randint(5, (3, start))
    torch.manual_seed(1)
    cached = list(net.sample(canvas, 6, rule))

    def uncached(xt, cache):  # all the text so far in one forward, no cache
        begin = sum(x.size(1) for x in cache.read)
        text = torch.cat([*cache.read, xt], dim=1)
        group = torch.arange(text.size(1)) // 4
        return net.gpt(text, group[:, None] >= group).float().log_softmax(-1)[:, begin:]
    texts = []
    cache = type('Texts', (), {'read': texts})
    net.read = lambda x, _: texts.append(x)
    net.denoise_block = lambda xt, _: uncached(xt, cache)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(cached, net.sample(canvas, 6, rule)))
    assert (cached[-1] < V).all() and (cached[-1][:, :start] == canvas[:, :start]).all()


def test_blocks_of_one_sample_the_distribution_that_nats_reports():
    """Chi-square; fails by chance once in 10,000; the seed is fixed."""
    net, x = random_model(1, T=3), torch.tensor(list(itertools.product(range(3), repeat=3)))
    p = (-net.nats(x)).exp().double().detach()
    torch.manual_seed(0)
    drawn = last(net.sample(torch.full((20000, 3), 3), 1))
    assert chi_square_p(drawn, p / p.sum(), 3) > 1e-4


def test_the_steps_are_shared_out_and_the_text_may_end_inside_a_block():
    net, reads = random_model(4, T=12), []
    frames = list(net.sample(torch.full((2, 10), 3), 7, 'random'))
    assert len(frames) == 7 and frames[-1].shape == (2, 10) and (frames[-1] < 3).all()
    read = net.read
    net.read = lambda x, cache: reads.append(x) or read(x, cache)
    frames = list(net.sample(torch.full((50, 12), 3), 12))  # by default a token a step
    assert [(x == 3).sum(-1).tolist() for x in frames] == [[11 - i] * 50 for i in range(12)]
    assert len(reads) == 2  # nothing comes after the last block
    assert len(list(net.sample(torch.full((2, 12), 3), 1, 'random'))) == 3  # at least one a block


def test_what_block_diffusion_cannot_do_is_said(mistake):
    for knobs, word in ((dict(block_length=3), 'block_length=3'),
                        (dict(mask_low=0.9, mask_high=0.5), 'mask_low'),
                        (dict(mask_low=0.3, mask_high=0.45), 'no number of masks'),
                        (dict(loss_weight='x'), 'loss_weight'), (dict(block_length=0), 'block_length=0')):
        sizes = dict(block_size=8, n_embd=8, n_head=1)
        assert word in mistake(lambda argv: configurator.build(sizes | knobs, block.Config))
    net = random_model(4)
    with pytest.raises(ValueError, match='suffix and template'):
        next(net.sample(torch.tensor([[3, 3, 1, 3, 3, 3, 3, 3]]), 2))
    with pytest.raises(ValueError, match='cfg'):
        next(net.sample(torch.full((1, 8), 3), 2, cfg=1.0))
    with pytest.raises(ValueError, match='whole blocks'):
        net.nats(torch.zeros(1, 6, dtype=torch.long))


def test_trimming_a_cache_forgets_the_end():
    net, cache = random_model(2), model.Cache()
    net.read(torch.tensor([[0, 1, 2, 0]]), cache)
    kept = {module: [x.clone() for x in tensors] for module, tensors in cache.kept.items()}
    net.denoise_block(torch.tensor([[3, 3]]), cache)
    assert cache.length == 4 and len(kept) == 2 * 3  # attention and two convolutions a block
    assert all(torch.equal(a, b) for module in kept for a, b in zip(kept[module], cache.kept[module]))
