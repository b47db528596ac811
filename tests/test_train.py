"""The loop: resume, averaging, the compiler, signals, kills, and the mistakes people make."""
import functools
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import common
import configurator
import masked
import train
from conftest import TINY, started
from hub import start
from test_latent_scripts import AR, LATENT, VAE
from text import windows


def same(a, b):
    """Are two nested checkpoints equal, tensors bit for bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stop_after(monkeypatch, iteration):
    """Deliver SIGTERM to this process in the middle of the given iteration."""
    original = train.update_ema

    def update_and_signal(ema, params, decay, it, *more):
        original(ema, params, decay, it, *more)
        if it + 1 == iteration:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(train, 'update_ema', update_and_signal)


@pytest.mark.parametrize('objective', ['ar', 'masked', 'block', 'score'])  # others: test_latent_scripts.py
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not_bit_for_bit(
        workdir, monkeypatch, objective):
    tiny = [*TINY, f'--objective={objective}', '--max_iters=7', '--dropout=0.1']
    train.main([*tiny, '--out_dir=whole'])
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train.main([*tiny, '--out_dir=parts'])
    assert common.load('parts/last.pt')['iter'] == 3
    train.main(['--init_from=resume', '--out_dir=parts'])
    whole, parts = common.load('whole/last.pt'), common.load('parts/last.pt')
    assert parts['iter'] == 7 and parts['tokens'] == whole['tokens'] == 7 * 4 * 16
    for key in ('model', 'ema', 'optimizers', 'val', 'best'):
        assert same(whole[key], parts[key]), key


def test_the_compiled_loop_resumes_bit_for_bit_too(workdir, monkeypatch):
    if not shutil.which('g++') and not shutil.which('c++'):
        pytest.skip('torch.compile needs a C++ compiler on a CPU; the eager sibling is above')
    tiny = [*TINY, '--max_iters=5', '--compile=True']
    train.main([*tiny, '--out_dir=whole'])
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train.main([*tiny, '--out_dir=parts'])
    train.main(['--init_from=resume', '--out_dir=parts'])
    assert same(common.load('whole/last.pt')['model'], common.load('parts/last.pt')['model'])
    assert not any('_orig_mod' in name for name in common.load('whole/last.pt')['model'])


def test_evaluating_more_often_does_not_change_the_training(workdir):
    train.main([*TINY, '--out_dir=often', '--eval_interval=1'])
    train.main([*TINY, '--out_dir=once', '--eval_interval=100'])
    assert same(common.load('often/last.pt')['model'], common.load('once/last.pt')['model'])


def test_averaged_weights_follow_the_formula_and_leave_the_start_behind():
    torch.manual_seed(0)
    ema, value = [torch.zeros(3)], torch.zeros(3)
    for it in range(50):
        params = [torch.randn(3)]
        train.update_ema(ema, params, 0.9, it)
        decay = min(0.9, (1 + it) / (10 + it))
        value = decay * value + (1 - decay) * params[0]
        assert torch.allclose(ema[0], value)


def test_every_averaged_tensor_moves_and_stays_float32(workdir):
    train.main([*TINY, '--max_iters=20', '--dtype=bfloat16', '--arch=gpt2', '--ema_decay=0.99',
                '--warmup_iters=0'])
    checkpoint = common.load('out/last.pt')
    train.main([*TINY, '--max_iters=1', '--dtype=bfloat16', '--arch=gpt2', '--out_dir=start', '--lr=0',
                '--muon_lr=0'])
    start = common.load('start/last.pt')['model']
    for name, e in checkpoint['ema'].items():
        assert e.dtype == torch.float32
        assert not torch.equal(e, start[name]) and not torch.equal(e, checkpoint['model'][name]), name


def test_the_learning_rate_warms_up_holds_and_cools_down():
    run = train.Config(max_iters=100, warmup_iters=9, cooldown=0.5)
    assert [train.lr_share(it, run) for it in (0, 4, 9, 49, 75)] == [0.1, 0.5, 1.0, 1.0, 0.5]
    assert train.lr_share(99, run) == 0.02
    cosine = train.Config(max_iters=100, warmup_iters=0, lr_schedule='cosine')
    assert train.lr_share(0, cosine) == 1 and abs(train.lr_share(50, cosine) - 0.5) < 1e-12


def test_training_learns_a_repeated_text(workdir, capsys):
    train.main([*TINY, '--max_iters=150', '--n_embd=32', '--batch_size=16', '--eval_interval=150'])
    assert common.load('out/last.pt')['val'][0] < 2.5  # log V is 3.2, the entropy of single characters 2.7


def test_weights_of_another_run_can_be_the_start(after):
    after(TINY)
    train.main([*TINY, '--init_from=out/best.pt', '--out_dir=second', '--lr=0', '--muon_lr=0',
                '--max_iters=1', '--masking=count'])
    second = common.load('second/last.pt')
    assert (same(second['model'], common.load('out/best.pt')['ema'])
            and second['config']['masking'] == 'count')


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(after):
    after(TINY)
    with pytest.raises(SystemExit) as exit:
        train.main(['--init_from=resume', '--max_iters=30', '--lr=1e38', '--muon_lr=1e38', '--grad_clip=0',
                    '--eval_interval=30', '--cooldown=0'])
    assert exit.value.code != 0 and 'the loss of iteration' in str(exit.value.code)
    checkpoint = common.load('out/last.pt')
    assert checkpoint['iter'] == 4 and all(p.isfinite().all() for p in checkpoint['model'].values())


def test_weights_that_an_update_made_infinite_are_not_saved(after, monkeypatch):
    after(TINY)
    original = train.update_ema

    def overflow(ema, params, decay, it, *more):
        params[0].data.view(-1)[0] = float('inf')
        original(ema, params, decay, it, *more)
    monkeypatch.setattr(train, 'update_ema', overflow)
    with pytest.raises(SystemExit) as exit:
        train.main(['--init_from=resume', '--max_iters=5'])  # one iteration: a finite loss, infinite weights
    assert 'iteration 4' in str(exit.value.code)
    for name in ('last.pt', 'best.pt'):
        assert all(p.isfinite().all() for p in common.load(f'out/{name}')['model'].values())
    assert common.load('out/last.pt')['iter'] == 4


def until(condition, process):
    while not condition():
        assert process.is_alive()
        time.sleep(0.01)


def test_killing_at_any_moment_leaves_a_loadable_checkpoint(workdir):
    last = workdir / 'out' / 'last.pt'
    for seconds in (0.0, 0.03, 0.11, 0.21, 0.34):
        process = started(*TINY, '--max_iters=100000', '--eval_interval=1', '--eval_windows=1')
        until(last.exists, process)
        time.sleep(seconds)
        process.kill()
        process.join()
        assert common.load(last)['iter'] >= 1
        last.unlink()


def test_a_write_that_fails_midway_leaves_the_old_checkpoint_and_no_other_file(workdir, monkeypatch, mistake):
    common.save({'a': 1}, 'x.pt')

    def half(checkpoint, f):
        f.write(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(torch, 'save', half)
    assert 'x.pt: disk full' in mistake(lambda argv: common.save({'a': 2}, 'x.pt'))
    assert torch.load('x.pt') == {'a': 1} and not list(workdir.glob('*.tmp'))


def test_ctrl_c_saves_and_ends_well(workdir, capfd):
    process, last = started(*TINY, '--max_iters=1000000', '--eval_interval=10'), workdir / 'out' / 'last.pt'
    until(last.exists, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0 and '--init_from=resume' in capfd.readouterr().out
    assert common.load(last)['iter'] >= 10


@pytest.mark.parametrize('flags, words', [
    (['--max_itrs=3'], ['max_itrs', '--max_iters']),
    (['--lr=abc'], ['lr', 'abc', 'float']),
    (['--batch_size=2.5'], ['batch_size', 'int']),
    (['--compile=maybe'], ['compile', 'bool']),
    (['--lr=nan'], ['lr']),
    (['--lr=-1'], ['lr', 'negative']),
    (['--max_iters=0'], ['max_iters']),
    (['--n_head=3'], ['n_head=3', 'n_embd=16']),
    (['--objective=maskd'], ['maskd', 'masked']),
    (['--t_law=bel'], ['t_law', 'bell']),
    (['--lr_schedule=step'], ['lr_schedule', 'cosine']),
    (['--dtype=float64'], ['dtype', 'bfloat16']),
    (['--device=cuda:77'], ['device=cuda:77', '--device=cpu']),
    (['--dataset=nothing'], ['dataset', 'nothing']),
    (['--block_size=4000'], ['tokens', 'block_size=4000']),
    (['--init_from=resume'], ['out/last.pt', 'train.py']),
    (['--init_from=nowhere.pt'], ['nowhere.pt']),
    (['config/none.py'], ['config/none.py']),
])
def test_a_mistake_ends_in_one_line_and_writes_nothing(workdir, mistake, flags, words):
    message = mistake(train.main, *TINY, *flags)
    assert all(word in message for word in words), message
    assert not (workdir / 'out').exists()


def test_an_int_will_do_for_a_float(workdir):
    train.main([*TINY, '--lr=0', '--grad_clip=1'])


def test_a_config_file_that_does_not_run_or_has_a_typo_is_named(workdir, mistake):
    (workdir / 'bad.py').write_text('lr = 1 / 0')
    assert 'bad.py' in mistake(train.main, 'bad.py')
    (workdir / 'typo.py').write_text('max_iter = 3')
    assert '--max_iters' in mistake(train.main, 'typo.py', *TINY)
    (workdir / 'type.py').write_text("max_iters = 'many'")
    assert 'max_iters' in mistake(train.main, 'type.py', '--dataset=tiny')


def test_flags_win_over_the_cpu_section_and_that_over_the_file(workdir):
    (workdir / 'c.py').write_text("seed = 1\nlr = 0.1\nema_decay = 0.5\ncpu = dict(seed=2, lr=0.2)\n")
    run, *_ = start.begin(['c.py', '--lr=0.3', '--dataset=tiny', '--device=cpu'], '', train.Config)
    assert (run.seed, run.lr, run.ema_decay) == (2, 0.3, 0.5)


def test_missing_or_wrong_data_names_the_command_that_makes_it(workdir, mistake):
    tokens = np.fromfile('data/tiny/train.bin', np.uint16)
    tokens[7] = 999
    tokens.tofile('data/tiny/train.bin')
    message = mistake(train.main, *TINY)
    assert '999' in message and 'data/tiny/prepare.py' in message
    (workdir / 'data/tiny/train.bin').unlink()
    assert 'data/tiny/prepare.py' in mistake(train.main, *TINY)
    (workdir / 'data/tiny/prepare.py').touch()
    (workdir / 'data/tiny/meta.json').unlink()
    assert 'python data/tiny/prepare.py' in mistake(train.main, *TINY)


def test_damaged_checkpoints_are_refused_and_left_alone(workdir, after, mistake):
    after(TINY)
    whole = (workdir / 'out/last.pt').read_bytes()
    for content in (whole[:len(whole) // 2], b'', b'not a checkpoint'):
        (workdir / 'out/last.pt').write_bytes(content)
        assert 'out/last.pt' in mistake(train.main, '--init_from=resume')
        assert (workdir / 'out/last.pt').read_bytes() == content


def test_a_resumed_run_keeps_its_shape(after, mistake):
    after(TINY)
    assert 'n_layer=2' in mistake(train.main, '--init_from=resume', '--n_layer=2')
    assert 'objective=ar' in mistake(train.main, '--init_from=resume', '--objective=ar')


@pytest.mark.parametrize('first, then', [('0.02', '0'), ('0', '0.02')])
def test_a_resumed_run_keeps_its_optimizers(after, mistake, first, then):
    after([*TINY, f'--muon_lr={first}'])
    assert 'muon_lr' in mistake(train.main, '--init_from=resume', f'--muon_lr={then}', '--max_iters=8')
    checkpoint = common.load('out/last.pt')
    torch.save(checkpoint | dict(optimizers=[]), 'out/last.pt')
    assert '0 optimizers' in mistake(train.main, '--init_from=resume', '--max_iters=8')
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict()
    torch.save(checkpoint | dict(optimizers=[other] * len(checkpoint['optimizers'])), 'out/last.pt')
    assert 'optimizers' in mistake(train.main, '--init_from=resume', '--max_iters=8')


def test_weight_decay_and_learning_rates_may_change_when_a_run_is_resumed(workdir):
    """lr = 0 leaves the weights alone; with decay they would shrink if the old lr were used."""
    train.main([*TINY, '--weight_decay=0.5'])
    before = common.load('out/last.pt')
    decays = [g['weight_decay'] for o in before['optimizers'] for g in o['param_groups']]
    assert decays == [0.5, 0.0, 0.5]  # none on numbers, as for norms
    train.main(['--init_from=resume', '--max_iters=5', '--weight_decay=0.25', '--lr=0', '--muon_lr=1e-30'])
    after = common.load('out/last.pt')
    assert [g['weight_decay'] for o in after['optimizers'] for g in o['param_groups']] == [0.25, 0, 0.25]
    assert same(before['model'], after['model']) and after['run']['weight_decay'] == 0.25


def test_the_best_figure_of_another_evaluation_does_not_count(after):
    after(TINY)
    checkpoint = common.load('out/last.pt')
    torch.save(checkpoint | dict(best=-1.0), 'out/last.pt')  # nothing will be better
    train.main(['--init_from=resume', '--max_iters=6'])
    assert common.load('out/best.pt')['iter'] == 4
    train.main(['--init_from=resume', '--max_iters=8', '--eval_windows=4'])
    assert common.load('out/best.pt')['iter'] == 8


def test_adapters_that_muon_has_all_of_are_trained(after):
    after([*TINY, '--objective=ar', '--out_dir=out-a'])
    train.main([*TINY, '--init_from=out-a', '--objective=masked', '--lora_rank=2', '--lora_embed=False'])
    assert len(common.load('out/last.pt')['optimizers']) == 1


def test_help_lists_every_knob_in_groups_and_starts_nothing(workdir, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(['--help'])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and '--muon_lr=0.02' in out and '--loss_weight=flat' in out and 'elbo' in out
    assert '  the optimizer\n  --batch_size=64' in out and 'vocab_size' not in out


def test_at_most_45_knobs_train_a_masked_model():
    knobs = {name: knob for thing in (train.Config, masked.Config, windows.Config)
             for name, knob in configurator.knobs_of(thing).items() if not configurator.is_fixed(knob)}
    assert len(knobs) <= 45, len(knobs)


def test_what_the_data_or_the_weights_set_is_no_flag(workdir, mistake):
    assert 'vocab_size is set by the dataset' in mistake(train.main, *TINY, '--vocab_size=9')


def test_without_a_compiler_training_goes_on_with_a_warning(workdir, monkeypatch, capsys):
    def broken(model):
        raise RuntimeError('\nno compiler for you\nmore')
    monkeypatch.setattr(torch, 'compile', broken)
    train.main([*TINY, '--compile=True'])
    err = capsys.readouterr().err
    assert 'warning: torch.compile' in err and 'RuntimeError: no compiler for you)' in err
    assert common.load('out/last.pt')['iter'] == 4


RUNS = {name: [*TINY, f'--objective={name}', f'--out_dir=out-{name}'] for name in common.OBJECTIVES}
RUNS |= {'vae': VAE, 'latent': LATENT, 'random_length': [*TINY, '--random_length=0.5'],
         'annealed': [*TINY, '--objective=masked', '--init_from=out-ar', '--anneal_iters=3',
                      '--shift=True', '--lora_rank=2']}


@pytest.mark.parametrize('name', RUNS)
def test_a_run_compiles_its_loss_once_whatever_comes_between(after, monkeypatch, capsys, name):
    """Two micro-batches a step, evaluations that end in a smaller batch, checkpoints, an odd last step."""
    after(AR, VAE)
    counter = CompileCounter()
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=counter, fullgraph=True))
    monkeypatch.setattr(common, 'rows_at_once', lambda T, V: 5)
    torch._dynamo.reset()
    train.main([*RUNS[name], '--out_dir=out', '--compile=True', '--grad_accum=2', '--max_iters=5'])
    assert counter.frame_count == 1 and 'warning' not in capsys.readouterr().err
