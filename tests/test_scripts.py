"""The commands of the README at a tiny size, and the mistakes people make."""
import contextlib
import dataclasses
import json
import re
import runpy
import sys

import pytest
import torch

import common
import configurator
import eval as evaluation
import masked
import sample
import train
import unmask
from text import ends, vocabulary, windows
from conftest import ROOT, TEXT, TINY


# ---- the commands -----------------------------------------------------------------------------------------

def test_the_commands_of_the_readme_work_end_to_end(tmp_path, monkeypatch, capsys):
    """In this process; test_files.py and test_train.py start scripts as a person does."""
    readme = (ROOT / 'README.md').read_text()
    (tmp_path / 'text.txt').write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    out = {}
    for command, tiny in {
        'python data/shakespeare_char/prepare.py': ['--input=text.txt', '--out=data/shakespeare_char'],
        'python train.py config/train_mdlm.py': TINY[1:],
        'python train.py config/train_ar.py': TINY[1:],
        'python sample.py --steps=64': ['--out_dir=out-mdlm'],
        'python eval.py --out_dir=out-mdlm': ['--windows=10'],
        'python eval.py --out_dir=out-ar': ['--windows=10'],
    }.items():
        assert command in readme, command
        words = [str(ROOT / w) if w.endswith('.py') else w for w in command.split()[1:]]
        monkeypatch.setattr(sys, 'argv', words + tiny)
        capsys.readouterr()
        runpy.run_path(words[0], run_name='__main__')
        out[command] = capsys.readouterr().out
    assert len(out['python sample.py --steps=64'].replace('-' * 60, '')) >= 2 * 16
    assert ('| upper bound |' in out['python eval.py --out_dir=out-mdlm']
            and '| exact |' in out['python eval.py --out_dir=out-ar'])


def text_of(capsys):
    out, err = capsys.readouterr()
    return out.rstrip('\n').split('\n' + '-' * 60 + '\n'), err


def test_sample_takes_the_newest_checkpoint_and_is_a_function_of_the_seed(trained, capsys):
    texts = []
    for seed in (1, 1, 2):
        sample.main([f'--seed={seed}', '--temperature=0.9', '--top_k=5', '--top_p=0.9'])
        texts.append(text_of(capsys))
    assert 'out-a/best.pt' in texts[0][1] and texts[0][0] == texts[1][0] != texts[2][0]


@pytest.mark.parametrize('out_dir', ['out-m', 'out-a'])
@pytest.mark.parametrize('length', [5, 16, 17, 40])
def test_any_length_is_written_and_the_start_is_kept(trained, capsys, out_dir, length):
    sample.main([f'--out_dir={out_dir}', f'--length={length}', '--start=To b', '--steps=3',
                 '--num_samples=3'])
    texts, err = text_of(capsys)
    texts = '\n'.join(texts)
    assert (len(texts) >= 3 * length - 3 and texts.startswith('To b') and '░' not in texts
            and 'network calls' in err)


def test_beyond_the_block_the_last_part_stays_as_context(trained):
    model, tokenizer = common.load_model(common.load('out-m/best.pt'), torch.device('cpu'))
    seen = []

    def spy(window, **knobs):
        seen.append(window[0].tolist())
        return masked.Model.sample(model, window, **knobs)
    spied = type('Spied', (), {'sample': staticmethod(spy)})
    V = tokenizer.vocab_size
    *_, canvas = common.generate(spied, torch.full((1, 41), V), 16, 6, steps=4)
    assert canvas.shape == (1, 41) and (canvas < V).all()
    assert [row.count(V) for row in seen] == [16, 10, 10, 5]
    for start, row in zip((0, 10, 20, 25), seen):
        known = [i for i, token in enumerate(row) if token < V]
        assert [row[i] for i in known] == canvas[0, start:start + 16][known].tolist()


