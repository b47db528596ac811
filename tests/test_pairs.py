"""Prompts and answers: what is cut, what is scored, what is learned, where a text ends."""
import json
import types

import numpy as np
import pytest
import torch

import ar
import masked
import sample
import train
from conftest import TINY
from data.gsm8k import prepare
from text import rows, vocabulary
from text.pairs import Rows, row_of
from theirs import make_folder
from tools import tasks

SEP, END = [90, 91], 99


@pytest.mark.parametrize('prompt, answer, row, given', [
    ([1, 2], [3], [1, 2, 90, 91, 3, 99, 99, 99], 4),                    # room for all: filled with ends
    ([1, 2], [3, 4, 5], [1, 2, 90, 91, 3, 4, 5, 99], 4),                # just fits
    ([1, 2], [3, 4, 5, 6], [2, 90, 91, 3, 4, 5, 6, 99], 3),             # the prompt loses its head
    ([1, 2], [3, 4, 5, 6, 7], [90, 91, 3, 4, 5, 6, 7, 99], 2),          # as long as can be: no prompt left
    ([1, 2], [3, 4, 5, 6, 7, 8], [90, 91, 3, 4, 5, 6, 7, 8], 2),        # its end does not fit
    ([1, 2], [3, 4, 5, 6, 7, 8, 9], [90, 91, 3, 4, 5, 6, 7, 8], 2),     # too long: no tail and no end
    ([], [3], [90, 91, 3, 99, 99, 99, 99, 99], 2)])
def test_what_does_not_fit_is_cut_at_the_prompts_head_then_at_the_answers_tail(prompt, answer, row, given):
    assert row_of(prompt, answer, 8, SEP, END) == (row, given)


def test_every_pair_is_one_row_of_the_same_length():
    rng = np.random.default_rng(0)
    for _ in range(500):
        prompt, answer = (rng.integers(50, size=rng.integers(12)).tolist() for _ in range(2))
        row, given = row_of(prompt, answer, 10, SEP, END)
        kept = row[:given - 2]
        assert len(row) == 10 and row[given - 2:given] == SEP and kept == prompt[len(prompt) - len(kept):]
        assert row[given:] == (answer + [END] * 10)[:10 - given]


def pairs_of(ids, T=12, sep=SEP, end=END):
    return Rows(ids, types.SimpleNamespace(sep=sep, end=end), T)


def stream(*pairs):
    return torch.tensor([i for pair in pairs for part in pair for i in (*part, END)])


def test_a_stream_falls_into_its_pairs_and_batches_are_a_function_of_the_seed():
    text = stream(([1, 2], [3]), ([], [4, 5, 6]), ([6], [7]))
    pairs = pairs_of(text, 7)
    assert [pairs.pair(i) for i in range(len(pairs))] == [[[1, 2], [3]], [[], [4, 5, 6]], [[6], [7]]]
    assert ', 0 longer' in pairs_of(text, 6).report(1) and ', 2 longer' in pairs_of(text, 5).report(1)
    torch.manual_seed(3)
    x, given = pairs.batch(50)[0].values()
    torch.manual_seed(3)
    again, n = pairs.batch(50)
    assert torch.equal(x, again['x']) and len(x.unique(dim=0)) == 3 and n == (~given).sum()
    assert given.sum(-1).tolist() == [row.index(SEP[1]) + 1 for row in x.tolist()]
    assert len(pairs.all()['x']) == 3 and torch.equal(pairs.all(2)['x'], pairs.all()['x'][[0, 2]])


@pytest.mark.parametrize('ids', [[1, END, 2], [1, END], [1, 2], [1, END, 2, END, 3, END]])
def test_a_stream_that_is_no_pairs_is_refused(ids, mistake):
    assert 'prepare it again' in mistake(lambda argv: pairs_of(torch.tensor(ids)))


@pytest.mark.parametrize('shift', [False, True])
def test_given_tokens_are_never_masked_nor_scored_and_the_others_always_may_be(shift):
    torch.manual_seed(0)
    net = masked.Model(masked.Config(7, block_size=8, n_layer=1, n_head=2, n_embd=16, shift=shift))
    torch.nn.init.normal_(net.gpt.head.weight)
    x, given = torch.randint(7, (64, 8)), (torch.arange(8) < 3).expand(64, 8)
    asked, own = [], net.network
    net.network = lambda xt, *more: asked.append(xt) or own(xt, *more)
    net(x, given=given)
    net.nats(x, 2, given=given)
    assert all((xt[:, :3] == x[:, :3]).all() for xt in asked)
    assert all((torch.cat(asked)[:, i] == 7).any() for i in range(3, 8))


