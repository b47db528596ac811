"""The figures of eval.py and of tools/frontier.py against the same figures computed another way."""
import csv
import json
import math
import sys

import pytest
import torch

import common
import eval as evaluation
import masked
import train
from conftest import TEXT, TINY
from text import vocabulary, windows
from text.rows import load_tokens
from theirs import make_folder
from tools import frontier, judge


def rows_of(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    names = [cell.strip() for cell in lines[0].strip('|').split('|')]
    return [dict(zip(names, (cell.strip() for cell in line.strip('|').split('|')))) for line in lines[2:]]


def model_of(out_dir):
    return common.load_model(common.load(f'{out_dir}/best.pt'), torch.device('cpu'))


# ---- likelihood -------------------------------------------------------------------------------------------

def test_bits_per_byte_divide_by_the_bytes_of_the_text_whatever_the_tokenizer(trained, capsys):
    (trained / 'x.txt').write_text(TEXT[:165])  # 10 windows, and 5 characters that are not scored
    evaluation.main(['--out_dir=out-a', '--input=x.txt'])
    row, = rows_of(capsys)
    net, tokenizer = model_of('out-a')
    nats = net.nats(x=torch.tensor(tokenizer.encode(TEXT[:160])).view(10, 16)).sum().item()
    assert abs(float(row['bits/byte'].split()[0]) - nats / math.log(2) / 160) < 1e-4
    assert abs(float(row['nats/token'].split()[0]) - nats / 160) < 1e-4
    word = nats / 160 * 165 / len(TEXT[:165].split())
    assert float(row['perplexity/word'].replace(',', '')) == pytest.approx(math.exp(word), rel=1e-4)


def test_a_byte_model_counts_two_bytes_for_an_umlaut(trained, capsys):
    folder = trained / 'data' / 'bytes'
    folder.mkdir()
    data = ('Bäume ' * 400).encode()
    for split in ('train', 'val'):
        torch.tensor(list(data), dtype=torch.int16).numpy().tofile(folder / f'{split}.bin')
    (folder / 'meta.json').write_text(json.dumps(dict(kind='byte', source='', sha256='')))
    train.main([*TINY, '--out_dir=out-b', '--dataset=bytes', '--objective=ar'])
    capsys.readouterr()
    evaluation.main(['--out_dir=out-b'])
    row, = rows_of(capsys)
    assert row['bits/byte'] == row['bits/token']


def test_another_dataset_and_split_are_scored_in_the_tokens_of_the_model(trained, capsys, mistake):
    folder = trained / 'data' / 'other'
    folder.mkdir()
    text = TEXT[50:210]
    for split in ('val', 'test'):
        torch.tensor(list(text.encode()), dtype=torch.int16).numpy().tofile(folder / f'{split}.bin')
        text = TEXT[300:620]
    (folder / 'meta.json').write_text(json.dumps(dict(kind='byte', source='', sha256='')))
    (trained / 'x.txt').write_text(TEXT[50:210])
    figures = []
    for flags in (['--dataset=other'], ['--input=x.txt'], ['--dataset=other', '--split=test'],
                  ['--dataset=tiny']):
        evaluation.main(['--out_dir=out-m', *flags])
        figures.append(rows_of(capsys)[0]['nats/token'])
    assert figures[0] == figures[1] and len(set(figures)) == 3
    assert 'val, test, train' in mistake(evaluation.main, '--split=dev')
    assert 'none' in mistake(evaluation.main, '--dataset=none')


def test_the_bound_in_any_number_of_steps_can_be_asked_for(trained, capsys, mistake):
    figures = []
    for flags in (['--T=1'], ['--T=4'], ['--T=0'], []):
        evaluation.main(['--out_dir=out-m', *flags, '--windows=8'])
        row, = rows_of(capsys)
        figures.append(float(row['nats/token'].split()[0]))
        assert row['objective'] == 'masked'
    net, tokenizer = model_of('out-m')
    tokens = load_tokens('tiny', 'val', tokenizer.vocab_size, 'cpu')
    x = windows.Rows(tokens, tokenizer, 16).all(8)['x']
    everything = net.masked_nats(x, torch.ones_like(x, dtype=torch.bool)).mean() / 16
    assert figures[0] == pytest.approx(everything.item(), abs=1e-4)  # one step: all tokens out of nothing
    assert figures[2] == figures[3] and len(set(figures)) == 3
    assert 'masked' in mistake(evaluation.main, '--out_dir=out-a', '--T=4')
    train.main([*TINY, '--out_dir=out-m', '--masking=count'])  # how it was trained does not matter
    evaluation.main(['--out_dir=out-m', '--T=4', '--windows=8'])
    train.main([*TINY, '--out_dir=out-c', '--objective=d3pm', '--carry_over=True', '--T=4'])
    capsys.readouterr()
    for flags in (['--T=0'], ['--T=4'], []):  # SUBS in steps, and the same weights in continuous time
        evaluation.main(['--out_dir=out-c', *flags, '--windows=8', '--draws=100'])
        figures.append(float(rows_of(capsys)[0]['nats/token'].split()[0]))
    checkpoint = common.load('out-c/best.pt')
    net = masked.Model(masked.Config(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2,
                                     n_embd=16)).eval()
    net.load_state_dict(checkpoint['ema'])
    torch.manual_seed(0)
    with torch.no_grad():
        assert figures[-3] == pytest.approx(net.nats(x, 100).mean().item() / 16, abs=0.05)
    assert figures[-2] == figures[-1] != figures[-3]
    train.main([*TINY, '--out_dir=out-d', '--objective=d3pm', '--T=4'])
    assert 'T=1000' in mistake(evaluation.main, '--out_dir=out-d', '--T=0')


@pytest.mark.parametrize('flags', [['--objective=d3pm', '--T=8'], ['--objective=sedd'], ['--masking=count'],
                                   ['--objective=block', '--block_length=4'],
                                   ['--schedule=cosine', '--t_law=uniform']])
def test_every_kind_of_model_trains_is_scored_and_writes(workdir, capsys, flags):
    import sample
    train.main([*TINY, '--out_dir=out-x', *flags])
    capsys.readouterr()
    for weights in ('ema', 'model'):
        evaluation.main(['--out_dir=out-x', '--windows=8', f'--weights={weights}'])
        assert rows_of(capsys)[0]['likelihood'] == 'upper bound'
    sample.main(['--out_dir=out-x', '--start=To', '--length=24', '--num_samples=2', '--steps=5'])
    texts = capsys.readouterr().out.rstrip('\n').split('\n' + '-' * 60 + '\n')
    assert len(texts) == 2 and all(t.startswith('To') and '░' not in t for t in texts)


# ---- texts under a judge ----------------------------------------------------------------------------------

def test_counts_of_hand_made_texts_are_right():
    assert judge.unigram_entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert judge.unigram_entropy([7] * 9) == 0
    assert judge.distinct([[1, 2, 1], [1, 2, 3]], 1) == 3 / 6
    assert judge.distinct([[1, 2, 1], [1, 2, 3]], 2) == 3 / 4
    assert judge.repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert judge.repetition([[1, 2]]) == 0  # too short to repeat anything
    known = {'be', 'or', "isn't"}
    assert judge.real_words(["t be or not, tis", "x isn't so y"], known) == pytest.approx(3 / 5)
    assert math.isnan(judge.real_words(['to be or not'], frozenset()))


def test_the_judge_scores_every_text_in_windows_none_dropped(trained):
    net, tokenizer = the_judge = judge.load_judge('out-a', torch.device('cpu'))
    texts = [TEXT[:16], TEXT[20:43], TEXT[5:9], TEXT[100:165]]  # 1 window; 1 and a half; a short one; 5
    figures = judge.judged(the_judge, [(text, False) for text in texts], torch.device('cpu'))
    nats, n = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text))
        for part in ids.split(16):
            nats, n = nats + net.nats(x=part[None]).item(), n + len(part)
    assert n == sum(map(len, texts)) and figures['nats_per_token'] == pytest.approx(nats / n, rel=1e-5)
    assert figures['perplexity'] == pytest.approx(math.exp(nats / n), rel=1e-5)


