"""From an autoregressive model to a denoiser: shift, annealed attention, marks, what is kept; adapters."""
import contextlib
import dataclasses

import pytest
import torch

import ar
import block
import common
import configurator
import masked
import model
import train
from hub import adapt
from parts import adapted, clock, lora
from conftest import TINY, chi_square_p

SIZES = dict(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=16)
AR = [*TINY, '--objective=ar', '--out_dir=out-ar']
ARCHS = [dict(arch='ours'), dict(arch='gpt2'), dict(arch='llama', n_kv_head=1, n_inner=24, tied=True)]


def randomised(net, std=0.3):
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net.eval()


def denoiser(**knobs):
    return randomised(masked.Model(masked.Config(**SIZES | knobs)))


# ---- shift ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', ARCHS)
def test_a_shifted_denoiser_with_the_causal_mask_put_back_is_the_autoregressive_model(arch):
    """All marks of one row, so [MASK] and [BOS] look alike; position i reads [BOS] x_<i and predicts x_i."""
    twin = randomised(ar.Model(ar.Config(**SIZES | arch | dict(block_size=9))))
    for name, p in twin.named_parameters():
        if name.endswith('taps'):
            p.data[:2] = 0  # of neighbours that a denoiser's convolution does not reach
    net = masked.Model(masked.Config(**SIZES | arch, shift=True)).eval()
    checkpoint = dict(objective='ar', config=dataclasses.asdict(twin.config), ema=twin.state_dict())
    adapt.take_over(net, 'masked', dataclasses.asdict(net.config), checkpoint)
    for layer in net.gpt.blocks:
        layer.attn.causal = True
    x = torch.randint(7, (3, 8))
    assert torch.allclose(net.network(x), twin.logits(x), atol=1e-5)


def test_with_shift_every_token_is_masked_and_scored_and_sees_all_others():
    net = denoiser(shift=True)
    x = torch.randint(7, (1, 8))
    out = net.network(x)
    assert out.shape == (1, 8, 7)
    for i in range(8):
        y = x.clone()
        y[0, i] = (x[0, i] + 1) % 7
        assert ((net.network(y) - out).abs().amax(-1) > 1e-6).all(), i


def test_the_bound_of_a_shifted_denoiser_of_one_token_is_exactly_its_loss_behind_bos():
    net = denoiser(shift=True, block_size=1)
    x = torch.arange(7)[:, None]
    logp = model.GPT.forward(net.gpt, torch.tensor([[8, 7]]))[0, 0].log_softmax(-1)  # [BOS] [MASK]
    assert torch.allclose(net.nats(x, 3), -logp, atol=1e-5)
    assert torch.allclose(net.nats(x).neg().exp().sum(), torch.tensor(1.0), atol=1e-5)


def test_a_shifted_denoiser_samples_what_its_order_says():
    """Two tokens, one a call, left first: p(x1 | [BOS] [MASK] [MASK]) p(x2 | [BOS] x1 [MASK]). Of 10^6 runs
    of a right program one fails."""
    net = denoiser(shift=True, vocab_size=3, block_size=2, n_layer=1)
    first = net.denoise(torch.tensor([[3, 3]]))[0, 0].exp().double()
    second = net.denoise(torch.tensor([[v, 3] for v in range(3)]))[:, 1].exp().double()
    torch.manual_seed(1)
    *_, canvas = net.sample(torch.full((4000, 2), 3), steps=2, rule='random', part_length=1)
    assert chi_square_p(canvas, (first[:, None] * second).flatten(), 3) > 1e-6


def test_padding_is_not_seen_by_a_shifted_text_and_packed_texts_are_refused():
    net = denoiser(shift=True)
    x, segment = torch.randint(7, (2, 8)), torch.zeros(2, 8, dtype=torch.long)
    segment[:, 5:] = -1
    y = x.clone()
    y[:, 5:] = (x[:, 5:] + 1) % 7
    assert torch.allclose(net.network(x, segment=segment)[:, :5], net.network(y, segment=segment)[:, :5])
    assert torch.allclose(net.network(x, segment=segment)[:, :5], net.network(x[:, :5]), atol=1e-5)
    assert 'lines' not in net.takes and 'lines' in masked.Model(masked.Config(**SIZES)).takes


# ---- annealed attention -----------------------------------------------------------------------------------

def test_the_annealed_mask_is_causal_at_0_full_at_1_and_opens_as_often_as_it_says():
    assert torch.equal(adapted.partly_causal(9, torch.tensor(0.0)), torch.ones(9, 9, dtype=torch.bool).tril())
    assert adapted.partly_causal(9, torch.tensor(1.0)).all()
    torch.manual_seed(0)
    future = torch.ones(200, 200, dtype=torch.bool).triu(1)
    share = adapted.partly_causal(200, torch.tensor(0.3))[future].double().mean()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / future.sum()) ** 0.5  # 5 standard errors: once in 10^6