def test_the_bound_given_a_prompt_is_that_of_the_conditional_distribution(joint):
    """With exact conditionals it is -log p(rest | prompt), whatever the draws, if one token is left; and in
    the mean over all noise, if two are."""
    net = masked.Model(masked.Config(vocab_size=3, block_size=3, n_layer=1, n_head=1, n_embd=4)).double()
    net.network = lambda xt, *more: joint.logp(xt)
    x = joint.x
    for n in (2, 1):
        given = (torch.arange(3) < n).expand(len(x), 3)
        same = (x[:, None, :n] == x[None, :, :n]).all(-1)
        want = -(joint.p / (same * joint.p).sum(-1)).log()
        torch.manual_seed(0)
        many = 200 if n == 1 else 1
        found = net.nats(x.repeat(many, 1), 20, given=given.repeat(many, 1)).view(many, -1).mean(0)
        assert torch.allclose(found.double(), want, atol=1e-6 if n == 2 else 0.05)


def test_the_twin_scores_the_answer_given_the_prompt():
    net = ar.Model(ar.Config(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=16))
    torch.nn.init.normal_(net.gpt.head.weight)
    x = torch.randint(7, (3, 8))
    given = (torch.arange(8) < 3).expand(3, 8)
    logp = net.logits(x).log_softmax(-1).gather(-1, x[..., None])[..., 0]
    assert torch.allclose(net.nats(x, given=given), -logp[:, 3:].sum(-1), atol=1e-5)
    assert torch.allclose(net(x, given=given)[0], -logp[:, 3:].mean(), atol=1e-5)


# ---- the dataset and the scripts --------------------------------------------------------------------------

PAIRS = [dict(question=f'What is {a} and {b}?', answer=f'It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}')
         for a in range(8) for b in range(5)]
LOOP = [a for a in TINY if not a.startswith(('--n_', '--dataset', '--block'))]
LOOP += ['--dataset=gsm8k', '--muon_lr=0']


@pytest.fixture
def sums(workdir):
    """data/gsm8k in the tokens of the folder `theirs`."""
    make_folder(workdir / 'theirs', 'llama', max_position_embeddings=64)
    (workdir / 'train.jsonl').write_text('\n'.join(map(json.dumps, PAIRS)))
    (workdir / 'test.jsonl').write_text('\n'.join(map(json.dumps, PAIRS[:5])))
    prepare.main(['--train=train.jsonl', '--test=test.jsonl', '--tokenizer=theirs', '--out=data/gsm8k'])
    return workdir


def test_the_preparer_writes_pairs_without_the_calculator(sums):
    meta = rows.load_meta('gsm8k')
    tokenizer = vocabulary.Tokenizer(meta)
    tokens = rows.load_tokens('gsm8k', 'test', 300, 'cpu')
    pairs = Rows(tokens, tokenizer, 48)
    prompt, answer = map(tokenizer.decode, pairs.pair(1))
    assert (prompt, answer) == ('Q: What is 0 and 1?', ' It is 1.\n#### 1') and len(pairs) == 5
    assert tokenizer.decode(tokenizer.sep) == '\nA:'
    splits = [rows.load_tokens('gsm8k', split, 300, 'cpu').long() for split in ('train', 'val')]
    assert [len(Rows(ids, tokenizer, 48)) for ids in splits] == [38, 2]


@pytest.mark.parametrize('knobs', [['--objective=masked', '--shift=True', '--lora_rank=2'],
                                   ['--objective=masked'], ['--objective=ar', '--lora_rank=2']])
