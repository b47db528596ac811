"""Published diffusion models: each layout is read, and says what the published code said of the same weights.

tests/published.json holds the numbers of the published code, run once; see NOTES.md, 2026-11-27."""
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import common
import model
from hub import families, find, folder
from published import CONFIG, MASK, make, numbers

safetensors = pytest.importorskip('safetensors.torch')
DENOISERS = [name for name in CONFIG if name not in ('duo', 'qwen2', 'qwen3')]
MASKED = [name for name in DENOISERS if name not in ('sedd', 'bd3lm', 'a2d-qwen3-bd3lm')]


@pytest.fixture(autouse=True)
def small_ids(monkeypatch):
    """The ids that config.json does not say are beyond a tiny vocabulary."""
    monkeypatch.setattr(families, 'DIFFULLAMA', replace(families.DIFFULLAMA, mask=8))
    monkeypatch.setattr(families, 'A2D_BLOCKS', dict(block_length=4))


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """(a tiny model of this family in float32, its checkpoint)."""
    def open_(name, **changes):
        if name == 'diffugpt-s':
            monkeypatch.setattr(families, 'DIFFUGPT', replace(families.DIFFUGPT, mask=10))
        make(tmp_path / name, name, **changes)
        checkpoint = find.find(str(tmp_path / name))[1]
        return common.load_model(checkpoint, torch.device('cpu'), dtype='float32')[0], checkpoint
    return open_


def case(name, net):
    """(x, xt with our id of [MASK], masked places, what the published code said)."""
    want = numbers()[name]
    x = torch.tensor(want['x'])[None]
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, want['masked']] = True
    return x, x.masked_fill(masked, net.mask_id), masked, want


def same(logp, want):
    """Rows over our ids against rows over theirs, of which the last may be [MASK]."""
    want = torch.tensor(want)[:, :logp.size(-1)]
    assert torch.allclose(logp, want, atol=2e-4), (logp - want).abs().max()


@pytest.mark.parametrize('name', MASKED)
@torch.no_grad()
def test_a_masked_model_says_what_the_published_network_says(name, opened):
    net, _ = opened(name)
    x, xt, masked, want = case(name, net)
    t = torch.tensor([want.get('t', 0.5)])
    if name == 'diffugpt-m':  # they normalise over the row of [MASK], too, which is the embedding's
        net.gpt.outputs += 1
    same(net.network(xt, t)[0].log_softmax(-1)[want['logp_positions']], want['logp'])
    assert net.masked_nats(x, masked, m=t).item() == pytest.approx(want['nats'], abs=1e-3)


@torch.no_grad()
def test_mdlm_with_its_time_input_says_what_the_published_network_says(opened):
    net, _ = opened('mdlm', time_conditioning=True)
    x, xt, masked, want = case('mdlm', net)
    m = torch.tensor([0.4])
    same(net.network(xt, m)[0].log_softmax(-1)[want['logp_positions']], want['timed']['logp'])
    assert net.masked_nats(x, masked, m=m).item() == pytest.approx(want['timed']['nats'], abs=1e-3)


@torch.no_grad()
def test_sedd_has_the_published_scores_and_score_entropy(opened):
    """Their score is (1 - m) / m times ours, and so is their loss (without the factor of sigma's slope)."""
    net, _ = opened('sedd')
    x, xt, masked, want = case('sedd', net)
    m = torch.tensor([0.4])
    ratio = 0.6 / 0.4
    same(net.scores(xt, m)[0][want['logp_positions']] + np.log(ratio), want['log_score'])
    same(net.denoise(xt, m)[0][want['logp_positions']], want['logp'])
    assert (ratio * net.masked_nats(x, masked, m=m)).item() == pytest.approx(want['nats'], rel=1e-5)


@pytest.mark.parametrize('name', ['bd3lm', 'a2d-qwen3-bd3lm'])
@torch.no_grad()
def test_a_block_model_says_what_the_published_network_says(name, opened):
    net, _ = opened(name)
    x, _, masked, want = case(name, net)
    assert net.config.block_length == 4
    assert net.masked_nats(x, masked).sum().item() == pytest.approx(want['nats'], abs=1e-3)
    net.config.old_mask = -1  # theirs may write [MASK]
    last, cache = want['last_block'], model.Cache()
    block = torch.tensor(last['input'])[None]
    net.read(block[:, :12], cache)
    block[block == MASK[name]] = net.mask_id
    logp = net.denoise_block(block[:, 12:], cache)[0]
    same(logp[[i - 12 for i in last['positions']]], last['logp'])


def written(net, x, steps=12, **how):
    """The text after the four first tokens of x (1, 16), the surest token of every step."""
    xt = x.clone()
    xt[:, 4:] = net.mask_id
    *_, text = net.sample(xt, steps, 'confidence', temperature=0, **how)
    return text[0].tolist()


@pytest.mark.parametrize('name', DENOISERS)
def test_a_greedy_text_is_that_of_the_published_network(name, opened):
    net, _ = opened(name)
    x, _, _, want = case(name, net)
    if name == 'llada':  # generate.py
        assert written(net, x, part_length=4) == want['greedy']
        assert written(net, x) == want['greedy_block12']
        assert written(net, x, 6, part_length=4) == want['greedy_steps6_block4']
        assert written(net, x, 4) == want['greedy_steps4_block12']
    else:
        assert written(net, x) == want['greedy']
    if name == 'a2d-qwen3-mdlm':
        assert written(net, x, part_length=4) == want['greedy_block4']


