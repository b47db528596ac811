"""Several texts in a row: nothing is lost, and no text sees another."""
import re

import numpy as np
import pytest
import torch

import ar
import common
import masked
import model
import d3pm
import score
import train
from conftest import TINY
from data.lines import prepare
from text import packing, rows, vocabulary

SIZES = dict(vocab_size=7, block_size=12, n_layer=2, n_head=2, n_embd=16)


def random_weights(net):
    torch.manual_seed(0)
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def logits_of(objective, x, segment=None):
    """What a network of random weights predicts for the clean text x (B, T), of an objective."""
    if objective == 'ar':
        return random_weights(ar.Model(ar.Config(**SIZES))).logits(x, segment)
    if objective == 'masked':
        return random_weights(masked.Model(masked.Config(**SIZES))).network(x, None, segment)
    net = random_weights(score.Model(score.Config(**SIZES)))
    E = score.on_sphere(net.embed.weight)
    return net.logits(E[x], torch.ones(x.shape) + x % 3, E, None, segment)[0]


@pytest.mark.parametrize('arch', ['ours', 'gpt2'])
@pytest.mark.parametrize('objective', ['ar', 'masked', 'score'])
def test_packed_texts_get_the_logits_they_get_alone(objective, arch, monkeypatch):
    """Two of the texts have equal lengths, which a mask by length would let see each other."""
    monkeypatch.setitem(SIZES, 'arch', arch)
    texts = [np.array(t) for t in ([1, 2, 3, 4], [6, 5, 4, 2], [0, 3], [5])]
    x, segment = packing.fill(texts, [[0, 2, 3], [1]], 12, pad=2)
    packed = logits_of(objective, x, segment)
    for row, begin, text in ((0, 0, texts[0]), (0, 4, texts[2]), (0, 6, texts[3]), (1, 0, texts[1])):
        alone = logits_of(objective, torch.tensor(text)[None])[0]
        assert torch.allclose(packed[row, begin:begin + len(text)], alone, atol=1e-5)


@pytest.mark.parametrize('objective', ['ar', 'masked', 'score'])
def test_what_another_text_says_changes_nothing(objective):
    segment = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, -1, -1]])
    x = torch.randint(7, (1, 10), generator=torch.Generator().manual_seed(0))
    other = torch.where(segment == 1, (x + 1) % 7, x)
    one, two = logits_of(objective, x, segment), logits_of(objective, other, segment)
    kept = (segment != 1) & (segment >= 0)
    assert torch.equal(one[kept], two[kept]) and not torch.allclose(one[segment == 1], two[segment == 1])


def test_a_token_sees_its_own_text_and_nothing_else():
    segment = torch.tensor([[0, 0, 1, 1, 2, -1]])
    expected = torch.block_diag(*(torch.ones(n, n) for n in (2, 2, 1, 1))).bool()
    assert torch.equal(packing.same_text(segment)[0, 0], expected)
    assert packing.positions(segment).tolist() == [[0, 1, 0, 1, 0, 0]]
    assert packing.starts(segment).tolist() == [[True, False, True, False, True, True]]
    assert packing.starts(torch.tensor([[-1, -1]])).tolist() == [[True, False]]


def test_the_likelihood_of_packed_texts_is_the_sum_of_theirs_and_padding_is_outside():
    net = random_weights(ar.Model(ar.Config(**SIZES)))
    texts = [np.array(t) for t in ([1, 2, 3, 4], [6, 5, 4, 2], [0, 3])]
    x, segment = packing.fill(texts, [[0, 1, 2]], 12, pad=2)
    alone = sum(net.nats(torch.tensor(t)[None]) for t in texts)
    assert torch.allclose(net.nats(x, segment=segment), alone, atol=1e-4)
    assert torch.allclose(net(x, segment)[0], alone / 10, atol=1e-5)
    x[:, 10:] = 5  # whatever stands where nothing is
    assert torch.allclose(net.nats(x, segment=segment), alone, atol=1e-4)


@pytest.mark.parametrize('concept, knobs', [(masked, {}), (masked, dict(masking='count')),
                                            (d3pm, dict(T=4, carry_over=True)), (d3pm, dict(T=4))], ids=str)
