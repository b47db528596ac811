"""Published families at work: downloads, scripts, fine-tuning, chat, memory, and what cannot be read."""
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import common
import eval as evaluation
import published
import sample
import train
import unmask
from conftest import ROOT, TINY
from data.gsm8k import prepare as pairs
from data.text import prepare
from hub import families, find
from parts import steered
from published import make

safetensors = pytest.importorskip('safetensors.torch')


@pytest.fixture
def served(local_hub, tmp_path):
    """A function: name of a family -> a hub serves it, with its own name behind me/tiny-."""
    def serve(name, **changes):
        make(tmp_path / 'served', name, **changes)
        return f'me/tiny-{name}'
    return serve


@pytest.fixture
def refused(mistake):
    return lambda source: mistake(lambda argv: find.find(str(source)))


# ---- downloads and scripts --------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['mdlm', 'sedd', 'bd3lm', 'diffullama', 'llada', 'dream', 'a2d-qwen3-bd3lm'])
def test_a_family_comes_from_a_hub_and_writes_and_has_a_bound(name, served, monkeypatch, capsys):
    monkeypatch.setattr(families, 'DIFFULLAMA', replace(families.DIFFULLAMA, mask=8))
    monkeypatch.setattr(families, 'A2D_BLOCKS', dict(block_length=4))
    source = served(name)
    sample.main([f'--out_dir={source}', '--num_samples=2', '--steps=8', '--length=24'])
    open('text.txt', 'w').write('!"#$%&' * 40)
    evaluation.main([f'--out_dir={source}', '--input=text.txt', '--draws=2', '--dtype=float32'])
    kind = dict(bd3lm='block', sedd='sedd').get(name.rpartition('-')[2], 'masked')
    figure = float(capsys.readouterr().out.splitlines()[-1].split('|')[4].split('±')[0])
    assert find.find(source)[1]['objective'] == kind and 0 < figure < 100


def test_a_masked_family_fills_in_writes_longer_texts_and_takes_every_rule(served, capsys):
    source = served('mdlm', eos_token_id=39)
    sample.main([f'--out_dir={source}', '--template=!"#___$%', '--hole=4', '--steps=4'])
    assert capsys.readouterr().out.startswith('!"#')  # <|endoftext|> stands before it and is not shown
    sample.main([f'--out_dir={source}', '--length=70', '--steps=8', '--overlap=16'])
    for rule in unmask.RULES:
        sample.main([f'--out_dir={source}', f'--rule={rule}', '--steps=4', '--length=16'])


def test_rows_of_mdlm_are_framed_by_given_ends_and_score_the_text_between(served, capsys):
    source = served('mdlm', eos_token_id=39)
    open('text.txt', 'w').write('!"#$%&' * 20)  # 120 tokens: four windows of 30 between the ends
    evaluation.main([f'--out_dir={source}', '--input=text.txt'])
    assert capsys.readouterr().out.splitlines()[-1].endswith('| 4 of 32 |')


def test_a_denoiser_of_others_is_fine_tuned_on_prompts_and_answers_and_keeps_what_it_is(
        served, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(families, 'DIFFUGPT', replace(families.DIFFUGPT, mask=10))
    source = served('diffugpt-s')
    questions = [json.dumps(dict(question='!"#', answer='$%#### &')) for _ in range(20)]
    for split in ('train', 'test'):
        open(f'{split}.jsonl', 'w').write('\n'.join(questions))
    pairs.main([f'--tokenizer={source}', '--train=train.jsonl', '--test=test.jsonl', '--out=data/sums'])
    knobs = [a for a in TINY if not a.startswith(('--n_', '--dataset', '--block'))]
    train.main([*knobs, '--dataset=sums', f'--init_from={source}', '--muon_lr=0', '--lora_rank=2',
                '--out_dir=out-sft', '--objective=masked'])
    config = common.load('out-sft/last.pt')['config']
    assert config['shift'] and config['old_mask'] == 10 and config['arch'] == 'gpt2'
    sample.main(['--out_dir=out-sft', '--start=!"#', '--length=20', '--steps=4'])


def test_a_network_told_the_noise_level_is_trained_and_sampled(workdir, capsys):
    train.main([*TINY, '--arch=ddit', '--time_input=True', '--objective=masked', '--out_dir=out-d'])
    sample.main(['--out_dir=out-d', '--steps=4'])
    blocks = common.load('out-d/last.pt')['ema']
    assert blocks['gpt.blocks.0.film.weight'].abs().max() > 0 and blocks['gpt.time.fc.weight'].std() > 0


# ---- chat, end tokens, repetition -------------------------------------------------------------------------

TEMPLATE = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|eot|>{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}")


@pytest.fixture
def chatty(served, tmp_path):
    """A LLaDA with a template and the tokens that this needs."""
    source = served('llada')
    theirs = tmp_path / 'served'
    from text.vocabulary import byte_letters
    letters = {c: i for i, c in enumerate(byte_letters())}
    added = [dict(id=i, content=c) for i, c in ((297, '<|eot|>'), (298, '<|end|>'), (296, '<|mask|>'))]
    (theirs / 'tokenizer.json').write_text(json.dumps(dict(
        model=dict(type='BPE', vocab=letters, merges=[]), added_tokens=added,
        pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False))))
    (theirs / 'chat_template.jinja').write_text(TEMPLATE)
    config = json.loads((theirs / 'config.json').read_text())
    config |= dict(embedding_size=300, vocab_size=300, mask_token_id=296, eos_token_id=298, pad_token_id=298)
    (theirs / 'config.json').write_text(json.dumps(config | dict(max_sequence_length=96)))
    torch.manual_seed(0)
    for path in theirs.glob('*.safetensors'):
        tensors = {name: torch.randn(300, t.shape[1]).bfloat16() if t.shape[0] == 60 else t
                   for name, t in safetensors.load_file(path).items()}
        safetensors.save_file(tensors, path)
    return source


