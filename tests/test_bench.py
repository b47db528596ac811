"""The bench: what it counts, against other counts, and whether its figures agree with each other."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ar
import block
import masked
from tools import bench, yardstick

CPU = torch.device('cpu')
TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=8', '--batch_size=2', '--batches=1,3',
        '--steps=3', '--repeats=2', '--compile=False', '--dtype=float32', '--device=cpu']


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The large squares take their time."""
    monkeypatch.setattr(yardstick, 'SQUARES', (64,))


def run(capsys, *flags):
    bench.main([*TINY, *flags])
    out, _ = capsys.readouterr()
    return out, json.loads(out.splitlines()[-1])


# ---- against other counts ---------------------------------------------------------------------------------

SIZES = dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize('module, own', [
    (masked, {}), (masked, dict(arch='gpt2')), (ar, {}), (ar, dict(arch='llama', n_kv_head=1)),
    (block, dict(block_length=4))])
def test_flops_are_those_that_torch_counts(module, own):
    model = bench.fresh(module.__name__, module.Config(**SIZES, **own), CPU)
    batch = dict(x=torch.randint(11, (3, 12)))
    with FlopCounterMode(display=False) as counter:
        model(**batch)[0].backward()
    assert yardstick.flops(model, batch) == counter.get_total_flops()


def test_flops_of_a_denoiser_are_6_N_a_token_and_12_C_T_a_layer():
    model, x = bench.fresh('masked', masked.Config(**SIZES), CPU), torch.randint(11, (3, 12))
    C, L, T, V, H = 16, 2, 12, 11, 2
    N = L * (12 * C * C + H * C) + V * C  # qkv 3 C C, proj C C, MLP 8 C C, gates H C; the head
    assert yardstick.flops(model, dict(x=x)) == x.numel() * (6 * N + 12 * L * C * T)


def test_calls_that_warm_up_do_not_count():
    calls = []
    parts = dict(a=lambda: calls.append('a'), b=lambda: calls.append('b'))
    found = yardstick.measure(parts, CPU, repeats=3)
    assert calls == ['a', 'b'] * (3 + yardstick.WARM)
    for own in found.values():
        assert own['repeats'] == 3 and 0 <= own['low'] <= own['seconds'] <= own['high']


def test_a_slow_measurement_ends_after_one_repeat():
    assert yardstick.measure({'a': lambda: None}, CPU, repeats=50, most=1e-9)['a']['repeats'] == 1


# ---- MDLM's cache -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('B, steps', [(1, 64), (3, 64), (3, 4)])
def test_mdlms_cache_fills_the_canvas_with_no_more_calls_than_steps(B, steps):
    model = bench.fresh('masked', masked.Config(**SIZES), CPU).eval()
    canvas, calls = torch.full((B, 12), 11), []

    def denoise(xt, t):
        calls.append(t)
        return model.denoise(xt, t)
    *_, last = bench.mdlm_cache(denoise, canvas, 11, steps)
    assert (last < 11).all() and len(calls) <= steps
    assert len(calls) <= 12 * B  # one until each change of the batch
    calls.clear()
    plain = list(model.sample(canvas, steps, rule='textbook'))
    assert len(plain) == steps


# ---- the program ------------------------------------------------------------------------------------------

def test_the_figures_agree_with_each_other(capsys):
    out, found = run(capsys)
    training, peak = found['training'], found['machine']['peak_gflops']
    assert peak == max(found['products'].values()) == found['products'][found['machine']['peak_shape']]
    seconds = {row['part']: row['seconds'] for row in training['rows']}
    parts = [seconds[name] for name in ('data', 'forward', 'backward', 'optimizer', 'averages')]
    whole = seconds['whole step']
    assert min(parts) > 0 and seconds['lost between'] == pytest.approx(whole - sum(parts))
    assert training['tokens_per_second'] == pytest.approx(2 * 8 / whole)
    assert training['share_of_peak_step'] == pytest.approx(training['gflop_per_step'] / whole / peak)
    assert training['share_of_peak_forward_backward'] == pytest.approx(
        training['gflop_per_step'] / (parts[1] + parts[2]) / peak)
    assert training['compile_seconds'] is None and training['peak_memory_mb'] > 10
    for name in ('tokens per second', 'ancestral', "MDLM's cache", 'autoregressive', 'lost between'):
        assert name in out
    rows = {(row['rule'], row['batch']): row for row in found['sampling']['rows']}
    for (_, batch), row in rows.items():
        assert row['low'] <= row['seconds'] <= row['high'] and row['repeats'] == 2
        assert row['tokens_per_second'] == pytest.approx(batch * 8 / row['seconds'])
        assert row['seconds_per_text'] == pytest.approx(row['seconds'] / batch)
    names = 'ancestral', 'llada', 'confidence', 'eb', 'textbook', "MDLM's cache", 'autoregressive'
    assert rows.keys() == {(name, batch) for name in names for batch in (1, 3)}
    calls = {name: rows[name, 3]['calls'] for name in names}
    assert calls['textbook'] == calls['llada'] == 3 and calls['confidence'] == calls['autoregressive'] == 8
    assert 1 <= calls['eb'] <= 8 and calls['ancestral'] <= 3 and calls["MDLM's cache"] <= 3
    assert [(row['length'], row['width'], row['batch']) for row in found['growth']['rows']] == [
        (8, 16, 2), (4, 16, 2), (16, 16, 2), (8, 8, 2), (8, 32, 2), (8, 16, 1), (8, 16, 4)]


@pytest.mark.parametrize('objective, rules', [('ar', ['autoregressive']),
                                              ('sedd', ['ancestral', 'llada', 'confidence', 'eb', 'textbook',
                                                        'autoregressive']),
                                              ('block', ['block', 'block', 'autoregressive']),
                                              ('score', ['score', 'score', 'autoregressive'])])
def test_every_objective_that_needs_no_checkpoint_is_measured(capsys, objective, rules):
    _, found = run(capsys, f'--objective={objective}', '--growth=False', '--batches=2', '--repeats=1')
    assert [row['rule'] for row in found['sampling']['rows']] == rules and 'growth' not in found
    assert found['training']['gflop_per_step'] > 0


def test_a_config_file_gives_the_sizes_for_this_device_and_knobs_of_train_are_left_out(capsys, tmp_path):
    (tmp_path / 'tiny.py').write_text("objective, dataset, max_iters = 'ar', 'none', 7\nn_layer = 3\n"
                                      "cpu = dict(batch_size=5, n_layer=2)\n")
    flags = [flag for flag in TINY if not flag.startswith(('--n_layer', '--batch_size'))]
    bench.main([str(tmp_path / 'tiny.py'), *flags, '--sampling=False', '--growth=False'])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found['bench']['objective'] == 'ar' and found['bench']['batch_size'] == 5
    assert found['model']['n_layer'] == 2


@pytest.mark.parametrize('flag, word', [('--batch_siez=3', '--batch_size'), ('--batches=1,x', '1,16,64'),
                                        ('--objective=latent', 'checkpoint'), ('--max_iters=3', 'unknown'),
                                        ('--n_head=3', 'n_head=3'), ('--seconds=0', 'positive')])
def test_a_wrong_knob_ends_in_one_line(mistake, flag, word):
    assert word in mistake(bench.main, *TINY, flag)


def test_no_knob_of_the_bench_is_also_one_of_a_model():
    import common
    from configurator import knobs_of
    for name in common.OBJECTIVES:
        own = knobs_of(common.concept(name).Config).keys()
        assert knobs_of(bench.Config).keys() & own == {'vocab_size'}, name