def test_fine_tuning_learns_answers_and_sample_answers_and_stops(sums, capsys, knobs):
    train.main([*LOOP, '--init_from=theirs', '--out_dir=out-sft', '--block_size=48', *knobs, '--lr=0.02',
                '--max_iters=30', '--eval_interval=10', '--batch_size=8', '--ema_decay=0.5'])
    out = capsys.readouterr().out
    losses = [float(line.split('loss ')[1].split(',')[0]) for line in out.splitlines() if 'loss ' in line]
    assert losses[-1] < losses[0] - 0.4, losses
    sample.main(['--out_dir=out-sft', '--start=Q: What is 1 and 2?', '--num_samples=1', '--temperature=0'])
    text = capsys.readouterr().out
    assert text.startswith('Q: What is 1 and 2?\nA:') and text.count('<|endoftext|>') <= 1
    import eval as evaluation
    evaluation.main(['--out_dir=out-sft', '--split=test'])
    row = capsys.readouterr().out.splitlines()[-1]
    assert '5 of 48' in row
    if 'ar' in knobs[0]:  # the base on the same answers, and the fine-tuned one on a plain text
        evaluation.main(['--out_dir=theirs', '--dataset=gsm8k', '--split=test', '--block_size=48'])
        base = capsys.readouterr().out.splitlines()[-1]
        assert '5 of 48' in base
        nats = lambda row: float(row.split('|')[4].split('±')[0])
        assert nats(base) > nats(row) + 0.3
    evaluation.main(['--out_dir=out-sft', '--input=train.jsonl', '--windows=3'])
    assert '3 of 48' in capsys.readouterr().out
    tasks.main(['--out_dir=out-sft', '--task=gsm8k', '--data=test.jsonl', '--items=2', '--steps=4'])
    assert 'accuracy' in capsys.readouterr().out


def test_only_the_calculator_is_taken_out_of_an_answer():
    read = lambda answer: prepare.read_pairs(json.dumps(dict(question='q' * 100, answer=answer)).encode()
                                             + b'\n{"question": "q", "answer": "a"}', 'f')
    assert read('cin>>a; cout<<a; cin>>b;')[0][1] == ' cin>>a; cout<<a; cin>>b;'
    assert read('<<1+1=2>>2')[0][1] == ' 2'


def test_other_fields_and_other_marks_make_other_pairs(workdir, capsys):
    make_folder(workdir / 'theirs', 'gpt2')
    (workdir / 'mine.jsonl').write_text('\n'.join(json.dumps(dict(a=f'in {i}', b='out')) for i in range(9)))
    prepare.main(['--train=mine.jsonl', '--prompt=a', '--answer=b', '--before=', '--sep= ->',
                  '--tokenizer=theirs', '--out=data/gsm8k'])
    tokenizer = vocabulary.Tokenizer(rows.load_meta('gsm8k'))
    pairs = Rows(rows.load_tokens('gsm8k', 'train', 300, 'cpu'), tokenizer, 14)
    assert tokenizer.decode(pairs.rows([3])['x'][0].tolist()).startswith('in 3 -> out<|endoftext|>')


@pytest.mark.parametrize('text, flags, words', [
    ('{"question": "a"}\n' * 9, [], ['line 1', "'answer'"]),
    ('{"question": "a", "answer": "b"}\nno json\n' * 20, [], ['line 2', "'answer'"]),
    ('{"question": "a", "answer": " "}\n' * 9, [], ['line 1', "'answer'"]),
    ('{"question": "a", "answer": 3}\n' * 9, [], ['line 1', "'question'"]),
    (json.dumps(dict(question='a' * 80, answer='b')), [], ['1 pairs', 'too few']),
    ('', ['--train=nowhere.jsonl'], ['nowhere.jsonl']),
    ('{"question": "a", "answer": "b"}\n' * 9, ['--tokenizer=byte'], ['byte', 'end']),
    ('', ['--sep='], ['sep']), ('{"question": "a", "answer": "b"}\n' * 9, ['--test=nowhere'], ['nowhere'])])
def test_files_that_are_no_pairs_are_refused_by_line(workdir, mistake, text, flags, words):
    make_folder(workdir / 'theirs', 'gpt2')
    (workdir / 'mine.jsonl').write_text(text)
    err = mistake(prepare.main, '--train=mine.jsonl', '--tokenizer=theirs', '--out=data/gsm8k', *flags)
    assert all(word in err for word in words), err
    assert not (workdir / 'data/gsm8k/meta.json').exists()


def test_pairs_are_refused_where_they_make_no_sense(sums, mistake):
    base = [*LOOP, '--init_from=theirs', '--out_dir=out-x']
    assert 'block takes no pairs' in mistake(train.main, *base, '--objective=block')
    assert 'no room for an answer' in mistake(train.main, *base, '--objective=masked', '--block_size=3')
    assert 'packed' in mistake(train.main, *base, '--objective=masked', '--packed=False')
    err = mistake(tasks.main, '--task=gsm8k', '--out_dir=theirs', '--data=test.jsonl')
    assert 'fine-tuned on pairs' in err