def test_the_bound_of_uniform_predictions_is_log_V_for_every_token_of_text(concept, knobs):
    """Exact in the mean; 5 standard errors over 400 rows, the seed is fixed."""
    torch.manual_seed(0)
    net = concept.Model(concept.Config(**SIZES, **knobs, loss_weight='elbo', t_law='uniform'))
    texts = [np.zeros(n, int) for n in (4, 3, 2)]
    x, segment = (t.expand(400, 12) for t in packing.fill(texts, [[0, 1, 2]], 12, pad=2))
    V = net.gpt.outputs
    bound = net.nats(x, n=4, segment=segment)
    loss = torch.stack([net(x, segment)[0].detach() for _ in range(50)])
    if V == 8:  # [MASK] has probability 1/8: D3PM pays for it, at every token of text and at no other
        whole = torch.zeros(400, 9, dtype=torch.long)
        alone, alone_loss = net.nats(whole, 4), torch.stack([net(whole)[0].detach() for _ in range(50)])
        error = (bound.var() + alone.var()) ** 0.5 / 20
        assert abs(bound.mean() - alone.mean()) < 5 * error and bound.mean() > 9 * np.log(7)
        assert abs(loss.mean() - alone_loss.mean()) < 5 * (loss.var() + alone_loss.var()) ** 0.5 / 50 ** 0.5
    else:
        assert abs(bound.mean() - 9 * np.log(7)) < 5 * bound.std() / 20 + 1e-3
        assert abs(loss.mean() - np.log(7)) < 5 * loss.std() / 50 ** 0.5 + 1e-3


@pytest.mark.parametrize('objective, knobs', [(ar, {}), (masked, {}), (masked, dict(masking='count')),
                                              (score, {})])
def test_rows_of_nothing_but_padding_cost_nothing(objective, knobs):
    net = objective.Model(objective.Config(**SIZES, **knobs))
    x, segment = torch.zeros(2, 12, dtype=torch.long), torch.full((2, 12), -1)
    loss, metrics = net(x, segment=segment)
    assert loss == 0 and all(m.isfinite() for m in metrics.values())
    assert torch.equal(net.nats(x, n=2, segment=segment), torch.zeros(2))


# ---- bins -------------------------------------------------------------------------------------------------

def naive(lengths, capacity):
    """First-fit decreasing, by the book."""
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for members in bins:
            if sum(lengths[j] for j in members) + lengths[i] <= capacity:
                members.append(i)
                break
        else:
            bins.append([i])
    return bins


@pytest.mark.parametrize('seed', range(5))
def test_bins_are_those_of_first_fit_decreasing_and_hold_everything_once(seed):
    lengths = np.random.default_rng(seed).integers(1, 30, size=60).tolist()
    bins = packing.first_fit_decreasing(lengths, 30)
    assert bins == naive(lengths, 30) and sorted(sum(bins, [])) == list(range(60))
    assert packing.first_fit_decreasing([], 5) == []
    with pytest.raises(ValueError, match='31'):
        packing.first_fit_decreasing([31], 30)


def stream(lengths, seed=0):
    """Lines 0 ... 1 of the lengths, as load_tokens gives them; 0 is bos, 1 eos, 2 pad."""
    rng = np.random.default_rng(seed)
    lines = [[0, *rng.integers(4, 50, size=n - 2), 1] for n in lengths]
    return torch.from_numpy(np.array(sum(lines, []), np.uint16).view(np.int16)), lines


def lines_of(tokens, T, **knobs):
    return packing.Rows(tokens, None, T, **knobs)


def rows_to_texts(x, segment):
    """The lines in a batch, one by one."""
    return [x[r][segment[r] == i].tolist() for r in range(len(x)) for i in range(int(segment[r].max()) + 1)]


@pytest.mark.parametrize('packed', [True, False])
def test_all_lines_come_once_in_evaluation_and_none_that_is_not_there(packed):
    lengths = np.random.default_rng(1).integers(2, 20, size=101)
    tokens, lines = stream(lengths)
    found = lines_of(tokens, 24, packed=packed)
    x, segment = found.all().values()
    assert len(found) == 101 and sorted(rows_to_texts(x, segment)) == sorted(lines)
    assert (x[segment < 0] == 2).all() and (len(x) == 101) != packed
    assert len(rows_to_texts(**found.all(10))) == 10


def test_a_batch_is_full_of_random_lines_and_a_function_of_the_seed():
    tokens, lines = stream(np.random.default_rng(1).integers(2, 20, size=101))
    found = lines_of(tokens, 24)
    seen, shares = set(), []
    for seed in range(60):
        common.seed_everything(seed)
        batch, count = found.batch(8)
        x, segment = batch.values()
        assert count == (segment >= 0).sum()
        texts = rows_to_texts(x, segment)
        assert x.shape == segment.shape == (8, 24) and all(t in lines for t in texts)
        seen |= set(map(tuple, texts))
        shares.append(packing.efficiency(segment))
    assert seen == set(map(tuple, lines)) and np.mean(shares) > 0.9
    common.seed_everything(59)
    assert torch.equal(found.batch(8)[0]['x'], x)
    common.seed_everything(59)
    alone = lines_of(tokens, 24, packed=False).batch(8)[0]['segment']
    assert (alone.max(-1).values == 0).all() and packing.efficiency(alone) < 0.7


