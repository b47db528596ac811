"""The way from an autoregressive checkpoint to latent diffusion through the scripts."""
import itertools
import json
import re

import pytest
import torch

import common
import eval as evaluation
import sample
import train
import vae as sentence_vae
from conftest import TEXT, TINY
from text.rows import load_tokens
from tools import latents

SIZES = ('--n_layer', '--n_head', '--n_embd', '--block_size')
LOOP = [knob for knob in TINY if not knob.startswith(SIZES)]
AR = [*LOOP, '--objective=ar', '--out_dir=out-ar', '--n_layer=1', '--n_head=2', '--n_embd=16',
      '--block_size=32']
VAE = [*LOOP, '--objective=vae', '--base=out-ar', '--out_dir=out-vae', '--block_size=16', '--n_latent=2',
       '--d_latent=4', '--lora_rank=2']
LATENT = [*LOOP, '--objective=latent', '--base=out-vae', '--out_dir=out-latent', '--n_layer=1', '--n_head=2',
          '--n_embd=16', '--stride=4']


@pytest.fixture
def base(after):
    return after(AR)


@pytest.fixture
def with_vae(after):
    return after(AR, VAE)


@pytest.fixture
def both(after):
    return after(AR, VAE, LATENT)


def test_a_vae_takes_its_sizes_and_weights_from_the_base_and_keeps_them(with_vae):
    ar, vae = (common.load(f'out-{name}/last.pt') for name in ('ar', 'vae'))
    assert vae['config']['n_embd'] == 16 and vae['config']['base_context'] == 32
    for name, p in ar['ema'].items():
        mine = name.replace('gpt.', 'decoder.')
        mine = mine if mine in vae['ema'] else mine.replace('.weight', '.linear.weight')
        assert torch.equal(vae['ema'][mine], p), name


def test_the_latents_of_held_out_windows_have_about_unit_variance(with_vae):
    model, _ = common.load_model(common.load('out-vae/last.pt'), torch.device('cpu'))
    assert not torch.equal(model.std, torch.ones_like(model.std))  # train.py has measured
    model.w_e.weight *= 50  # so few steps leave dimensions that hardly vary, which `measure` keeps small
    seen, held_out = (model.cut(load_tokens('tiny', split, 100, torch.device('cpu')), None).all()['x']
                      for split in ('train', 'val'))
    model.measure(seen)
    z = model.encode(held_out)
    assert (z.std(0) > 0.7).all() and (z.std(0) < 1.4).all() and (z.mean(0).abs() < 0.3).all()


def test_the_best_checkpoint_of_a_vae_is_the_newest_for_the_bound_is_not_what_it_lowers(base, monkeypatch):
    figures = itertools.count(3.0)  # worse and worse
    monkeypatch.setattr(common, 'evaluate', lambda *_: (next(figures), 0.1))
    train.main([*VAE, '--eval_interval=2'])
    assert common.load('out-vae/best.pt')['iter'] == common.load('out-vae/last.pt')['iter'] == 4
    train.main([*AR, '--eval_interval=2', '--out_dir=out-other'])
    assert common.load('out-other/best.pt')['iter'] < 4


def test_a_latent_checkpoint_holds_its_vae_and_needs_neither_it_nor_the_latents_any_more(both, capsys):
    import shutil
    shutil.rmtree('out-vae'), shutil.rmtree('out-ar'), shutil.rmtree('data')
    for path in (both / 'out-latent').glob('latents-*'):
        path.unlink()
    capsys.readouterr()
    sample.main(['--out_dir=out-latent', '--steps=3', '--windows=2', '--num_samples=1', '--start=To be'])
    out = capsys.readouterr().out[:-1]
    assert out.startswith('To be') and len(out) == 5 + 2 * 16


@pytest.mark.parametrize('objective', ['vae', 'latent'])
def test_a_run_that_is_resumed_ends_as_if_it_had_not_stopped(both, monkeypatch, objective):
    whole = common.load(f'out-{objective}/last.pt')
    start = dict(vae=VAE, latent=LATENT)[objective]
    out = f'--out_dir=again-{objective}'

    class Stop(Exception):
        pass
    step = train.step

    def stopping(state, *args):
        if state.iter == 2:
            raise Stop
        return step(state, *args)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, 'step', stopping)
        train.main([*start, out])
    train.main(['--init_from=resume', out])
    again = common.load(f'again-{objective}/last.pt')
    for kind in ('model', 'ema'):
        assert all(torch.equal(p, again[kind][name]) for name, p in whole[kind].items()), kind
    assert again['iter'] == 4 and again['val'] == whole['val']