def test_chat_puts_the_template_around_a_message_and_prints_the_answer_alone(chatty, monkeypatch, capsys):
    pytest.importorskip('jinja2')
    seen = []
    write = sample.write
    monkeypatch.setattr(sample, 'write', lambda *args: seen.append(args) or write(*args))
    sample.main([f'--out_dir={chatty}', '--chat=Hi <|mask|>!', '--length=24', '--num_samples=1', '--steps=4'])
    out = capsys.readouterr().out
    _, tokenizer, _, canvas, _, marks = seen[0]
    row, V = canvas[0].tolist(), tokenizer.vocab_size
    assert marks == (297, 298) and row.count(V) == 24 and 296 not in row and row.count(297) == 1
    assert tokenizer.decode(row[:-24]) == '[user] Hi <|mask|>!<|eot|>[assistant] '
    assert '[user]' not in out and '<|eot|>' not in out


@pytest.mark.parametrize('how, there', [('never', False), ('last', True)])
def test_end_tokens_may_be_forbidden_or_come_last(how, there, chatty, capsys, monkeypatch):
    """A network that says <|eot|> everywhere."""
    load = common.load_model

    def eager(*args, **knobs):
        net, tokenizer = load(*args, **knobs)
        net.gpt.logits = lambda h: torch.nn.functional.one_hot(
            torch.full(h.shape[:-1], 297), 300).float() * 50 + torch.randn(*h.shape[:-1], 300)
        return net, tokenizer
    monkeypatch.setattr(common, 'load_model', eager)
    found = []
    write = sample.write
    monkeypatch.setattr(sample, 'write', lambda *args: found.append(write(*args)) or found[-1])
    sample.main([f'--out_dir={chatty}', '--chat=Hi', '--length=16', '--steps=4', '--rule=confidence',
                 f'--early_end={how}', '--html=page.html', '--num_samples=1'])
    assert ((found[0][1][-1] == 297).sum() > 1) == there


def test_knobs_of_chat_that_do_not_fit_end_in_one_line(served, chatty, mistake):
    assert 'leave out start' in mistake(sample.main, '--chat=Hi', '--start=Ho')
    assert 'last is not for rule=ancestral' in mistake(
        sample.main, f'--out_dir={chatty}', '--chat=Hi', '--rule=ancestral', '--early_end=last')


def test_a_repeated_token_is_penalised_once_however_often_it_stands_there():
    logp = torch.tensor([[0.5, 0.3, 0.2]]).log()[:, None].expand(1, 2, 3)
    xt = torch.tensor([[1, 1, 3, 3]])  # 3 is to be written
    p = steered.penalised(logp, xt, 2.0).exp()[0, 0]
    assert torch.allclose(p, torch.tensor([0.5, 0.09, 0.2]) / 0.79)


def test_ids_that_are_never_written_are_not_and_the_rest_keeps_its_proportions():
    denoise = lambda xt, t: torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 2, 3)
    p = steered.without(denoise, (0,))(None, None).exp()
    assert torch.allclose(p[0, 0], torch.tensor([0, 0.6, 0.4]))
    xt = torch.full((40, 2), 3)
    *_, text = unmask.unmask(lambda xt, t: denoise(xt, t).expand(len(xt), 2, 3), xt, 3, 2, never=(1,))
    assert set(text.flatten().tolist()) == {0, 2}