@pytest.mark.parametrize('stride', [1, 5, 8, 15])
def test_with_a_stride_n_more_blocks_write_n_strides_more(stride):
    """Semi-autoregressive writing (MDLM): length L + stride n takes n + 1 blocks, to the token."""
    denoiser = masked.Model(masked.Config(vocab_size=5, block_size=16, n_layer=1, n_head=1, n_embd=4))
    for n in range(4):
        blocks = []

        def counted(window, **knobs):
            blocks.append(window.size(1))
            return masked.Model.sample(denoiser, window, **knobs)
        spied = type('Spied', (), {'sample': staticmethod(counted)})
        *_, canvas = common.generate(spied, torch.full((2, 16 + stride * n), 5), 16, 16 - stride, steps=3)
        assert canvas.shape == (2, 16 + stride * n) and (canvas < 5).all() and blocks == [16] * (n + 1)


def test_infilling_keeps_every_given_character(trained, capsys):
    sample.main(['--out_dir=out-m', '--template=To ___, or ___e', '--hole=2', '--num_samples=4',
                 '--rule=confidence'])
    for text in text_of(capsys)[0]:
        assert re.fullmatch(r'To .., or ..e', text, re.S)
    sample.main(['--out_dir=out-m', '--start=To', '--suffix=be', '--length=12', '--num_samples=1'])
    text, = text_of(capsys)[0]
    assert text.startswith('To') and text.endswith('be') and len(text) == 12


def test_a_prompt_can_come_from_a_file(trained, capsys, mistake):
    (trained / 'p.txt').write_text('Whether')
    sample.main(['--start=FILE:p.txt', '--num_samples=1'])
    assert text_of(capsys)[0][0].startswith('Whether')
    assert 'q.txt' in mistake(sample.main, '--start=FILE:q.txt')