@pytest.mark.parametrize('shift', [False, True])
def test_training_sees_the_annealed_mask_and_nothing_else_does(shift, monkeypatch):
    seen = []
    own = model.attention
    monkeypatch.setattr(model, 'attention', lambda *args: seen.append(args[-1]) or own(*args))
    net, x = denoiser(shift=shift, anneal_iters=4), torch.randint(7, (3, 8))
    for steps, full in ((0, False), (3, True), (100, True)):
        clock.set_clocks(net, steps)
        seen.clear()
        net.train()(x)
        assert all(torch.equal(mask, seen[0]) for mask in seen) and seen[0].shape == (8 + shift, 8 + shift)
        assert seen[0].all() == full
    seen.clear()
    net.eval().nats(x, 2)
    list(net.sample(torch.full((2, 8), 7), steps=2))
    assert seen and all(mask is None for mask in seen)


def test_train_counts_the_steps_of_the_annealing_and_resumes_them(workdir, monkeypatch):
    rates, own = [], adapted.partly_causal
    monkeypatch.setattr(adapted, 'partly_causal', lambda T, r: rates.append(r.item()) or own(T, r))
    run = [*TINY, '--objective=masked', '--anneal_iters=5', '--out_dir=out-m']
    train.main(run)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8])
    train.main(['--init_from=resume', '--out_dir=out-m', '--max_iters=6', '--device=cpu'])
    assert rates[4:] == pytest.approx([1.0, 1.0])


# ---- what is taken over -----------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('shift', [False, True])
def test_mask_begins_as_the_mean_token_bos_is_kept_and_all_else_is_equal(arch, shift):
    twin = randomised(ar.Model(ar.Config(**SIZES | arch | dict(block_size=12))))
    net = masked.Model(masked.Config(**SIZES | arch, shift=shift))
    weights = {name: p.clone() for name, p in twin.state_dict().items()}
    checkpoint = dict(objective='ar', config=dataclasses.asdict(twin.config), ema=weights)
    adapt.take_over(net, 'masked', dataclasses.asdict(net.config), checkpoint)
    rows = net.gpt.embed.weight
    assert torch.equal(rows[:7], twin.gpt.embed.weight[:7]) and len(rows) == 8 + shift
    assert torch.allclose(rows[7], rows[:7].mean(0))
    assert not shift or torch.equal(rows[8], twin.gpt.embed.weight[7])
    for name, p in net.state_dict().items():
        if name == 'gpt.pos.weight':
            assert torch.equal(p, weights[name][:8 + shift])
        elif name.endswith('taps'):  # neighbours -4 to 0 become -2 to 2
            assert torch.equal(p[:3], weights[name][2:]) and (p[3:] == 0).all()
        elif name != 'gpt.embed.weight':
            assert torch.equal(p, weights[name]), name
    for name, p in twin.state_dict().items():  # the source is left alone
        assert torch.equal(p, weights[name])


@pytest.mark.parametrize('objective', ['masked', 'block', 'ar'])
def test_an_out_dir_of_ours_becomes_any_of_the_three_and_says_so_in_its_checkpoint(after, objective):
    after(AR)
    more = ['--block_length=4'] if objective == 'block' else []
    loop = [a for a in TINY if not a.startswith('--n_')]
    train.main([*loop, f'--objective={objective}', '--init_from=out-ar', '--out_dir=out-b', *more])
    checkpoint = common.load('out-b/last.pt')
    assert checkpoint['objective'] == objective and checkpoint['config']['n_embd'] == 16
    net, _ = common.load_model(checkpoint, 'cpu')
    assert type(net) is {'masked': masked, 'block': block, 'ar': ar}[objective].Model


def test_a_run_that_goes_on_does_not_anneal_again_but_keeps_the_shift(workdir):
    train.main([*TINY, '--shift=True', '--anneal_iters=3', '--random_length=0.5', '--out_dir=out-m'])
    train.main([*(a for a in TINY if not a.startswith('--n_')), '--init_from=out-m', '--out_dir=out-n'])
    checkpoint = common.load('out-n/last.pt')
    assert checkpoint['config']['shift'] and not checkpoint['config']['anneal_iters']
    assert checkpoint['rows'] == dict(random_length=0.0)


def test_without_an_objective_of_its_own_a_run_goes_on_with_that_of_the_checkpoint(after):
    after(AR)
    train.main(['--dataset=tiny', '--init_from=out-ar', '--out_dir=out-b', '--max_iters=1', '--device=cpu',
                '--compile=False'])
    assert common.load('out-b/last.pt')['objective'] == 'ar'