def test_a_text_is_judged_up_to_and_including_its_first_end_of_text(trained, monkeypatch):
    """With a vocabulary of bytes and one <|endoftext|>, id 256."""
    pieces = [bytes([i]) for i in range(256)] + [b'<|endoftext|>']
    monkeypatch.setattr(vocabulary, 'gpt2_tokens', lambda *_: (pieces, lambda text: list(text.encode()), 256))
    tokenizer = vocabulary.Tokenizer(dict(kind='gpt2'))
    assert judge.until_end([97, 98, 256, 99], tokenizer) == ('ab', True)
    assert judge.until_end([97, 98], tokenizer) == ('ab', False)
    scored = []

    class Net:
        config = masked.Config(vocab_size=257, block_size=8)
        nats = staticmethod(lambda x: scored.extend(x.tolist()) or torch.ones(len(x)))
    figures = judge.judged((Net, tokenizer), [('ab', True), ('ab', False), ('', False)], torch.device('cpu'))
    assert sorted(scored) == [[97, 98], [97, 98, 256]] and figures['nats_per_token'] == pytest.approx(2 / 5)


def test_a_judge_gives_the_validation_text_and_the_model_a_row(trained, capsys):
    for flags in (['--out_dir=out-m'], ['--out_dir=out-m', '--rule=threshold', '--threshold=0.5'],
                  ['--out_dir=out-m', '--length=40', '--overlap=6'], ['--out_dir=out-a']):
        evaluation.main(['--judge=out-a', '--num_samples=5', '--batch=2', '--steps=4', *flags])
        data, model = rows_of(capsys)
        assert data['texts'] == 'validation text' and float(model['network calls']) >= 1
        assert 0 < float(model['unigram entropy']) < math.log(28) and 0 < float(model['distinct-1']) <= 1
    assert float(model['network calls']) == 16  # the twin: one a token
    for overlap, parts in ((0, 4), (2, 3)):  # 16 tokens, then 8 or 14 new ones a part
        evaluation.main(['--judge=out-a', '--out_dir=out-m', '--num_samples=2', '--steps=4', '--rule=random',
                         '--length=40', f'--overlap={overlap}'])
        assert float(rows_of(capsys)[1]['network calls']) == 4 * parts