def test_watching_draws_every_canvas_and_the_last_has_no_mask(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    sample.main(['--out_dir=out-m', '--watch', '--steps=4', '--rule=random'])
    frames = capsys.readouterr().out.split('\033[H\033[J')[1:]
    assert len(frames) == 4
    masks = [frame.count('░') for frame in frames]
    assert masks == [12, 8, 4, 0] and all('\033[1;32m' in frame for frame in frames)


def test_watching_prints_a_plain_line_for_every_canvas_where_there_is_no_terminal(trained, capsys):
    sample.main(['--out_dir=out-m', '--steps=4', '--rule=random'])
    texts = capsys.readouterr().out
    sample.main(['--out_dir=out-m', '--steps=4', '--rule=random', '--watch'])
    *lines, rest = capsys.readouterr().out.split('\n', 4)
    assert rest == texts and [line.count('░') for line in lines] == [12, 8, 4, 0]
    assert all(len(line) == 16 and line.isprintable() for line in lines)


def test_the_page_holds_every_canvas_and_loads_nothing(trained, capsys):
    sample.main(['--out_dir=out-m', '--html=s.html', '--steps=4', '--rule=random'])
    page = (trained / 's.html').read_text()
    frames = json.loads(re.search(r'frames = (\[\[\[.*?\]\]\]),', page)[1])
    assert len(frames) == 5 and [sum(i == len(set(TEXT)) for i in f[0]) for f in frames] == [16, 12, 8, 4, 0]
    assert not re.search(r'https?:|src=|@import|<link', page)


@pytest.mark.parametrize('out_dir', ['out-m', 'out-a'])
def test_a_text_ends_behind_its_stop(trained, capsys, out_dir):
    flags = [f'--out_dir={out_dir}', '--length=400', '--num_samples=3', '--seed=5', '--steps=4']
    sample.main(flags)
    whole, _ = text_of(capsys)
    sample.main([*flags, '--stop=e'])
    cut, err = text_of(capsys)
    assert cut == [text[:text.index('e') + 1] for text in whole]
    assert int(re.search(r'(\d+) network calls', err)[1]) < 400


def test_a_text_ends_where_it_starts_to_repeat_itself():
    varied, dull = list(range(30)) * 20, [1, 2] * 300
    assert ends.ending(varied, 0, 99, [], 2.0) == 0
    assert ends.ending(varied + dull[:50], 0, 99, [], 2.0) == 0
    assert ends.ending(varied + dull[:250], 0, 99, [], 2.0) == 850
    assert ends.ending(varied + [99] + dull, 0, 99, [], 2.0) == 0  # what is not written yet does not count


def test_a_text_ends_behind_the_text_of_its_stop_however_it_was_cut_into_tokens():
    from theirs import tokenizer_json
    tokenizer = vocabulary.Tokenizer(dict(kind='json', json=tokenizer_json(), vocab_size=300, end=299))
    V, ids = 300, tokenizer.encode

    def end(row, start, *stops):
        found = [f for stop in stops for f in ends.of(tokenizer, stop)]
        return ends.ending(row, start, V, found, 0.0)
    row = ids('at the') + ids('e end')  # ' the' is one token, so 'the e' and 'thee' begin inside of it
    assert [tokenizer.decode(row[:end(row, 0, stop)]) for stop in ('thee', 'he', 'e e', 'end')] == [
        'at thee', 'at the', 'at thee e', 'at thee end']
    assert end(row, 0, 'then') == 0 and end([*row[:2], V, *row[2:]], 0, 'end') == 0  # not written, so no text
    assert end(row, 3, 'at') == 0 and end(ids('abab'), 2, 'ab') == 4  # in the given text it ends nothing
    assert end(ids('xyz'), 0, 'z', 'y') == 2  # whichever comes first
    assert end([*ids('a'), 299, *ids('b')], 0, '<|endoftext|>') == 2
    assert ends.up_to('say: "Stop. Go', 'Stop', 'say: "St') == 'say: "Stop'
    assert ends.up_to('stop, stop. Go', 'stop', 'stop, stop.') == 'stop, stop. Go'  # the last token: ' Go'
    assert ends.up_to('a...', '.', 'a') == 'a.' and ends.up_to('baaaa', 'aa', 'b') == 'baa'


@pytest.mark.parametrize('flags', [['--cfg=2'], ['--grid=maskgit'], ['--rule=llada', '--part_length=4'],
                                   ['--rule=threshold', '--threshold=0.4'], ['--rule=factor', '--factor=2'],
                                   ['--rule=eb', '--gamma=0.3'], ['--rule=textbook', '--grid=maskgit'],
                                   ['--rule=remdm_loop', '--eta=0.1', '--on=0.7', '--alpha_on=0.8'],
                                   ['--rule=first_hitting'], ['--rule=analytic', '--steps=9']])
def test_every_rule_can_be_asked_for_with_its_knob(trained, capsys, flags):
    sample.main(['--out_dir=out-m', '--start=To', *flags])
    assert all(t.startswith('To') and '░' not in t for t in text_of(capsys)[0])


def test_no_rule_said_and_none_asked_for_is_the_same(trained, capsys):
    texts = []
    for flags in [[], ['--rule=']]:
        sample.main(['--out_dir=out-m', '--steps=4', *flags])
        texts.append(text_of(capsys)[0])
    assert texts[0] == texts[1]


def test_a_template_can_come_from_a_file(trained, capsys):
    (trained / 't.txt').write_text('be ___ to')
    sample.main(['--out_dir=out-m', '--template=FILE:t.txt', '--hole=3'])
    assert all(re.fullmatch('be ... to', text, re.S) for text in text_of(capsys)[0])


def test_no_knob_means_two_things():
    names = lambda config: {f.name for f in dataclasses.fields(config)}
    for objective in common.OBJECTIVES:
        assert not names(train.Config) & names(common.concept(objective).Config)


@pytest.mark.parametrize('flags, words', [
    (['--steps=0'], ['steps=0']),
    (['--rule=confidence', '--gamma=0.5'], ['gamma', 'confidence', 'grid']),
    (['--rule=textbook', '--part_length=4'], ['part_length', 'textbook', 'grid']),
    (['--first=left'], ['first', 'confidence']),
    (['--rule=threshold', '--threshold=2'], ['threshold=2', '[0, 1]']),
    (['--gama=2'], ['--gamma']),
    (['--weights=fast'], ['fast', 'ema, model']),
    (['--cfg=1'], ['cfg', '--start']),
    (['--grid=sine', '--rule=random'], ['sine', 'linear, maskgit']),
    (['--min_entropy=-1'], ['min_entropy']),
    (['--stop=Ω'], ["'Ω'"]),
    (['--temperature=-1'], ['temperature']),
    (['--top_p=0'], ['top_p']),
    (['--step=4'], ['--steps']),
    (['--rule=confidense'], ['confidense', 'confidence']),
    (['--start=' + 'To be' * 4], ['start', '20', '16']),
    (['--start=To', '--length=2'], ['start']),
    (['--start=To', '--suffix=' + 'b' * 14], ['16', '--length']),
    (['--start=Ω'], ["'Ω'"]),
    (['--template=To be'], ['___']),
    (['--template=a___', '--start=To'], ['template']),
    (['--template=a___', '--hole=20'], ['block_size=16']),
    (['--overlap=16'], ['overlap', 'block_size']),
    (['--which=worst'], ['which', 'best']),
    (['--out_dir=nowhere'], ['nowhere', 'train.py']), (['--out_dir=out-no'], ['out-no', 'train.py']),
    (['--out_dir=gpt-3'], ['gpt-3', 'gpt2-xl', 'owner/name']),
])
def test_a_mistake_in_sampling_is_one_line(trained, mistake, flags, words):
    message = mistake(sample.main, '--out_dir=out-m', *flags)
    assert all(word in message for word in words), message


def test_an_autoregressive_model_says_what_it_cannot_do(trained, mistake):
    told = mistake(sample.main, '--out_dir=out-a', '--suffix=be')
    assert 'left to right' in told and 'out-a/best.pt' in told and 'denoisers' in told
    assert 'rule' in mistake(sample.main, '--out_dir=out-a', '--rule=margin')
    assert 'part_length' in mistake(sample.main, '--out_dir=out-a', '--part_length=3')


def test_where_there_is_no_checkpoint_the_command_that_makes_one_is_named(workdir, mistake):
    for script in (sample, evaluation):
        assert 'python train.py' in mistake(script.main, '--out_dir=out-none')


def test_eval_is_reproducible_and_scores_other_texts_and_orders(trained, capsys, mistake):
    rows = []
    (trained / 'other.txt').write_text(TEXT[100:400])
    for flags in ([], [], ['--seed=7'], ['--weights=model'], ['--input=other.txt'],
                  ['--order=left', '--windows=4']):
        evaluation.main(['--out_dir=out-m', *flags])
        rows.append(capsys.readouterr().out.splitlines()[-1])
    assert rows[0] == rows[1] and len(set(rows)) == 5
    assert '| 18 of 16 |' in rows[4] and '| exact, left to right | 4 of 16 |' in rows[5]
    (trained / 'greek.txt').write_text('Ω' * 50)
    assert "'Ω'" in mistake(evaluation.main, '--input=greek.txt')
    assert 'none.txt' in mistake(evaluation.main, '--input=none.txt')
    assert 'order' in mistake(evaluation.main, '--order=right')


def test_the_figure_of_eval_is_the_one_that_training_reported(trained, capsys):
    for out_dir in ('out-m', 'out-a'):
        checkpoint = common.load(f'{out_dir}/last.pt')
        evaluation.main([f'--out_dir={out_dir}', '--windows=8', '--draws=4', '--seed=0', '--which=last'])
        assert f"| {checkpoint['val'][0]:.4f} ±" in capsys.readouterr().out


def test_eval_refuses_a_dataset_that_changed_under_the_checkpoint(trained, mistake):
    meta = json.loads((trained / 'data/tiny/meta.json').read_text())
    (trained / 'data/tiny/meta.json').write_text(json.dumps({**meta, 'sha256': 'another'}))
    assert '--input=FILE' in mistake(evaluation.main, '--out_dir=out-m')


# ---- the knobs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', sorted(ROOT.glob('config/*.py')), ids=lambda p: p.name)
def test_every_config_file_builds_on_all_kinds_of_device(path):
    files, devices, _ = configurator.read([str(path)])
    concept = common.concept(files['objective'])
    for knobs in (files, *(files | own for own in devices.values())):
        configurator.build(knobs, train.Config, concept.Config, windows.Config)


@pytest.mark.parametrize('name, other, own', [
    ('ar', 'mdlm', {'objective'}), ('score', 'mdlm', {'objective'}), ('gpt2_ar', 'gpt2_mdlm', {'objective'}),
    ('block', 'mdlm', {'objective', 'block_length'}), ('d3pm', 'mdlm', {'objective', 'T'}),
    ('sedd', 'mdlm', {'objective'}),
    ('llada', 'mdlm', {'schedule', 't_law', 'loss_weight', 'random_length'})])
def test_runs_that_are_compared_differ_in_what_they_say_alone(name, other, own):
    a, b = (configurator.read([str(ROOT / 'config' / f'train_{n}.py')]) for n in (name, other))
    assert {k for k in a[0].keys() | b[0].keys() if a[0].get(k) != b[0].get(k)} == own | {'out_dir'}
    assert a[1] == b[1]  # their sizes on a CPU


@pytest.mark.parametrize('script', [sample, evaluation])
def test_help_gives_every_knob_a_comment(script, capsys):
    with contextlib.suppress(SystemExit):
        script.main(['--help'])
    lines = capsys.readouterr().out.partition('knobs of')[2].splitlines()
    knobs = [line for line in lines if line.lstrip().startswith('--')]
    assert len(knobs) > 10
    for line in knobs:
        assert re.match(r' +--\w+=\S* +\S', line), line


def test_the_knobs_of_sampling_are_few_and_every_rule_stands_in_the_help_with_its_own(capsys):
    with contextlib.suppress(SystemExit):
        sample.main(['--help'])
    out = capsys.readouterr().out
    mine, rules = out.split('knobs of sample.py:')[1].split('rules of unmask.py')
    assert len(re.findall(r'^  --\w+=', mine, re.M)) == len(dataclasses.fields(sample.Config)) <= 25
    parts = re.split(r'^  (\w+) +.+$', rules.split('\n\n')[0].split('  all of them:')[0], flags=re.M)[1:]
    found = {name: re.findall(r'^      --(\w+)=', own, re.M) for name, own in zip(parts[::2], parts[1::2])}
    knobs = {name: configurator.knobs_of(rule).values() for name, rule in unmask.RULES.items()}
    assert found == {name: [k.name for k in own if not configurator.is_fixed(k)]
                     for name, own in knobs.items()}
    assert found['remdm_loop'] == ['eta', 'on', 'off', 'alpha_on'] and found['eb'][0] == 'gamma'
    for objective in common.OBJECTIVES:
        concept = common.concept(objective)
        for name in concept.RULES:
            assert re.search(rf'^  {name} +\w', out, re.M), name
        for name in configurator.knobs_of(concept.Model.sample):
            assert re.search(rf'^ +--{name}=', out, re.M), name


def test_configs_that_build_on_each_other_fit_on_a_cpu_and_on_a_gpu():
    from configurator import read
    configs = [read([str(ROOT / f'config/{name}.py')])[:2] for name in ('adapt_llama', 'sft_gsm8k')]
    for device in ('cuda', 'cpu'):
        first, second = ({**files, **(cpu if device == 'cpu' else {})} for files, cpu in configs)
        assert second['init_from'] == first['out_dir'] and second['block_size'] <= first['block_size']