def test_beta_counts_optimizer_steps_however_many_forwards_one_takes(base, monkeypatch):
    seen, beta = [], sentence_vae.beta
    monkeypatch.setattr(sentence_vae, 'beta', lambda steps, *x: seen.append(steps.item()) or beta(steps, *x))
    train.main([*VAE, '--grad_accum=3', '--max_iters=2'])
    assert seen == [0, 0, 0, 1, 1, 1]


def test_the_average_of_latent_diffusion_warms_up_by_its_power():
    ema, params = [torch.zeros(1)], [torch.ones(1)]
    train.update_ema(ema, params, 0.9999, 0, 2 / 3)
    assert ema[0].item() == 1  # 1 - (1 + 0)^(-2/3) = 0: the first weights count whole
    ema = [torch.zeros(1)]
    train.update_ema(ema, params, 0.9999, 7, 2 / 3)
    assert ema[0].item() == pytest.approx(0.25)  # 8^(-2/3)
    ema = [torch.zeros(1)]
    train.update_ema(ema, params, 0.9999, 10 ** 9, 2 / 3)
    assert ema[0].item() == pytest.approx(1e-4, rel=1e-2)


def test_reconstruct_prints_every_window_and_how_much_of_it_comes_back(both, capsys):
    for out in ('out-vae', 'out-latent'):
        capsys.readouterr()
        latents.main([f'--out_dir={out}', '--reconstruct', '--num_samples=2', '--start=' + TEXT[:40]])
        lines = capsys.readouterr().out.rstrip('\n').split('\n')
        shares = [line for line in lines if re.fullmatch(r'  \d+% of the tokens', line)]
        assert len(shares) == 3 and sum('  -> ' in line for line in lines) == 6


def test_reconstruct_is_the_same_every_time_at_tau_zero(both, capsys):
    texts = []
    for knobs in ([], ['--seed=2'], ['--tau=1'], ['--tau=1', '--seed=2']):
        capsys.readouterr()
        latents.main(['--out_dir=out-vae', '--reconstruct', '--start=' + TEXT[:16], *knobs])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[2] != texts[3]


def test_interpolate_prints_so_many_points(both, capsys):
    capsys.readouterr()
    latents.main(['--out_dir=out-vae', '--interpolate=To be|or not to', '--points=5'])
    out = capsys.readouterr().out
    lines = [line for line in out.rstrip('\n').split('\n')]
    assert sum(map(len, lines)) + len(lines) - 5 == 5 * len('or not to')  # a text may hold line breaks


def test_nearest_finds_a_training_window_itself(both, capsys):
    model, tokenizer = common.load_model(common.load('out-vae/last.pt'), torch.device('cpu'))
    window = TEXT[16 * 3:16 * 4]
    capsys.readouterr()
    latents.main(['--out_dir=out-vae', '--nearest=2', '--start=' + window])
    out = capsys.readouterr().out
    assert f'  1.000  {window}' in out
    assert len(re.findall(r'^  -?\d\.\d{3}  ', out, re.M)) == 2


def test_the_page_of_a_trace_has_a_frame_for_every_step_and_the_text_is_the_same_without(both, capsys):
    texts = []
    for knobs, frames in ((['--trace'], 9), ([], 3)):
        capsys.readouterr()
        sample.main(['--out_dir=out-latent', '--steps=4', '--windows=2', '--num_samples=1', '--html=t.html',
                     *knobs])
        texts.append(capsys.readouterr().out)
        found = re.search(r'const frames = (\[.*?\]), text', (both / 't.html').read_text()).group(1)
        assert len(json.loads(found)) == frames
    assert texts[0] == texts[1]


def test_starts_of_different_lengths_get_as_many_windows_each(both, capsys):
    (both / 'starts.txt').write_text('To be\nor not to be\n')
    capsys.readouterr()
    sample.main(['--out_dir=out-latent', '--steps=2', '--windows=2', '--num_samples=1',
                 '--start=FILE:starts.txt'])
    texts = capsys.readouterr().out[:-1].split('\n' + '-' * 60 + '\n')
    assert [len(text) for text in texts] == [5 + 2 * 16, 12 + 2 * 16]


def test_the_length_of_a_text_can_be_chosen(both, capsys):
    for out in ('out-vae', 'out-latent'):
        capsys.readouterr()
        sample.main([f'--out_dir={out}', '--steps=2', '--length=40', '--num_samples=1'])
        assert len(capsys.readouterr().out[:-1]) == 40