@pytest.mark.parametrize('script, flags', [(evaluation, ['--steps=4']),
                                           (frontier, ['--rules=random', '--grid_of_steps=4'])])
def test_equal_seeds_give_equal_texts_to_the_judge(trained, capsys, script, flags):
    figures = []
    for seed in (1, 1, 2):
        script.main([*flags, '--out_dir=out-m', '--judge=out-a', '--num_samples=4', f'--seed={seed}'])
        figures.append({k: v for k, v in rows_of(capsys)[1].items() if k != 'tokens/s'})
    assert figures[0] == figures[1] != figures[2]


def test_rows_at_once_bound_the_logits():
    assert common.rows_at_once(128, 65) == 64 and common.rows_at_once(10 ** 6, 10 ** 6) == 1
    assert 1 < common.rows_at_once(1024, 50257) <= 2 ** 28 / (1024 * 50257)


def test_texts_of_a_model_in_other_tokens_are_judged_in_those_of_the_judge(trained):
    the_judge = judge.load_judge('out-a', torch.device('cpu'))
    figures = judge.judged(the_judge, [('be', False), ('to be or not', False)], torch.device('cpu'))
    entropies = [judge.unigram_entropy(list(text)) for text in ('be', 'to be or not')]
    assert figures['unigram_entropy'] == pytest.approx(sum(entropies) / 2)