@pytest.mark.parametrize('length', [4, 12])
def test_the_rules_against_early_end_tokens_are_lladas(length, opened):
    net, _ = opened('llada')
    net.config.old_mask = -1  # theirs may write [MASK], and count its share among the confidences
    x, _, _, want = case('llada', net)
    eos, eot = want['options']['eos'], want['options']['eot']
    for name, how in (('logits_eos_inf', dict(never=(eos,))),
                      ('confidence_eos_eot_inf', dict(last=(eos, eot)))):
        assert written(net, x, part_length=length, **how) == want['options'][f'{name}_block{length}'], name


@pytest.mark.parametrize('name', ['qwen2', 'qwen3'])
@torch.no_grad()
def test_qwen_says_what_transformers_says(name, opened):
    net, _ = opened(name)
    want = numbers()[name]
    x = torch.tensor(want['x'])[None]
    same(net.gpt(x)[0][[0, 7, 15]], want['logits'])
    text = want['greedy']
    for i in range(4, 16):  # each is the likeliest behind those before it
        assert net.gpt(torch.tensor(text[:i])[None])[0, -1].argmax() == text[i]


# ---- writing ----------------------------------------------------------------------------------------------

OURS = [('masked', dict(arch='ddit'), 'mdlm'), ('masked', dict(arch='ddit', time_input=True), 'mdlm'),
        ('block', dict(arch='ddit', block_length=4), 'bd3lm'), ('sedd', dict(arch='ddit'), None),
        ('masked', dict(arch='llama', n_kv_head=2, n_inner=40), 'llada'),
        ('masked', dict(arch='llama', shift=True), 'llama'),
        ('masked', dict(arch='gpt2', shift=True), 'gpt2'),
        ('masked', dict(arch='gpt2'), 'gpt2'), ('ar', dict(arch='llama', qkv_bias=True), 'qwen2'),
        ('ar', dict(arch='llama', qk_norm=True, head_width=16, tied=True), 'qwen3'),
        ('masked', dict(arch='llama', qkv_bias=True, shift=True, bos=False), 'Dream'),
        ('masked', dict(arch='llama', qk_norm=True), 'qwen3')]


def of_ours(objective, knobs):
    """A random checkpoint of ours."""
    concept = common.concept(objective)
    config = concept.Config(**{**dict(vocab_size=11, block_size=24, n_layer=2, n_head=4, n_embd=32), **knobs})
    torch.manual_seed(0)
    net = concept.Model(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    letters = {c: i for i, c in enumerate('abcdefghijk')}
    meta = dict(kind='json', vocab_size=11, end=10, bos=None, json=dict(
        model=dict(type='BPE', vocab=letters, merges=[]), added_tokens=[],
        pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False)))
    return net.eval(), dict(objective=objective, config=asdict(config), tokenizer=meta, iter=7, tokens=8,
                            run=dict(dataset='mine'), model=net.state_dict(), ema=net.state_dict())


def says(net, x):
    """What a model says of the tokens x, some of them masked, with noise of a fixed seed."""
    torch.manual_seed(0)
    return net.nats(x, n=4)


@pytest.mark.parametrize('objective, knobs, kind', OURS)
@torch.no_grad()
def test_a_model_of_ours_goes_out_in_a_published_layout_and_comes_back_the_same(
        objective, knobs, kind, tmp_path):
    net, checkpoint = of_ours(objective, knobs)
    folder.write_folder(checkpoint, tmp_path / 'out')
    theirs = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert theirs.get('model_type') == kind
    back = find.find(str(tmp_path / 'out'))[1]
    assert back['config'] == checkpoint['config'] and back['tokenizer'] == checkpoint['tokenizer']
    assert (back['iter'], back['tokens'], back['objective']) == (7, 8, objective)
    again, _ = common.load_model(back, torch.device('cpu'))
    x = torch.randint(11, (3, 24))
    assert torch.allclose(says(net, x), says(again, x), rtol=1e-5)


@pytest.mark.parametrize('objective, knobs, kind',
                         [o for o in OURS if o[2] in ('mdlm', 'bd3lm', 'llada', 'Dream')])
@torch.no_grad()
def test_without_our_part_of_config_json_it_is_the_published_family_and_says_the_same(
        objective, knobs, kind, tmp_path):
    net, checkpoint = of_ours(objective, knobs)
    folder.write_folder(checkpoint, tmp_path / 'out')
    path = tmp_path / 'out' / 'config.json'
    theirs = json.loads(path.read_text())
    del theirs['unmask']
    path.write_text(json.dumps(theirs))
    back = find.find(str(tmp_path / 'out'))[1]
    assert back['objective'] == objective
    again, _ = common.load_model(back, torch.device('cpu'))
    x = torch.randint(11, (3, 24))
    if objective == 'block':  # in theirs the first token is given
        assert again.config.first_given
        again.config.first_given = False
    assert torch.allclose(says(net, x), says(again, x), rtol=1e-5)
