"""What a new user meets: a model that is there, a training that says how long it takes and shows texts."""
import re
import shutil
from pathlib import Path

import pytest
import torch

import common
import sample
import train
from conftest import TINY
from hub import export, find
from tools import demo, glimpse, machine


def test_without_a_checkpoint_the_one_of_the_repository_writes_and_is_named(workdir, capsys):
    sample.main(['--steps=4', '--num_samples=1', '--length=20'])
    out, err = capsys.readouterr()
    assert len(out) >= 20 and 'no out*/ here' in err and 'shakespeare.pt' in err.splitlines()[0]
    assert find.SHIPPED.stat().st_size <= 5e6 and (find.SHIPPED.parent / 'README.md').exists()


def test_the_checkpoint_of_the_repository_has_half_precision_weights_and_no_optimizer():
    checkpoint = common.load(find.SHIPPED)
    assert 'optimizers' not in checkpoint and checkpoint['objective'] == 'masked'
    assert {t.dtype for t in checkpoint['ema'].values()} == {torch.float16}


def test_a_small_checkpoint_writes_nearly_what_the_whole_one_does(trained):
    export.main(['--out_dir=out-m', '--to=small.pt'])
    whole, small = (common.load_model(common.load(path), 'cpu')[0] for path in ('out-m/best.pt', 'small.pt'))
    assert Path('small.pt').stat().st_size < Path('out-m/best.pt').stat().st_size / 2
    assert all(p.dtype == torch.float32 for p in small.parameters())
    for a, b in zip(whole.parameters(), small.parameters()):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)
    sample.main(['--out_dir=small.pt', '--steps=2'])


def test_the_plan_fills_the_time_that_is_left_with_steps_of_the_measured_length():
    run = train.Config(minutes=5.0, max_iters=machine.UNPLANNED)
    words = machine.plan(run, 30, seconds=0.3, spent=60.0)
    assert run.max_iters % 10 == 0 and abs(run.max_iters * 0.3 / 0.9 - 240) < 20
    assert 'about 4.' in words and f'iteration {run.max_iters:,}, 0.30 s' in words
    resumed = train.Config(minutes=5.0, max_iters=700)
    assert 'about 1.9 minutes to iteration 700' in machine.plan(resumed, 350, 0.3, 60.0)
    assert resumed.max_iters == 700
    slow = train.Config(minutes=0.1, max_iters=machine.UNPLANNED)
    machine.plan(slow, 30, seconds=100.0, spent=60.0)
    assert slow.max_iters == 2 * (machine.UNUSUAL + machine.MEASURED)  # it has begun, so it goes on a little


@pytest.mark.parametrize('objective', ['masked', 'ar', 'score'])
def test_a_run_with_a_time_to_fill_shows_texts_and_says_what_to_type_next(workdir, capsys, objective):
    """A tenth of a second of iterations: the fewest that there are."""
    train.main([*TINY, '--minutes=0.002', f'--objective={objective}', '--eval_interval=0'])
    out = capsys.readouterr().out
    planned = int(re.search(r'about .* minutes to iteration ([\d,]+)', out)[1].replace(',', ''))
    assert common.load('out/last.pt')['iter'] == planned == common.load('out/last.pt')['run']['max_iters']
    assert '000000' not in out  # the length that a run has before its own is known
    assert out.count('; a text:\n') == 6  # at 25, 30, ... 50
    assert '0.002 minutes' in out and out.count('\n  | ') >= 5
    assert 'python sample.py --out_dir=out' in out.splitlines()[-1]
    train.main(['--init_from=resume', '--device=cpu', f'--max_iters={planned + 30}'])
    assert common.load('out/last.pt')['iter'] == planned + 30


def test_a_text_keeps_a_prompt_and_begins_with_the_token_that_lines_begin_with():
    class Net:
        any_length, config, reading = False, type('', (), dict(block_size=4)), {}
    tokens = type('', (), dict(vocab_size=9, bos=None))
    x, given = torch.tensor([[1, 2, 3, 4]] * 2), torch.tensor([[True, True, False, False]] * 2)
    assert glimpse.canvas_of(Net, dict(x=x, given=given), tokens).tolist() == [[1, 2, 9, 9]]
    assert glimpse.canvas_of(Net, dict(x=x), tokens).tolist() == [[9] * 4]
    tokens.bos = 7
    assert glimpse.canvas_of(Net, dict(x=x), tokens).tolist() == [[7, 9, 9, 9]]


def test_two_texts_stand_side_by_side_and_long_lines_are_wrapped():
    both = glimpse.side_by_side('one two three\n\nfour', 'a\nb', width=8)
    assert both.splitlines() == ['one two    a', 'three      b', '', 'four']
    assert glimpse.indented('\n\na\n \nb\nc', lines=2) == '  | a\n  | b'


def test_the_demo_writes_trains_and_writes_again_and_a_failure_ends_it(workdir, monkeypatch, capsys):
    called = []

    def run(command, **how):
        called.append(' '.join(map(str, command[1:])))
        return type('', (), dict(returncode=3 if 'prepare' in called[-1] else 0, stdout='To be\n'))
    monkeypatch.setattr(demo.subprocess, 'run', run)
    with pytest.raises(SystemExit) as end:  # there is no data here, and its preparation fails
        demo.main([])
    assert end.value.code == 3 and len(called) == 2
    Path('data/shakespeare_char').mkdir()
    Path('data/shakespeare_char/meta.json').touch()
    Path('out-demo').mkdir()
    shutil.copy(find.SHIPPED, 'out-demo/last.pt')
    called.clear()
    demo.main([])
    assert ['sample.py' in called[0], 'train.py' in called[1], 'out-demo' in called[3]] == [True] * 3
    out = capsys.readouterr().out
    assert f"{'To be':<38}   To be" in out
    assert f"--max_iters={2 * common.load(find.SHIPPED)['iter']}" in out