def test_frontier_has_a_point_for_every_rule_and_number_of_steps_in_the_table_and_the_csv(trained, capsys):
    frontier.main(['--out_dir=out-m', '--judge=out-a', '--num_samples=3', '--csv=f.csv',
                   '--rules=ancestral,confidence,first_hitting,remdm_cap,eb', '--grid_of_steps=2,4'])
    rows = rows_of(capsys)
    with open('f.csv') as f:
        table = list(csv.DictReader(f))
    points = [('ancestral', '2 steps'), ('ancestral', '4 steps'), ('confidence', '2 steps'),
              ('confidence', '4 steps'), ('first_hitting', 'one token a call'), ('remdm_cap', '2 steps'),
              ('remdm_cap', '4 steps')]
    points += [('eb', f'gamma {g}') for g in frontier.SWEEPS['eb'][1]]
    assert [(r['rule'], r['knob']) for r in table] == points
    assert [(r['texts'], r['knob']) for r in rows[1:]] == points
    calls = {(r['rule'], r['knob']): float(r['calls']) for r in table}
    assert calls['confidence', '4 steps'] == 4 and calls['first_hitting', 'one token a call'] == 16
    assert calls['eb', 'gamma 10.0'] <= calls['eb', 'gamma 0.03'] <= 16


def test_the_plot_is_drawn_where_matplotlib_is_and_named_where_it_is_not(trained, monkeypatch, mistake):
    flags = ['--out_dir=out-m', '--judge=out-a', '--num_samples=2', '--rules=random', '--grid_of_steps=2,4',
             '--plot=f.svg']
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'matplotlib', None)
        assert 'pip install matplotlib' in mistake(frontier.main, *flags)  # before any work
    pytest.importorskip('matplotlib')
    frontier.main(flags)
    assert '<svg' in (trained / 'f.svg').read_text()


def test_a_pretrained_gpt2_judges_texts_in_its_own_tokens(trained, capsys):
    """One whose embedding is zero: uniform over its 300 tokens, whatever the text."""
    make_folder(trained / 'gpt-2', 'gpt2')
    from safetensors.torch import load_file, save_file
    tensors = load_file(trained / 'gpt-2' / 'model.safetensors')
    tensors['wte.weight'].zero_()
    save_file(tensors, trained / 'gpt-2' / 'model.safetensors')
    evaluation.main(['--judge=gpt-2', '--out_dir=out-m', '--num_samples=2', '--steps=2'])
    assert rows_of(capsys)[1]['judge, nats/token'] == f'{math.log(300):.3f}'


def test_a_knob_of_rules_goes_to_the_rules_that_have_it(trained, capsys, mistake):
    """remdm_cap has an eta, random has none; top_k is of all."""
    frontier.main(['--out_dir=out-m', '--judge=out-a', '--num_samples=2', '--rules=random,remdm_cap',
                   '--grid_of_steps=4', '--eta=0.3', '--top_k=3'])
    calls = [float(row['network calls']) for row in rows_of(capsys)[1:]]
    assert len(calls) == 2 and calls[0] == 4
    told = mistake(frontier.main, '--out_dir=out-m', '--judge=out-a', '--rules=random,eb', '--eta=0.3')
    assert 'eta' in told


@pytest.mark.parametrize('script, flags, words', [
    (evaluation, ['--mode=gen_ppl'], ['--mode']),
    (evaluation, ['--steps=4'], ['steps', '--judge=out-ar']),
    (evaluation, ['--gamma=4'], ['gamma', '--judge=out-ar']),
    (evaluation, ['--judge=out-a', '--csv=f.csv'], ['csv']),
    (evaluation, ['--judge=out-m'], ['out-m', 'not exact']),
    (evaluation, ['--judge=out-a', '--rule=eb', '--eta=0.5'], ['eta', 'gamma']),
    (evaluation, ['--judge=out-a', '--overlap=16'], ['overlap=16']),
    (evaluation, ['--T=-3'], ['T=-3']),
    (evaluation, ['--draws=0'], ['draws=0']),
    (frontier, [], ['--judge=out-ar']),
    (frontier, ['--judge=out-a', '--rules=confidense'], ['confidense', 'confidence']),
    (frontier, ['--judge=out-a', '--grid_of_steps=8,x'], ['8,x']),
    (frontier, ['--judge=out-a', '--grid=sine'], ['sine', 'maskgit']),
    (frontier, ['--judge=out-a', '--overlap=16'], ['overlap=16']),
    (frontier, ['--judge=out-a', '--out_dir=out-a', '--rules=random'], ['eval.py']),
])
def test_a_mistake_in_evaluation_is_one_line(trained, mistake, script, flags, words):
    message = mistake(script.main, '--out_dir=out-m', *flags)
    assert all(word in message for word in words), message