def test_windows_that_are_sentences_go_through_all_scripts(base, capsys):
    train.main([*VAE, '--sentences=True'])
    train.main(LATENT)
    checkpoint = common.load('out-latent/last.pt')
    model, tokenizer = common.load_model(checkpoint, torch.device('cpu'))
    assert [tokenizer.piece(i) for i in (model.vae.ends == 1).nonzero().flatten().tolist()] == ['\n', '.']
    capsys.readouterr()
    sample.main(['--out_dir=out-latent', '--steps=2', '--windows=2', '--num_samples=1', '--start=To be.'])
    assert 6 + 2 <= len(capsys.readouterr().out[:-1]) <= 6 + 2 * 16
    evaluation.main(['--out_dir=out-latent', '--windows=20'])
    row = capsys.readouterr().out.rstrip('\n').split('\n')[-1]
    assert 'upper bound' in row and '20 of 16' in row


def test_the_report_of_a_vae_agrees_with_its_reconstructions(with_vae, capsys):
    capsys.readouterr()
    latents.main(['--out_dir=out-vae', '--windows=30'])
    report = dict(re.findall(r'^\| (.+?) \| (.+?) \|$', capsys.readouterr().out, re.M))
    model, _ = common.load_model(common.load('out-vae/best.pt'), torch.device('cpu'))
    x = model.cut(load_tokens('tiny', 'val', 100, torch.device('cpu')), None, '').all(30)['x']
    again = model.write(model.posterior(x)[0], torch.full_like(x, model.mask_id), x.size(1), 0.0, 0.0)
    assert float(report['tokens again, greedy (tau = 0)']) == pytest.approx(
        (again == x).double().mean().item(), abs=1e-4)
    kl = model.posterior(x)[0].square().sum((1, 2)).mean().item() / 2
    assert float(report['KL, nats per window'].split()[0]) == pytest.approx(kl, abs=0.1)


def test_the_effect_of_the_condition_is_one_half_without_one_and_one_with_the_answer_at_hand(both):
    model, _ = common.load_model(common.load('out-latent/last.pt'), torch.device('cpu'))
    x = torch.randint(20, (400, 16), generator=torch.Generator().manual_seed(0))
    z = model.vae.encode(x)
    before = x[:, None].clone()
    before[0] = model.mask_id  # nothing is foretold from nothing: left out
    queue = iter(z[1:].split(100))
    model.denoise = lambda *_: next(queue)
    assert latents.condition_effect(model, x, before, 100)[0][1].startswith('1.0000')
    model.denoise = lambda x, *_: torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    share = float(latents.condition_effect(model, x, before, 400)[0][1].split()[0])
    assert abs(share - 0.5) < 0.125  # 5 standard errors


def test_a_judge_compares_next_windows_with_real_ones(both, capsys):
    capsys.readouterr()
    latents.main(['--out_dir=out-latent', '--windows=10', '--judge=out-ar', '--steps=2'])
    out = capsys.readouterr().out
    for name in ('the same through the VAE', 'next windows', 'noise in place of their latents',
                 'windows out of nothing'):
        assert out.count(f'\n| {name} | ') == 2
    assert out.count('\n| validation windows | ') == 1


def test_what_a_text_says_of_its_latents_is_all_if_it_is_the_text_they_are_of_and_else_nothing(both):
    model, _ = common.load_model(common.load('out-latent/last.pt'), torch.device('cpu'))
    x = torch.randint(20, (64, 16), generator=torch.Generator().manual_seed(0))
    nothing = torch.full_like(x, model.mask_id)
    model.vae.write = lambda *_: x
    texts = latents.window_texts(model, x, nothing, x[:, None], steps=2)
    _, again, z = texts['the same through the VAE']
    assert torch.allclose(again, z) and torch.allclose(z, model.vae.encode(x).flatten(1))
    _, again, noise = texts['noise in place of their latents']
    assert torch.allclose(again, z)
    # 64 cosines of 8 dimensions with noise: a standard error of 1 / 8^0.5 / 8
    assert abs(torch.cosine_similarity(again, noise).mean()) < 5 / 8 ** 0.5 / 8