def test_a_place_where_an_end_is_likeliest_waits_for_the_others():
    p = torch.tensor([[[0.9, 0.05, 0.05], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]]])
    frames = list(unmask.unmask(lambda xt, t: p.log(), torch.full((1, 3), 3), 3, 3, 'confidence',
                                temperature=0, last=(0,)))
    assert [f[0].tolist() for f in frames] == [[3, 3, 2], [3, 1, 2], [0, 1, 2]]


# ---- memory -----------------------------------------------------------------------------------------------

PEAK = """
import sys, torch, common
from hub import find
load = lambda name: common.load_model(find.find(name)[1], torch.device('cpu'))[0]
load(sys.argv[1])  # what is imported on the way is there then
status = lambda key: int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1])
before = status('VmRSS')
net = load(sys.argv[2])
size = sum(p.nbytes for p in net.parameters())
print({p.dtype for p in net.parameters()} == {torch.bfloat16}, size, (status('VmHWM') - before) * 1024 / size)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_a_model_takes_the_memory_of_its_files_and_no_more_than_a_seventh_beyond(tmp_path):
    """140 million parameters in shards, half of them an embedding and a head; the process counts, too."""
    wide = dict(d_model=512, embedding_size=120_000, vocab_size=120_000, mask_token_id=119_999, n_layers=8,
                n_heads=8, n_kv_heads=8, mlp_hidden_size=1536, max_sequence_length=64, eos_token_id=0)
    make(tmp_path / 'small', 'llada')
    make(tmp_path / 'big', 'llada')
    theirs = json.loads((tmp_path / 'big' / 'config.json').read_text()) | wide
    (tmp_path / 'big' / 'config.json').write_text(json.dumps(theirs))
    C, F, V, parts = 512, 1536, 120_000, []
    at = 'model.transformer.'
    parts.append({at + 'wte.weight': (V, C), at + 'ln_f.weight': (C,)})
    parts.append({at + 'ff_out.weight': (V, C)})
    for i in range(8):
        parts.append({f'{at}blocks.{i}.{name}.weight': shape for name, shape in dict(
            attn_norm=(C,), ff_norm=(C,), q_proj=(C, C), k_proj=(C, C), v_proj=(C, C), attn_out=(C, C),
            ff_proj=(F, C), up_proj=(F, C), ff_out=(C, F)).items()})
    for path in (tmp_path / 'big').glob('*.safetensors'):
        path.unlink()
    where = {}
    for i, part in enumerate(parts):
        safetensors.save_file({n: torch.ones(s, dtype=torch.bfloat16) for n, s in part.items()},
                              tmp_path / 'big' / f'{i}.safetensors')
        where |= dict.fromkeys(part, f'{i}.safetensors')
    (tmp_path / 'big' / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    letters = dict(model=dict(type='BPE', vocab={c: i for i, c in enumerate('abc')}, merges=[]),
                   added_tokens=[], pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False))
    (tmp_path / 'big' / 'tokenizer.json').write_text(json.dumps(letters))
    command = [sys.executable, '-c', PEAK, tmp_path / 'small', tmp_path / 'big']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    own_type, size, share = done.stdout.split()
    assert own_type == 'True' and int(size) > 250e6 and 0.9 < float(share) < 1.15, done


# ---- what cannot be read ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name, changes, words', [
    ('duo', {}, ['model_type=DUO', 'uniform diffusion', 'does not have']),
    ('llada', dict(model_type='mamba'), ['model_type=mamba', 'mdlm', 'auto_map', 'never run']),
    ('llada', dict(block_type='sequential'), ['block_type=sequential']),
    ('llada', dict(include_qkv_bias=True), ['include_qkv_bias=True']),
    ('llada', dict(mask_token_id=60), ['[MASK], 60', 'embedding of 60']),
    ('llada', dict(quantization_config=dict(bits=4)), ['quantised', 'bits']),
    ('bd3lm', dict(time_conditioning=True), ['time_conditioning=True']),
    ('bd3lm', dict(block_size=5), ['block_length=5']),
    ('gidd', dict(p_uniform=0.1), ['p_uniform=0.1']),
    ('mdlm', dict(cond_dim=64), ['cond_dim=64']),
    ('mdlm', dict(n_blocks=3), ['blocks.2', 'missing']),
    ('sedd', dict(graph=dict(type='uniform')), ['graph.type=uniform']),
    ('dream', dict(use_sliding_window=True), ['use_sliding_window=True']),
    ('qwen3', dict(head_dim=8), ['instead of (32, 32)'])])
def test_a_model_that_cannot_be_read_ends_in_one_line(name, changes, words, tmp_path, refused):
    make(tmp_path / name, name, **changes)
    err = refused(tmp_path / name)
    assert all(word in err for word in words), err


def test_a_model_that_is_not_known_is_not_downloaded(served, local_hub, refused):
    source = served('llada', model_type='mamba')
    assert 'model_type=mamba' in refused(source)
    assert not any('safetensors' in path for path in local_hub[0])


def test_a_tensor_more_or_less_is_named(tmp_path, refused):
    make(tmp_path / 'mdlm', 'mdlm')
    path = tmp_path / 'mdlm' / 'model.safetensors'
    tensors = safetensors.load_file(path)
    safetensors.save_file(tensors | {'backbone.extra': torch.ones(1)}, path)
    assert 'backbone.extra' in refused(tmp_path / 'mdlm')
    del tensors['backbone.blocks.1.adaLN_modulation.bias']
    safetensors.save_file(tensors, path)
    assert 'backbone.blocks.1.adaLN_modulation.bias is missing' in refused(tmp_path / 'mdlm')


def test_without_jinja2_the_line_names_it(chatty, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, 'jinja2.sandbox', None)
    assert 'pip install jinja2' in mistake(sample.main, f'--out_dir={chatty}', '--chat=Hi')


def test_the_count_of_sedd_small_and_mdlm_is_the_published_one(monkeypatch):
    """169,627,218 numbers in the file of 50,258 rows, 12 blocks of width 768 (679 MB in float32)."""
    for name, value in dict(D=768, L=12, H=12).items():
        monkeypatch.setattr(published, name, value)
    shapes = published.ddit(50258)
    assert sum(math.prod(s) for name, s in shapes.items() if 'rotary' not in name) == 169_627_218


# ---- types, ends, places ----------------------------------------------------------------------------------

@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['mdlm', 'sedd', 'bd3lm', 'gidd', 'diffugpt-m', 'llada', 'qwen3', 'mixed'])
@torch.no_grad()
def test_weights_in_half_precision_work_with_and_without_fast_products(
        name, dtype, fast, tmp_path, monkeypatch):
    make(tmp_path / 'theirs', 'dream' if name == 'mixed' else name)
    for path in (tmp_path / 'theirs').glob('*.safetensors'):
        safetensors.save_file({n: t.to(torch.float32 if name == 'mixed' and 'norm' in n else dtype)
                               for n, t in safetensors.load_file(path).items()}, path)
    monkeypatch.setattr(common, 'fast_dtype', lambda device: torch.bfloat16 if fast else torch.float32)
    device, x = torch.device('cpu'), torch.randint(30, (2, 16))
    checkpoint, values = find.find(str(tmp_path / 'theirs'))[1], []
    for how in ('', 'float32'):
        net, _ = common.load_model(checkpoint, device, dtype=how)
        assert {p.dtype for p in net.parameters()} == {torch.float32 if how else dtype}
        torch.manual_seed(0)
        with common.precision(net, how, device):
            values.append(net.nats(x, n=2))
    assert values[0].dtype == torch.float32 and torch.allclose(*values, rtol=0.1)


def test_a_block_model_does_not_write_others_mask_and_takes_no_cache(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(families, 'A2D_BLOCKS', dict(block_length=4))
    make(tmp_path / 'a2d-qwen3-bd3lm', 'a2d-qwen3-bd3lm')
    source = str(tmp_path / 'a2d-qwen3-bd3lm')
    net, _ = common.load_model(find.find(source)[1], torch.device('cpu'))
    *_, text = net.sample(torch.full((200, 32), net.mask_id), 8)
    assert not (text == 51).any()
    assert 'exact cache' in mistake(sample.main, f'--out_dir={source}', '--cache=dual', '--part_length=4')


def test_rules_about_ends_and_caches_that_cannot_work_end_in_one_line(served, mistake):
    mdlm = served('mdlm')
    assert 'this model has none' in mistake(sample.main, f'--out_dir={mdlm}', '--early_end=last')
    assert 'for a cache' in mistake(sample.main, f'--out_dir={mdlm}', '--refresh=2')


def test_windows_that_hold_no_text_between_the_ends_end_in_one_line(served, mistake):
    source = served('mdlm', eos_token_id=39)
    open('text.txt', 'w').write('!"#$')
    assert 'does not fit a text of 4' in mistake(evaluation.main, f'--out_dir={source}', '--input=text.txt')
    assert 'block_size=2' in mistake(evaluation.main, f'--out_dir={source}', '--input=text.txt',
                                     '--block_size=2')


def test_a_name_is_looked_for_without_reading_the_tensor(tmp_path, monkeypatch):
    make(tmp_path / 'llada', 'llada')
    weights = find.find(str(tmp_path / 'llada'))[1]['ema']
    monkeypatch.setattr(weights, 'made', {name: None for name in weights})
    assert 'gpt.embed.weight' in weights and 'gpt.pos.weight' not in weights