def test_long_lines_are_cut_anywhere_and_short_ones_may_grow_by_pads_that_are_text():
    tokens, lines = stream([40, 40])
    found = lines_of(tokens, 24)
    cuts = set()
    for s in range(50):
        common.seed_everything(s)
        cuts |= set(map(tuple, rows_to_texts(**found.batch(2)[0])))
    whole = [tuple(line[i:i + 24]) for line in lines for i in range(17)]
    assert len(cuts) > 20 and cuts <= set(whole)
    tokens, lines = stream([6] * 4)
    lengths = set()
    for s in range(200):
        common.seed_everything(s)
        for text in rows_to_texts(**lines_of(tokens, 10, packed=False, expanded=True).batch(4)[0]):
            assert text[:6] in lines and set(text[6:]) <= {2}
            lengths.add(len(text))
    assert lengths == {6, 7, 8, 9, 10}


# ---- the scripts ------------------------------------------------------------------------------------------

@pytest.fixture
def lines(workdir):
    """The tiny text as a dataset of lines, data/lines."""
    text = ''.join(f"line {i % 7} of {'many ' * (i % 3)}lines\n" for i in range(200))
    (workdir / 'corpus.txt').write_text(text)
    prepare.main(['--input=corpus.txt', '--vocab_size=40', '--out=data/lines'])
    return workdir


@pytest.mark.parametrize('objective', ['ar', 'masked', 'score'])
@pytest.mark.parametrize('flags', [[], ['--packed=False', '--expanded=True']], ids=str)
def test_lines_are_trained_sampled_and_scored(lines, capsys, objective, flags):
    import eval as evaluation
    import sample
    train.main([*TINY, '--dataset=lines', '--out_dir=out', f'--objective={objective}', *flags])
    out = capsys.readouterr().out
    assert 'slots hold text' in out and 'validation' in out
    sample.main(['--out_dir=out', '--steps=4', '--num_samples=3', '--start=line'])
    text = capsys.readouterr().out
    assert text.count('line') >= 3 and '░' not in text
    evaluation.main(['--out_dir=out', '--draws=2'])
    assert f'| {objective} |' in capsys.readouterr().out


def test_given_text_and_ends_of_lines(lines, capsys, mistake):
    import eval as evaluation
    import sample
    train.main([*TINY, '--dataset=lines', '--out_dir=out', '--max_iters=30', '--lr=0.01'])
    capsys.readouterr()
    sample.main(['--out_dir=out', '--start=line 1', '--suffix=lines', '--num_samples=4'])
    texts = capsys.readouterr().out.rstrip('\n').split('\n' + '-' * 60 + '\n')
    assert all(t.startswith('line 1') and t.endswith('lines') for t in texts)  # no <eos> between ends it
    sample.main(['--out_dir=out', '--start=line', '--num_samples=6', '--temperature=1'])
    texts = capsys.readouterr().out.split('-' * 60 + '\n')
    assert all(t.rstrip('\n').count('\n') == 0 for t in texts)  # behind <eos> is nothing
    (lines / 'starts.txt').write_text('line 1\nline 2 of\n')
    sample.main(['--out_dir=out', '--start=FILE:starts.txt', '--num_samples=1'])
    one, two = capsys.readouterr().out.split('-' * 60 + '\n')
    assert one.startswith('line 1') and two.startswith('line 2 of')
    assert "'@'" in mistake(sample.main, '--out_dir=out', '--start=l@ne')
    assert 'left' in mistake(evaluation.main, '--out_dir=out', '--order=left')


def test_texts_to_be_judged_begin_with_bos(lines, monkeypatch, capsys):
    import eval as evaluation
    train.main([*TINY, '--dataset=lines', '--out_dir=m', '--max_iters=2'])
    train.main([*TINY, '--dataset=lines', '--out_dir=a', '--max_iters=2', '--objective=ar'])
    own, seen, V = masked.Model.sample, [], vocabulary.Tokenizer(rows.load_meta('lines')).vocab_size
    monkeypatch.setattr(masked.Model, 'sample', lambda net, xt, **how: seen.append(xt) or own(net, xt, **how))
    evaluation.main(['--out_dir=m', '--judge=a', '--num_samples=3', '--steps=2'])
    assert (seen[0][:, 0] == vocabulary.BOS).all() and (seen[0][:, 1:] == V).all()


