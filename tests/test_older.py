"""Checkpoints of earlier versions: the names that their files have, written down by hand."""
import dataclasses

import pytest
import torch

import common
import train
from conftest import TINY
from hub import find, older

OLD_MASKED = dict(parameterization='subs', T=0, copy_weight=0.1, bell_center=-0.5, bell_width=0.4,
                  random_length=0.25)
NEW = ('.taps', '.gate.weight', '.mix')  # of blocks
OLD_RUN = dict(base='', packed=False, inserted=0.0, expanded=True, slow_decay=0.0)


def made_older(path, objective, config, run=None, gone=(), renamed=None):
    """Rewrite a checkpoint of today as an earlier version would have written it."""
    checkpoint = common.load(path)
    del checkpoint['rows']
    checkpoint['objective'] = objective
    checkpoint['config'] = {k: v for k, v in checkpoint['config'].items() if k not in gone} | config
    checkpoint['run'] |= OLD_RUN | (run or {})
    checkpoint['run']['objective'] = objective
    for which in ('model', 'ema'):
        checkpoint[which] = {(renamed or {}).get(name, name): t for name, t in checkpoint[which].items()}
    torch.save(checkpoint, path)
    return checkpoint


@pytest.mark.parametrize('today, knobs, old, gone', [
    ('masked', [], {}, ()), ('sedd', [], dict(parameterization='sedd'), ()),
    ('d3pm', ['--T=7'], dict(parameterization='d3pm', T=7), ('carry_over',)),
    ('d3pm', ['--T=7', '--carry_over=True'], dict(T=7), ('carry_over',))])
def test_a_masked_checkpoint_of_an_earlier_version_is_read_and_resumed(
        workdir, capsys, today, knobs, old, gone):
    import eval as evaluation
    train.main([*TINY, f'--objective={today}', *knobs])
    evaluation.main(['--out_dir=out'])
    before = capsys.readouterr().out.splitlines()[-1]
    for name in ('best', 'last'):
        made_older(f'out/{name}.pt', 'masked', OLD_MASKED | old, gone=gone)
    evaluation.main(['--out_dir=out'])
    assert capsys.readouterr().out.splitlines()[-1] == before
    train.main(['--init_from=resume', '--max_iters=6', '--device=cpu'])
    after = common.load('out/last.pt')
    assert after['iter'] == 6 and after['objective'] == today and after['rows'] == dict(random_length=0.25)


def test_what_an_earlier_version_called_otherwise_is_renamed():
    weights = {'told': 1, 'steps': 2, 'vae.told': 3, 'vae.steps': 4, 'w_e.weight': 5}
    assert older.renamed(weights) == {'noise_embedding': 1, 'vae.noise_embedding': 3, 'w_e.weight': 5}
    old = dict(objective='score', config=dict(given=0.2, n_head=1), run=dict(OLD_RUN, lr=1), model={}, ema={},
               tokenizer=dict(kind='bpe'))
    new = older.upgraded(old)
    assert new['config'] == dict(given_share=0.2, n_head=1) and new['run'] == dict(lr=1, objective='score')
    assert new['rows'] == dict(packed=False, expanded=True) and old['config'] == dict(given=0.2, n_head=1)
    old['tokenizer'] = dict(kind='json', sep=' A:')
    assert older.upgraded(old)['rows'] == {}


def test_a_checkpoint_of_today_is_left_as_it_is(after):
    after(TINY)
    checkpoint = common.load('out/last.pt')
    same = older.upgraded(checkpoint)
    assert same.keys() == checkpoint.keys() and same['run'] == checkpoint['run']
    for which in ('model', 'ema'):
        assert same[which].keys() == checkpoint[which].keys()
        assert all(same[which][name] is t for name, t in checkpoint[which].items())
    assert find.find('out')[1]['config'] == dataclasses.asdict(common.load_model(checkpoint, 'cpu')[0].config)


@pytest.mark.parametrize('knobs', [[], ['--init_from=out', '--lora_rank=2']])
def test_a_network_without_convolutions_gates_and_first_values_gets_some_that_change_nothing(knobs, after):
    runs = [[*TINY, '--objective=ar'], [*TINY, '--objective=ar', '--out_dir=out-2', *knobs]]
    path = after(*runs[:1 + bool(knobs)]) / ('out-2' if knobs else 'out') / 'last.pt'
    checkpoint = common.load(path)
    x = torch.arange(8)[None] % checkpoint['config']['vocab_size']
    for weights in (checkpoint['model'], checkpoint['ema']):
        for name in [name for name in weights if name.endswith(NEW)]:
            weights[name].zero_()
    zeroed, _ = common.load_model(checkpoint, 'cpu')
    checkpoint |= {which: {name: t for name, t in checkpoint[which].items() if not name.endswith(NEW)}
                   for which in ('model', 'ema')}
    old, _ = common.load_model(older.upgraded(checkpoint), 'cpu')
    assert torch.equal(old.nats(x), zeroed.nats(x))


def test_networks_of_gpt2_and_llama_get_none():
    weights = {'gpt.blocks.0.attn.qkv.weight': torch.zeros(2, 2), 'gpt.blocks.0.norm1.weight': torch.ones(2)}
    assert older.completed(weights, {}) == weights