def test_a_run_that_starts_from_a_checkpoint_begins_with_its_averaged_weights(after):
    after(AR)
    train.main(['--dataset=tiny', '--init_from=out-ar', '--out_dir=out-b', '--max_iters=1', '--device=cpu',
                '--compile=False', '--lr=0', '--muon_lr=0'])
    a, b = common.load('out-ar/best.pt')['ema'], common.load('out-b/last.pt')['model']
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- adapters ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('objective', [ar, masked])
@pytest.mark.parametrize('arch', ARCHS)
def test_adapters_and_the_embedding_learn_and_nothing_else(objective, arch):
    net = objective.Model(objective.Config(**SIZES | arch, lora_rank=2))
    names = {name.rsplit('.', 1)[1] for name, p in net.named_parameters() if p.requires_grad}
    assert names == {'A', 'B', 'weight'}
    whole = [n for n, p in net.named_parameters() if p.requires_grad and n.endswith('weight')]
    assert whole == ['gpt.embed.weight']
    frozen = objective.Model(objective.Config(**SIZES | arch, lora_rank=2, lora_embed=False))
    assert all(n.endswith(('.A', '.B')) for n, p in frozen.named_parameters() if p.requires_grad)
    assert len(lora.layers(net.gpt)) == 4 * 2


@pytest.mark.parametrize('arch', ARCHS)
def test_folded_weights_in_a_plain_model_give_the_logits_of_the_adapted_one(arch):
    net = denoiser(**arch, lora_rank=2, lora_alpha=6.0)
    plain = masked.Model(masked.Config(**SIZES | arch)).eval()
    plain.load_state_dict(lora.folded(net.state_dict(), dict(lora_alpha=6.0)))
    xt = torch.randint(8, (3, 8))
    assert torch.allclose(plain.network(xt), net.network(xt), atol=1e-5)


def test_a_second_run_begins_with_the_first_ones_adapters_merged(after):
    """At no learning rate its weights, merged again, are the first run's."""
    loop = [a for a in TINY if not a.startswith('--n_')]
    after(AR)
    train.main([*loop, '--objective=masked', '--init_from=out-ar', '--out_dir=out-m', '--lora_rank=2',
                '--muon_lr=0', '--lr=0.1', '--shift=True', '--block_size=15'])
    first = common.load('out-m/best.pt')
    train.main(['--dataset=tiny', '--device=cpu', '--compile=False', '--max_iters=1', '--init_from=out-m',
                '--out_dir=out-n', '--lora_rank=3', '--lr=0', '--muon_lr=0'])
    second = common.load('out-n/best.pt')
    a, b = (lora.folded(c['ema'], c['config']) for c in (first, second))
    assert second['config']['lora_rank'] == 3 and second['config']['shift'] and a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    base = common.load('out-ar/best.pt')['ema']['gpt.blocks.0.mlp.fc.weight']
    assert not torch.allclose(a['gpt.blocks.0.mlp.fc.weight'], base)  # the first had learned


def test_a_run_with_adapters_resumes_bit_for_bit(after):
    loop = [a for a in TINY if not a.startswith(('--n_', '--max'))]
    after(AR)
    run = [*loop, '--objective=masked', '--init_from=out-ar', '--lora_rank=2', '--muon_lr=0', '--shift=True',
           '--block_size=15', '--max_iters=6', '--anneal_iters=5']
    train.main([*run, '--out_dir=out-whole'])
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        own = train.State.save

        def save_then_die(state, *more):
            own(state, *more)
            raise KeyboardInterrupt
        patch.setattr(train.State, 'save', save_then_die)
        train.main([*run, '--out_dir=out-cut'])
    train.main(['--init_from=resume', '--out_dir=out-cut', '--device=cpu'])
    a, b = (common.load(f'{folder}/last.pt') for folder in ('out-whole', 'out-cut'))
    for which in ('model', 'ema'):
        assert all(torch.equal(a[which][name], b[which][name]) for name in a[which])
    moments = [[p['exp_avg'] for o in c['optimizers'] for p in o['state'].values()] for c in (a, b)]
    assert len(moments[0]) == 9 and all(map(torch.equal, *moments))


@pytest.mark.parametrize('knobs, word', [(dict(lora_rank=-1), 'lora_rank=-1'),
                                         (dict(lora_rank=2, dropout=0.1), 'dropout=0.1'),
                                         (dict(lora_rank=2, lora_dropout=1.0), 'lora_dropout=1.0'),
                                         (dict(anneal_iters=-1), 'anneal_iters=-1'),
                                         (dict(n_kv_head=3), 'n_kv_head=3'), (dict(tied=True), 'tied=True'),
                                         (dict(arch='bert'), 'bert')])
def test_knobs_that_make_no_sense_are_refused(knobs, word, mistake):
    assert word in mistake(lambda argv: configurator.build(SIZES | knobs, masked.Config))
