"""Score-based diffusion through the scripts."""
import re

import pytest

import eval as evaluation
import sample
import score
import train
from conftest import TINY
from tools import frontier


@pytest.fixture
def trained(after):
    """A working folder with a tiny score model in out-s and an autoregressive judge in out-a."""
    return after([*TINY, '--out_dir=out-a', '--objective=ar'],
                 [*TINY, '--out_dir=out-s', '--objective=score'])


def test_prompts_infilling_templates_and_files_of_starts_work_as_for_masked_diffusion(trained, capsys):
    texts = lambda: capsys.readouterr().out[:-1].split('\n' + '-' * 60 + '\n')
    texts()
    sample.main(['--out_dir=out-s', '--template=To ___, or ___e', '--hole=2', '--steps=5'])
    assert all(re.fullmatch(r'To .., or ..e', text, re.S) for text in texts())
    sample.main(['--out_dir=out-s', '--start=To', '--suffix=be', '--length=12', '--num_samples=1',
                 '--rule=heun'])
    text, = texts()
    assert text.startswith('To') and text.endswith('be') and len(text) == 12
    (trained / 'starts.txt').write_text('Whether\nTo\n\nor not')
    train.main([*TINY, '--out_dir=out-b', '--objective=block', '--block_length=4'])
    texts()
    for out_dir in ('out-s', 'out-a', 'out-b'):
        sample.main([f'--out_dir={out_dir}', '--start=FILE:starts.txt', '--steps=4', '--length=20'])
        for text, start in zip(texts(), ('Whether', 'Whether', 'To', 'To', 'or not', 'or not'), strict=True):
            assert text.startswith(start) and len(text) == 20


def test_a_text_of_guesses_is_ended_only_when_it_is_done(trained, capsys):
    flags = ['--out_dir=out-s', '--length=40', '--num_samples=1', '--steps=6', '--first=left']
    sample.main(flags)
    whole = capsys.readouterr().out.rstrip('\n')
    stop = whole[7]
    sample.main([*flags, f'--stop={stop}'])
    assert capsys.readouterr().out.rstrip('\n') == whole[:whole.index(stop) + 1]


def test_the_log_shows_whether_embeddings_collapse(trained, capsys):
    train.main([*TINY, '--out_dir=out-s', '--objective=score'])
    line = [line for line in capsys.readouterr().out.splitlines() if 'tokens/s' in line][-1]
    found = dict(re.findall(r'(\w+) (-?[\d.]+),', line))
    assert -0.1 < float(found['anisotropy']) < 0.3 and 0.5 < float(found['variance']) < 1.1


def test_the_judge_and_the_frontier_know_the_samplers_of_points(trained, capsys, mistake):
    evaluation.main(['--out_dir=out-s', '--judge=out-a', '--num_samples=4', '--steps=3', '--rule=heun',
                     '--first=together'])
    rows = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('| heun')]
    assert float(rows[0][3]) == 5  # calls: two a step but the last
    frontier.main(['--out_dir=out-s', '--judge=out-a', '--num_samples=2', '--grid_of_steps=2,4'])
    out = capsys.readouterr().out
    assert all(out.count(f'| {rule} |') == 2 for rule in score.RULES)
    told = mistake(frontier.main, '--out_dir=out-s', '--judge=out-a', '--rules=random')
    assert 'random' in told and 'renoise' in told
    assert 'cfg' in mistake(sample.main, '--out_dir=out-s', '--cfg=1')
    assert 'min_entropy' in mistake(sample.main, '--out_dir=out-s', '--min_entropy=1')
    assert 'first' in mistake(sample.main, '--out_dir=out-a', '--first=left')
    evaluation.main(['--out_dir=out-s', '--order=left', '--windows=4'])
    assert 'exact, left to right' in capsys.readouterr().out