def test_rows_of_equal_nats_per_token_leave_no_error_whatever_their_lengths():
    segment = torch.tensor([[0, 0, 0, 0], [0, 0, -1, -1], [0, 1, 1, -1]])
    nats = lambda x, segment: 1.5 * (segment >= 0).sum(-1)
    batch = dict(x=torch.zeros(3, 4, dtype=torch.long), segment=segment)
    mean, error = common.evaluate(nats, batch, segment >= 0, 2)
    assert mean == 1.5 and error < 1e-12
    counts = (segment >= 0).sum(-1).double()
    values, ratios = counts * 1.5 + torch.tensor([0.5, -0.1, 0.2]), []
    for left_out in range(3):  # the jackknife's error, which agrees to the first order
        kept = [i for i in range(3) if i != left_out]
        ratios.append(values[kept].sum() / counts[kept].sum())
    ratios, parts = torch.stack(ratios), iter(values.split(2))
    _, error = common.evaluate(lambda **part: next(parts), batch, segment >= 0, 2)
    assert abs(error / (2 / 3 * ((ratios - ratios.mean()) ** 2).sum()).sqrt() - 1) < 0.35


def test_a_judge_of_lines_reads_from_bos_and_lines_are_resumed_bit_for_bit(lines, capsys):
    import eval as evaluation
    flags = [*TINY, '--dataset=lines', '--objective=ar']
    train.main([*flags, '--out_dir=whole', '--max_iters=40', '--lr=0.01'])
    train.main([*flags, '--out_dir=half', '--max_iters=20', '--lr=0.01', '--cooldown=0'])
    train.main([*flags, '--out_dir=all', '--max_iters=40', '--lr=0.01', '--cooldown=0'])
    train.main(['--init_from=resume', '--out_dir=half', '--max_iters=40'])
    a, b = common.load('half/last.pt'), common.load('all/last.pt')
    assert a['tokens'] == b['tokens'] and all(torch.equal(a['model'][k], b['model'][k]) for k in a['model'])
    capsys.readouterr()
    evaluation.main(['--out_dir=whole', '--judge=whole', '--num_samples=8'])
    table = [line.split('|') for line in capsys.readouterr().out.splitlines()[2:]]
    judge, tokenizer = common.load_model(common.load('whole/last.pt'), torch.device('cpu'))
    tokens = rows.load_tokens('lines', 'val', tokenizer.vocab_size, 'cpu')
    x, segment = lines_of(tokens, 16, packed=False).all(8).values()
    with torch.no_grad():
        logits = judge.logits(x, segment)
        nats = ar.token_nats(logits, x) * (segment >= 0)
    ours = float(table[0][5])
    assert abs(ours - (nats.sum() / ((segment >= 0).sum() - 8)).item()) < 2e-3, table[0]


def test_packing_is_reported_and_an_objective_that_takes_no_lines_says_so(lines, capsys, mistake):
    assert 'block' in mistake(train.main, *TINY, '--dataset=lines', '--objective=block')
    assert 'packed' in mistake(train.main, *TINY, '--packed=False')
    np.array([5, 6, 7] * 20, np.uint16).tofile(lines / 'data/lines/train.bin')
    assert 'prepare' in mistake(train.main, *TINY, '--dataset=lines')
    prepare.main(['--input=corpus.txt', '--vocab_size=40', '--out=data/lines'])
    assert 'expanded' in mistake(train.main, *TINY, '--expanded=True')
    capsys.readouterr()
    train.main([*TINY, '--dataset=lines', '--block_size=64', '--max_iters=2'])
    told = capsys.readouterr().out
    packed, alone = map(float, re.search(r'([\d.]+)% packed, ([\d.]+)% with', told).groups())
    assert 95 < packed <= 100 and 10 < alone < 60


def test_positions_of_every_row_may_differ():
    torch.manual_seed(0)
    gpt = random_weights(model.GPT(model.Config(**SIZES), causal=False))
    h, where = torch.randn(2, 5, 16), torch.tensor([[0, 1, 2, 3, 4], [3, 1, 0, 2, 7]])
    both = gpt.trunk(h, where=where)
    for row in range(2):
        assert torch.allclose(both[row], gpt.trunk(h[row:row + 1], where=where[row])[0], atol=1e-5)


def test_a_model_of_lines_scores_another_text_line_by_line(lines, capsys):
    import eval as evaluation
    train.main([*TINY, '--dataset=lines', '--out_dir=a', '--max_iters=2', '--objective=ar'])
    text = vocabulary.Tokenizer(rows.load_meta('lines')).decode(
        vocabulary.as_ids(rows.load_tokens('lines', 'val', 2 ** 16, 'cpu')).tolist())
    (lines / 'val.txt').write_text(text)
    capsys.readouterr()
    found = []
    for flags in ([], ['--input=val.txt']):
        evaluation.main(['--out_dir=a', *flags])
        found.append(capsys.readouterr().out.splitlines()[-1])
    assert found[0] == found[1]