def test_a_missing_checkpoint_is_named_with_the_run_that_makes_it(workdir, capsys):
    (workdir / 'config').mkdir()
    (workdir / 'config/train_gpt2_vae.py').touch()
    for folder, name in (('out-gpt2-vae', 'train_gpt2_vae.py'), ('out-mine', 'train_mdlm.py')):
        with pytest.raises(SystemExit) as e:
            sample.main([f'--out_dir={folder}'])
        assert e.value.code == 2 and f'`python train.py config/{name}`' in capsys.readouterr().err


MISTAKES = [
    (train, [*VAE, '--base='], ['base', 'config/train_ar.py']),
    (train, [*VAE, '--base=nowhere'], ['nowhere', 'config/train_ar.py']),
    (train, [*VAE, '--base=out-vae'], ['out-vae', 'vae', 'of ar']),
    (train, [*VAE, '--block_size=17'], ['block_size=17', '34', '32']),
    (train, [*VAE, '--n_embd=32'], ['n_embd', 'base']),
    (train, [*VAE, '--lora_targets=query'], ['query', 'qkv']),
    (train, [*VAE, '--dataset=other'], ['other', 'vocabulary']),
    (train, [*LATENT, '--base=out-ar'], ['out-ar', 'of vae', 'config/train_vae.py']),
    (train, [*LATENT, '--stride=5'], ['stride=5', '16']),
    (train, [*LATENT, '--block_size=8'], ['block_size', 'base']),
    (train, ['--init_from=resume', '--base=out-ar', '--out_dir=out-vae'], ['base', 'new run']),
    (train, [*TINY, '--objective=masked', '--base=out-ar'], ['unknown knob --base']),
    (sample, ['--out_dir=out-ar', '--windows=2'], ['windows', 'takes steps']),
    (sample, ['--out_dir=out-ar', '--trace'], ['trace']),
    (sample, ['--out_dir=out-vae', '--temperature=0.5'], ['temperature', 'tau']),
    (sample, ['--out_dir=out-vae', '--steps=3', '--rule=euler'], ['rule', 'takes steps, tau']),
    (sample, ['--out_dir=out-latent', '--context=17', '--start=To be'], ['context=17', '16']),
    (sample, ['--out_dir=out-latent', '--suffix=To be'], ['left to right']),
    (sample, ['--out_dir=out-latent', '--rule=confidence'], ['confidence', 'dpmpp_2m']),
    (sample, ['--out_dir=out-latent', '--cfg=1'], ['cfg', '--start']),
    (sample, ['--out_dir=out-latent', '--overlap=4'], ['overlap']),
    (sample, ['--out_dir=out-latent', '--temperature=0.5'], ['temperature', 'tau']),
    (latents, ['--out_dir=out-ar'], ['ar', 'vae']),
    (latents, ['--out_dir=out-ar', '--reconstruct', '--start=To be'], ['ar', 'vae']),
    (latents, ['--out_dir=out-vae', '--reconstruct'], ['--start']),
    (latents, ['--out_dir=out-vae', '--start=To be'], ['--reconstruct', '--nearest']),
    (latents, ['--out_dir=out-vae', '--reconstruct', '--start=Ω'], ["'Ω'"]),
    (latents, ['--out_dir=out-vae', '--interpolate=To be'], ['A|B']),
    (latents, ['--out_dir=out-vae', '--interpolate=To be, or not to be|that'], ['16']),
    (latents, ['--out_dir=out-latent', '--points=1'], ['points']),
    (latents, ['--out_dir=out-latent', '--judge=out-ar', '--rule=ancestral'], ['ancestral', 'heun']),
    (latents, ['--out_dir=out-latent', '--judge=out-ar', '--rule=heun', '--eta=0.5', '--steps=2'], ['eta']),
    (evaluation, ['--out_dir=out-vae', '--judge=out-ar', '--temperature=0.5'], ['temperature', 'tau']),
]


def test_mistakes_end_in_one_line_and_leave_nothing_behind(both, mistake):
    other = both / 'data' / 'other'
    other.mkdir()
    meta = json.loads((both / 'data' / 'tiny' / 'meta.json').read_text())
    (other / 'meta.json').write_text(json.dumps({**meta, 'chars': meta['chars'][::-1]}))
    for split in ('train', 'val'):
        (other / f'{split}.bin').write_bytes((both / 'data' / 'tiny' / f'{split}.bin').read_bytes())
    there = sorted(both.rglob('*'))
    for script, argv, words in MISTAKES:
        argv = argv + ['--out_dir=out-new'] * (script is train and '--init_from=resume' not in argv)
        line = mistake(script.main, *argv)
        assert all(word in line for word in words), (argv, line)
        assert sorted(both.rglob('*')) == there, argv
