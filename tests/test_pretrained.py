"""Weights and tokenizers of others: each shape against another implementation, reading against writing, and
everything that can be wrong with a folder or a download."""
import base64
import io
import json
import os
import sys

import numpy as np
import pytest
import torch

import common
import masked
import train
from conftest import TEXT, TINY
from data import tools
from data.text import prepare
from hub import export, find, folder
from text import rows, vocabulary, windows
from theirs import BYTE_LEVEL, LETTERS, SHAPES, make_folder, tokenizer_json

safetensors = pytest.importorskip('safetensors.torch')


@pytest.fixture(params=['gpt2', 'llama'])
def theirs(request, tmp_path):
    make_folder(tmp_path / 'theirs', request.param)
    return tmp_path / 'theirs'


def read(source):
    return find.find(str(source))[1]


def loaded(source):
    return common.load_model(read(source), torch.device('cpu'))


@pytest.fixture
def refused(mistake):
    """The line that ends a script which is to read this model."""
    return lambda source: mistake(lambda argv: read(source))


def library_logits(source, x):
    """What the library transformers makes of a folder; without it the test ends here."""
    library = pytest.importorskip('transformers').AutoModelForCausalLM
    with torch.no_grad():
        return library.from_pretrained(source, dtype=torch.float32).eval()(x).logits


# ---- logits -----------------------------------------------------------------------------------------------

LONG = [None, dict(rope_type='linear', factor=4.0),
        dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=1000)]  # of 4 pairs one is between


def slowed(frequency, rope):
    """A rotary frequency of a model for longer contexts, by its wave length, as Meta's code puts it."""
    if rope is None:
        return frequency
    length, wave = rope.get('original_max_position_embeddings', 0), 2 * np.pi / frequency
    if wave > length / rope.get('low_freq_factor', 1):
        return frequency / rope['factor']
    if wave < length / rope['high_freq_factor']:
        return frequency
    kept = (length / wave - rope['low_freq_factor']) / (rope['high_freq_factor'] - rope['low_freq_factor'])
    return (1 - kept) * frequency / rope['factor'] + kept * frequency


def llama_in_numpy(w, x, c):
    """LLaMA's logits for ids x (T,), head by head and pair by pair, as the paper's formulas say."""
    H, K, C = c['num_attention_heads'], c['num_key_value_heads'], c['hidden_size']
    D, T = C // H, len(x)
    norm = lambda h, g: h / np.sqrt((h ** 2).mean(-1, keepdims=True) + c['rms_norm_eps']) * g
    frequencies = [slowed(c['rope_theta'] ** (-2 * j / D), c.get('rope_scaling')) for j in range(D // 2)]

    def turn(v):  # (T, D): the pair (j, j + D/2) as one complex number
        z = v[:, :D // 2] + 1j * v[:, D // 2:]
        z = z * np.exp(1j * np.outer(np.arange(T), frequencies))
        return np.concatenate([z.real, z.imag], -1)
    h = w['model.embed_tokens.weight'][x]
    for i in range(c['num_hidden_layers']):
        p = {k.removeprefix(f'model.layers.{i}.').removesuffix('.weight'): v for k, v in w.items()}
        a, heads = norm(h, p['input_layernorm']), []
        q, k, v = (a @ p[f'self_attn.{n}_proj'].T for n in 'qkv')
        for j in range(H):
            own, shared = slice(j * D, j * D + D), slice(j // (H // K) * D, j // (H // K) * D + D)
            score = turn(q[:, own]) @ turn(k[:, shared]).T / np.sqrt(D)
            score += np.triu(np.full((T, T), -np.inf), 1)
            e = np.exp(score - score.max(-1, keepdims=True))
            heads.append(e / e.sum(-1, keepdims=True) @ v[:, shared])
        h = h + np.concatenate(heads, -1) @ p['self_attn.o_proj'].T
        b = norm(h, p['post_attention_layernorm'])
        gate = b @ p['mlp.gate_proj'].T
        h = h + (gate / (1 + np.exp(-gate)) * (b @ p['mlp.up_proj'].T)) @ p['mlp.down_proj'].T
    return norm(h, w['model.norm.weight']) @ w['lm_head.weight'].T


@pytest.mark.parametrize('rope', LONG)
def test_the_llama_preset_equals_llama_written_in_numpy(rope, tmp_path):
    own = SHAPES['llama'] | dict(rope_scaling=rope, num_attention_heads=2, num_key_value_heads=1)
    tensors = make_folder(tmp_path / 'theirs', 'llama', **own)
    net, _ = loaded(tmp_path / 'theirs')
    x = np.random.default_rng(0).integers(300, size=20)
    w = {name: t.double().numpy() for name, t in tensors.items()}
    ours = net.double().gpt(torch.tensor(x)[None])[0].numpy()
    assert np.allclose(ours, llama_in_numpy(w, x, own), atol=1e-6)


def test_logits_equal_those_of_the_library_transformers(theirs):
    net, _ = loaded(theirs)
    x = torch.randint(300, (2, 20))
    assert torch.allclose(net.gpt(x), library_logits(theirs, x), atol=1e-4)
    before = torch.nn.functional.pad(x, (1, 0), value=299)  # <|endoftext|>
    logits = library_logits(theirs, before)[:, :-1].transpose(1, 2)
    nats = torch.nn.functional.cross_entropy(logits, x, reduction='none')
    assert torch.allclose(net.nats(x), nats.sum(-1), atol=1e-3)


@pytest.mark.parametrize('rope', LONG[1:])
def test_longer_contexts_are_written_back_and_equal_those_of_the_library_transformers(rope, tmp_path):
    make_folder(tmp_path / 'theirs', 'llama', rope_scaling=rope)
    net, _ = loaded(tmp_path / 'theirs')
    folder.write_folder(read(tmp_path / 'theirs'), tmp_path / 'again')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['rope_scaling'] == rope
    x = torch.randint(300, (2, 20))
    for name in ('theirs', 'again'):
        assert torch.allclose(net.gpt(x), library_logits(tmp_path / name, x), atol=1e-4)


def test_gpt2s_matrices_are_turned_and_its_bos_is_the_row_of_the_end(tmp_path):
    tensors = make_folder(tmp_path / 'theirs', 'gpt2')
    net, tokenizer = loaded(tmp_path / 'theirs')
    assert torch.equal(net.gpt.blocks[1].attn.qkv.weight, tensors['h.1.attn.c_attn.weight'].T)
    assert torch.equal(net.gpt.embed.weight[300], tensors['wte.weight'][299]) and tokenizer.end == 299


def test_weights_in_shards_in_half_precision_and_with_a_prefix_are_the_same(tmp_path):
    tensors = make_folder(tmp_path / 'whole', 'gpt2')
    make_folder(tmp_path / 'shards', 'gpt2')
    (tmp_path / 'shards' / 'model.safetensors').unlink()
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[:10], names[10:])):
        name = f'model-{i}.safetensors'
        shard = {f'transformer.{n}': tensors[n].bfloat16() for n in part}
        safetensors.save_file(shard, tmp_path / 'shards' / name)
        index |= dict.fromkeys(shard, name)
    (tmp_path / 'shards' / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=index)))
    a, b = (loaded(tmp_path / name)[0].state_dict() for name in ('whole', 'shards'))
    assert a.keys() == b.keys() and {t.dtype for t in b.values()} == {torch.bfloat16}
    assert all(torch.allclose(a[n], b[n].float(), rtol=1e-2) for n in a)
    whole, _ = common.load_model(read(tmp_path / 'shards'), torch.device('cpu'), dtype='float32')
    assert all(torch.equal(b[n].float(), t) for n, t in whole.state_dict().items())


# ---- writing ----------------------------------------------------------------------------------------------

def test_what_is_written_reads_back_to_equal_tensors_and_equal_logits(theirs, tmp_path):
    folder.write_folder(read(theirs), tmp_path / 'again')
    a, b = ({name.removeprefix('transformer.'): t
             for name, t in safetensors.load_file(path / 'model.safetensors').items()}
            for path in (theirs, tmp_path / 'again'))
    assert b.keys() == a.keys() | {'unmask.marks'} and all(torch.equal(a[name], b[name]) for name in a)
    (old, one), (new, other) = loaded(theirs), loaded(tmp_path / 'again')
    x = torch.randint(301, (2, 20))
    assert torch.equal(old.gpt(x), new.gpt(x)) and one.meta == other.meta


@pytest.fixture
def own(workdir, theirs):
    """The folder `theirs`, and data/mine in its tokens."""
    (workdir / 'mine.txt').write_text(TEXT)
    prepare.main(['--input=mine.txt', f'--tokenizer={theirs}', '--out=data/mine'])
    return theirs


RUN = [a for a in TINY if not a.startswith(('--n_', '--dataset', '--block'))] + ['--dataset=mine']


@pytest.mark.parametrize('knobs', [[], ['--shift=True', '--block_size=12'],
                                   ['--lora_rank=2', '--muon_lr=0']])
def test_an_adapted_model_written_and_read_again_denoises_alike(own, tmp_path, knobs):
    train.main([*RUN, '--objective=masked', f'--init_from={own}', '--out_dir=out-m', *knobs])
    export.main(['--out_dir=out-m', '--to=there'])
    (old, one), (new, other) = loaded('out-m'), loaded('there')
    xt = torch.randint(301, (2, 12))
    assert type(new) is masked.Model and one.pieces == other.pieces
    assert torch.allclose(old.denoise(xt), new.denoise(xt), atol=1e-5)
    if any('shift' in k for k in knobs):
        assert new.config.shift and new.config.block_size == 12


# ---- tokenizers -------------------------------------------------------------------------------------------

AWKWARD = ['', '\n\n\t  \n', 'the there THE  the', 'e\u0301 ä ß', '👩\u200d👧 🇩🇪 🤷🏽', '漢字かな 한국어',
           '\0\ufeff\u2028', 'a<|endoftext|>b', 'x' * 300, '  12  34 a1 b 2c  \n 3 ½ ² 1,000.50',
           "it's I'LL we'd 've", 'a  1\t2\n\n3', ' \u00a0 1 \u3000 2', 'lone \ud800 surrogate']
DIGITS = dict(type='Sequence', pretokenizers=[dict(type='Digits', individual_digits=True), BYTE_LEVEL])
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def split_by(regex):
    return dict(type='Sequence', pretokenizers=[
        dict(type='Split', pattern=dict(Regex=regex), behavior='Isolated', invert=False),
        dict(BYTE_LEVEL, use_regex=False)])


SPLIT = split_by(LLAMA3)


def tokenizer_of(source):
    return vocabulary.Tokenizer(dict(kind='json', json=source, vocab_size=300, end=299))


@pytest.fixture
def unreadable(mistake):
    """The line that ends a script which is to read this tokenizer.json."""
    return lambda source: mistake(lambda argv: tokenizer_of(source))


def in_library(source):
    """The tokenizer of the library tokenizers for a tokenizer.json, whose special tokens it forgets."""
    library = pytest.importorskip('tokenizers')
    source['added_tokens'] = []
    source['model'] |= dict(dropout=None, unk_token=None, continuing_subword_prefix=None, fuse_unk=False,
                            end_of_word_suffix=None)
    return library.Tokenizer.from_str(json.dumps(source | dict(
        version='1.0', truncation=None, padding=None, post_processor=None, decoder=None)))


@pytest.mark.parametrize('pre', [BYTE_LEVEL, DIGITS, SPLIT])
def test_awkward_texts_survive_and_ids_are_those_of_merging_by_hand(pre):
    import regex
    tokenizer = tokenizer_of(tokenizer_json(pre=pre))
    merges = [(b't', b'h'), (b'th', b'e'), (b' ', b'the'), (b' ', b'b')]

    def by_hand(text):
        """Digits are cut out first, then words, as the two steps of tokenizer.json; then merge by merge."""
        runs = regex.findall(r'\p{N}|[^\p{N}]+', text) if pre is DIGITS else [text]
        pattern, out = LLAMA3 if pre is SPLIT else vocabulary.GPT2_WORDS, []
        for word in (w for run in runs for w in regex.findall(pattern, run)):
            parts = [bytes([b]) for b in word.encode()]
            for a, b in merges:
                i = 0
                while i < len(parts) - 1:
                    if (parts[i], parts[i + 1]) == (a, b):
                        parts[i:i + 2] = [a + b]
                    i += 1
            out += parts
        return [tokenizer.pieces.index(p) for p in out]
    for text in AWKWARD:
        text = text.encode(errors='replace').decode()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == by_hand(text), text
    assert tokenizer.decode(tokenizer.encode(AWKWARD[-1])) == 'lone ? surrogate'
    assert tokenizer.n_bytes(tokenizer.encode('the ½')) == 6 and tokenizer.n_bytes([299]) == 0


@pytest.mark.parametrize('pre', [BYTE_LEVEL, DIGITS, SPLIT, split_by(r'\p{L}+')])
def test_ids_equal_those_of_the_library_tokenizers_even_where_a_word_leaves_something_out(pre):
    source = tokenizer_json(pre=pre)
    ref, ours = in_library(source), tokenizer_of(source)
    for text in AWKWARD[:-1] + TEXT.splitlines()[:5] + ['  the  2 x', 'the, the; 12']:
        assert ours.encode(text) == ref.encode(text).ids and ours.decode(ours.encode(text)) == text, text


def test_a_character_whose_bytes_are_unknown_is_left_out_as_the_library_does():
    source = tokenizer_json()
    del source['model']['vocab'][LETTERS[4]]
    tokenizer = tokenizer_of(source)
    assert tokenizer.decode(tokenizer.encode('a\x04b ä')) == 'ab ä'


def test_added_tokens_without_a_row_are_left_out_and_pieces_without_one_refused(unreadable):
    source = tokenizer_json()
    source['added_tokens'] = source['added_tokens'] + [dict(id=300, content='<pad>')]
    assert tokenizer_of(source).vocab_size == 300
    source['model']['vocab']['thethe'] = 300
    source['model']['merges'].append(['the', 'the'])
    assert 'id 300' in unreadable(source)


def test_a_piece_that_no_merge_makes_is_refused_unless_merges_are_to_be_ignored(unreadable):
    source = tokenizer_json()
    source['model']['vocab']['xyz'] = 280
    assert 'pieces without' in unreadable(source)
    source['model']['ignore_merges'] = True
    assert tokenizer_of(source).encode('xyz') == [280]


@pytest.mark.parametrize('change, words', [
    (dict(model=dict(type='Unigram')), ['Unigram', 'byte-level']),
    (dict(normalizer=dict(type='NFD')), ['NFD']),
    (dict(pre_tokenizer=dict(type='Metaspace')), ['Metaspace']),
    (dict(pre_tokenizer=dict(BYTE_LEVEL, add_prefix_space=True)), ['ByteLevel']),
    (dict(pre_tokenizer=dict(type='Sequence', pretokenizers=[])), ['damaged']),
    (dict(pre_tokenizer=split_by('(')), ['damaged']),
    (dict(pre_tokenizer=split_by('')), ['Split, ByteLevel']),
    (dict(model=[]), ['damaged']), (dict(model={}), ['damaged', 'vocab']),
    (dict(model=dict(type='BPE', vocab={'a': 0}, merges=[['a', 'b']])), ['damaged', 'ab']),
    (dict(model=dict(vocab={'a': 'x'}, merges=[])), ['no number']),
    (dict(model=dict(vocab={'a': 5.5}, merges=[])), ['no number']),
    (dict(model=dict(vocab={'a': 1, 'b': 1}, merges=[])), ['two pieces']),
    (dict(model=dict(vocab={'a': 0}, merges=[['a', 'a', 'a']])), ['damaged']),
    (dict(model=dict(tokenizer_json()['model'], end_of_word_suffix='</w>')), ['end_of_word_suffix=</w>'])])
def test_a_tokenizer_json_of_another_kind_or_damaged_is_refused_by_name(change, words, unreadable):
    err = unreadable(tokenizer_json() | change)
    assert all(word in err for word in ('tokenizer.json', *words)), err


@pytest.mark.parametrize('source', [[], {}])
def test_a_tokenizer_file_of_something_else_ends_in_one_line(source, unreadable):
    assert 'the tokenizer.json is damaged' in unreadable(source)


def test_merges_that_do_not_follow_their_ids_are_refused(unreadable):
    source = tokenizer_json()
    source['model']['merges'].reverse()
    assert 'order' in unreadable(source)


def test_a_vocabulary_beyond_uint16_is_written_in_uint32_and_read_back(workdir):
    source = tokenizer_json()
    source['model']['vocab']['thethe'] = 70000
    source['model']['merges'].append(['the', 'the'])
    meta = dict(kind='json', json=source, vocab_size=70001, end=299)
    tools.write_splits('data/big', dict(train=[70000, 5] * 50, val=[1] * 20), meta)
    text = windows.Rows(rows.load_tokens('big', 'train', 70001, 'cpu'), None, 4)
    assert text.all()['x'][0].tolist() == [70000, 5, 70000, 5]
    assert set(text.batch(3)[0]['x'].flatten().tolist()) == {70000, 5}
    assert vocabulary.Tokenizer(meta).encode('thethe') == [70000]


# ---- mistakes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change, words', [
    (dict(model_type='bert'), ['model_type=bert', 'gpt2, llama']),
    (dict(rope_scaling=dict(rope_type='yarn', factor=2.0)), ['rotary', 'yarn']),
    (dict(rope_scaling=dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0)), ['high_freq_factor']),
    (dict(rope_scaling=LONG[2] | dict(high_freq_factor=8.0)), ['rotary', 'high_freq_factor']),
    (dict(attention_bias=True), ['attention_bias']),
    (dict(head_dim=64), ['(16, 16) instead of (256, 16)']),
    (dict(num_key_value_heads=3), ['n_kv_head=3']),
    (dict(num_hidden_layers=3), ['model.layers.2.input_layernorm.weight', 'missing']),
    (dict(intermediate_size=41), ['model.layers.0.mlp.gate_proj.weight', '(40, 16)', '(41, 16)']),
    (dict(is_causal=False), ['is_causal=False']),
    (dict(partial_rotary_factor=0.5), ['partial_rotary_factor=0.5']),
    (dict(rope_parameters=dict(rope_type='default', rope_theta=7.0),
          rope_scaling=dict(rope_type='linear', factor=4.0)), ['rotary positions']),
    (dict(original_max_position_embeddings=500, rope_scaling=LONG[2]), ['500 and 1000']),
    (dict(rope_scaling='linear'), ['linear']), (dict(rope_scaling=[1]), ['[1]']),
    (dict(rope_theta=0), ['rope_base=0']), (dict(num_hidden_layers=2.0), ['n_layer=2.0']),
    (dict(rms_norm_eps=None), ['norm_eps=None']), (dict(intermediate_size='wide'), ['n_inner=wide']),
    (dict(num_attention_heads=0), ['config.json']), (dict(hidden_size=None), ['config.json']),
    (dict(max_position_embeddings=10 ** 20), ['block_size']), (dict(model_type=['llama']), ["['llama']"]),
    (dict(unmask=[1]), ['unmask']), (dict(unmask=dict(config={})), ['unmask']),
    (dict(quantization_config=dict(quant_method='gptq', bits=4)), ['quantised', 'gptq']),
    (dict(quantization_config=dict(load_in_8bit=True)), ['quantised', 'quantization_config']),
    (dict(quantization=dict(group_size=64, bits=4)), ['quantised']),
    (dict(tie_word_embeddings=True), ['tie_word_embeddings'])])  # but the head differs
def test_a_config_that_does_not_fit_or_cannot_be_right_is_refused_by_name(tmp_path, change, words, refused):
    make_folder(tmp_path / 'theirs', 'llama', **change)
    err = refused(tmp_path / 'theirs')
    assert all(word in err for word in words), err


def test_two_names_of_one_number_in_gpt2s_config_must_agree(tmp_path, refused):
    make_folder(tmp_path / 'theirs', 'gpt2', num_attention_heads=4)
    assert 'contradict' in refused(tmp_path / 'theirs')


def test_files_that_are_cut_short_or_missing_are_named(theirs, refused):
    whole = (theirs / 'model.safetensors').read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        (theirs / 'model.safetensors').write_bytes(whole[:length])
        assert 'model.safetensors is cut short' in refused(theirs)
    (theirs / 'model.safetensors').unlink()
    (theirs / 'pytorch_model.bin').write_bytes(b'')
    assert 'pickle' in refused(theirs)
    (theirs / 'model.safetensors').write_bytes(whole)
    (theirs / 'tokenizer.json').write_text('{"model": ')
    assert 'tokenizer.json is cut short' in refused(theirs)
    (theirs / 'tokenizer.json').unlink()
    assert 'no tokenizer.json' in refused(theirs)
    for text in ('{', '[]'):
        (theirs / 'config.json').write_text(text)
        assert 'config.json is cut short' in refused(theirs)


@pytest.mark.parametrize('names', [{}, {'a': '../b.safetensors'}, {'a': 'b.bin'}, {'a': None}, {'a': 3},
                                   {'a': ['a']}, [1], None])
def test_an_index_that_names_no_files_beside_it_is_refused(theirs, names, refused):
    index = {} if names is None else dict(weight_map=names)
    (theirs / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert 'index.json names no files' in refused(theirs)
    (theirs / 'model.safetensors').unlink()
    assert 'index.json names no files' in refused(theirs)


def test_what_a_checkpoint_has_and_the_run_no_place_for_is_named(workdir, mistake):
    train.main([*TINY, '--objective=sedd', '--out_dir=out-s'])
    loop = [a for a in TINY if not a.startswith('--n_')]
    assert 'film' in mistake(train.main, *loop, '--objective=ar', '--init_from=out-s', '--out_dir=out-x')
    assert 'init_from' in mistake(train.main, *TINY, '--objective=ar', '--lora_rank=2', '--out_dir=out-x')
    assert not os.path.exists('out-x')


def test_a_context_that_is_too_long_another_size_another_vocabulary_end_in_one_line(own, mistake):
    base = [*RUN, '--objective=masked', f'--init_from={own}', '--out_dir=out-m']
    for knobs, words in ((['--block_size=25'], ['block_size=25', '24']),
                         (['--n_layer=3'], ['n_layer=3', 'has 2']),
                         (['--dataset=tiny'], ['another vocabulary', '--tokenizer=']),
                         (['--objective=score'], ['ar', 'cannot become score']),
                         (['--lora_rank=2', '--lora_targets=nothing'], ['lora_targets=nothing', 'qkv'])):
        err = mistake(train.main, *base, *knobs)
        assert all(word in err for word in words), err
    assert not os.path.exists('out-m')


def test_gpt2_has_no_position_left_for_bos_at_its_full_length_with_shift(workdir, tmp_path, mistake):
    make_folder(tmp_path / 'theirs', 'gpt2')
    (workdir / 'mine.txt').write_text(TEXT)
    prepare.main(['--input=mine.txt', f'--tokenizer={tmp_path / "theirs"}', '--out=data/mine'])
    base = [*RUN, '--objective=masked', f'--init_from={tmp_path / "theirs"}', '--out_dir=out-m',
            '--shift=True']
    err = mistake(train.main, *base, '--block_size=24')
    assert 'gpt.pos.weight is of shape (24, 16) in the base, it must be of shape (25, 16)' in err
    train.main([*base, '--block_size=23'])


def test_writing_refuses_what_has_no_counterpart_and_a_folder_that_is_taken(own, workdir, mistake):
    train.main([*TINY, '--objective=ar', '--out_dir=out-ours'])
    assert 'arch=ours' in mistake(export.main, '--out_dir=out-ours', '--to=there')
    other = read(own) | dict(objective='d3pm')
    assert 'objective=d3pm' in mistake(lambda argv: folder.write_folder(other, 'there'))
    assert not os.path.exists('there')
    assert 'holds a model or' in mistake(export.main, '--out_dir=out-ours', f'--to={own}')
    assert '--to=' in mistake(export.main, '--out_dir=out-ours')


# ---- the hub ----------------------------------------------------------------------------------------------

@pytest.fixture
def hub(local_hub, tmp_path):
    make_folder(tmp_path / 'served', 'llama')
    return local_hub


def test_a_repository_is_downloaded_once_and_equals_the_folder_it_is_served_from(hub, tmp_path):
    (a, one), (b, other) = loaded('me/tiny'), loaded(tmp_path / 'served')
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and one.meta == other.meta
    n = len(hub[0])
    loaded('me/tiny')
    assert len(hub[0]) == n  # so it works offline, too


def test_a_renamed_repository_is_found_and_its_checksum_too(hub, refused):
    assert loaded('old/name')[0].config.arch == 'llama'
    hub[1].digest = '0' * 64
    assert 'could not be downloaded' in refused('me/tiny')


def test_of_several_processes_one_downloads_and_the_others_wait_for_it(hub, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        with monkeypatch.context() as m:
            m.setenv('LOCAL_RANK', '0')
            find.download('me/tiny')
    monkeypatch.setattr(find.time, 'sleep', sleep)
    assert loaded('me/tiny')[0].config.arch == 'llama' and len(waited) == 1


def test_what_the_hubs_own_library_has_is_taken_from_its_cache(hub, tmp_path):
    cache = tmp_path / 'home' / 'hub' / 'models--me--else'
    make_folder(cache / 'snapshots' / 'abc', 'gpt2')
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text('abc')
    assert loaded('me/else')[0].config.arch == 'gpt2' and not hub[0]


def test_only_the_tokenizer_comes_where_only_that_is_needed(hub):
    assert find.tokenizer('me/tiny')['kind'] == 'json'
    assert not any('safetensors' in path for path in hub[0])


def test_a_token_opens_what_is_behind_a_consent(hub, monkeypatch, refused):
    assert 'HF_TOKEN' in refused('me/shut')
    monkeypatch.setenv('HF_TOKEN', 'secret')
    assert loaded('me/shut')[0].config.arch == 'llama'


def test_no_such_repository_a_wrong_checksum_no_network_end_in_one_line(hub, monkeypatch, refused, tmp_path):
    assert 'no/such does not exist' in refused('no/such')
    assert 'me/nothing on the hub has no config.json' in refused('me/nothing')
    hub[1].digest = '0' * 64
    assert 'could not be downloaded' in refused('me/tiny')
    left = list((tmp_path / 'home').rglob('*safetensors*'))
    assert not left, left  # a file of another checksum is not kept
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    err = refused('me/offline')
    assert 'offline' in err and 'ConnectionError' in err


def test_without_safetensors_the_line_names_it(theirs, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    assert 'pip install safetensors' in refused(theirs)


def test_a_model_of_sentencepiece_is_read_by_its_library(tmp_path, monkeypatch, mistake):
    meta = dict(kind='sentencepiece', model='', vocab_size=70, end=2)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'sentencepiece', None)
        assert 'pip install sentencepiece' in mistake(lambda argv: vocabulary.Tokenizer(meta))
    library = pytest.importorskip('sentencepiece')
    assert 'damaged' in mistake(lambda argv: vocabulary.Tokenizer(meta | dict(model='abcd')))
    out = io.BytesIO()
    library.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.splitlines()), model_writer=out,
                                       vocab_size=300, model_type='bpe', byte_fallback=True, minloglevel=2)
    meta = meta | dict(model=base64.b64encode(out.getvalue()).decode(), vocab_size=310)
    tokenizer = vocabulary.Tokenizer(meta)
    both = tmp_path / 'both'  # as LLaMA 2 has them
    make_folder(both, 'llama')
    source = tokenizer_json()
    source['model']['byte_fallback'] = True
    (both / 'tokenizer.json').write_text(json.dumps(source))
    (both / 'tokenizer.model').write_bytes(out.getvalue())
    assert find.tokenizer(str(both))['kind'] == 'sentencepiece'
    for text in ('To be, or not', 'naïve 漢字 🤷🏽'):
        assert tokenizer.decode(tokenizer.encode(text)) == ' ' + text  # its space before every text
    assert tokenizer.vocab_size == 310 and tokenizer.pieces[309] == b'' and tokenizer.n_bytes([2]) == 0


# ---- weights that are not what they seem ------------------------------------------------------------------

def rewrite(folder, change):
    """Change the tensors of a folder: change(dict) -> dict."""
    path = folder / 'model.safetensors'
    tensors = change(safetensors.load_file(path))
    whole = torch.contiguous_format
    safetensors.save_file({name: t.clone(memory_format=whole) for name, t in tensors.items()}, path)


def with_head(tensors):
    return tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].clone()}


def without(tensors, *names):
    return {name: t for name, t in tensors.items() if name not in names}


def bare(tensors):
    return {name.removeprefix('model.'): t for name, t in tensors.items()}


EMBED = 'model.embed_tokens.weight'
TIED = {  # how an embedding that is also the head may be stored
    'as the embedding': lambda t: without(t, 'lm_head.weight'),
    'as both': with_head,
    'as the head': lambda t: without(with_head(t), EMBED),
    'without the prefix': lambda t: bare(without(t, 'lm_head.weight')),
    'without the prefix, as both': lambda t: bare(with_head(t)),
    'beside constants': lambda t: without(t, 'lm_head.weight') | {
        f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(2) for i in range(2)}}


@pytest.mark.parametrize('stored', TIED)
def test_a_tied_embedding_may_be_stored_under_either_name_and_without_the_prefix(stored, tmp_path):
    theirs = tmp_path / 'theirs'
    want = make_folder(theirs, 'llama', tie_word_embeddings=True)[EMBED]
    rewrite(theirs, TIED[stored])
    net, _ = loaded(theirs)
    assert torch.equal(net.gpt.embed.weight[:300], want) and net.gpt.head is None
    x = torch.randint(300, (2, 20))
    assert torch.allclose(net.gpt(x), library_logits(theirs, x), atol=1e-4)


def test_gpt2_with_its_constants_and_its_head_beside_is_the_same(tmp_path):
    want = make_folder(tmp_path / 'theirs', 'gpt2')['wte.weight']
    mask = torch.ones(24, 24).tril().bool().view(1, 1, 24, 24)
    rewrite(tmp_path / 'theirs', lambda t: t | {
        f'h.{i}.attn.{name}': value for i in range(2)
        for name, value in (('bias', mask), ('masked_bias', torch.tensor(-1e4)))})
    rewrite(tmp_path / 'theirs', lambda t: {f'transformer.{name}': v for name, v in t.items()}
            | {'lm_head.weight': t['wte.weight'].clone()})
    assert torch.equal(loaded(tmp_path / 'theirs')[0].gpt.embed.weight[:300], want)


Q = 'model.layers.0.self_attn.q_proj.weight'


@pytest.mark.parametrize('change, words', [
    (lambda t: t | {Q: t[Q].to(torch.int8)}, [Q, 'I8', 'quantised']),
    (lambda t: t | {Q: t[Q].to(torch.float8_e4m3fn)}, [Q, 'F8', 'quantised']),
    (lambda t: t | {Q: t[Q].to(torch.uint8)}, [Q, 'U8', 'quantised']),
    (lambda t: t | {Q + '_scale': torch.ones(1)}, [Q + '_scale', 'no place']),
    (lambda t: t | {Q.replace('weight', 'SCB'): torch.ones(16)}, ['q_proj.SCB', 'no place']),
    (lambda t: t | {Q.replace('weight', 'bias'): torch.ones(16)}, ['q_proj.bias', 'no place']),
    (lambda t: t | {Q.replace('layers.0', 'layers.2'): t[Q]}, ['layers.2', 'no place']),
    (lambda t: t | {'model.layers.0.self_attn.q_norm.weight': torch.ones(4)}, ['q_norm', 'no place']),
    (lambda t: without(t, Q), [Q, 'missing']),
    (lambda t: without(t, 'lm_head.weight'), ['lm_head.weight', 'missing']),
    (lambda t: t | {EMBED: t[EMBED][:200]}, [EMBED, '(200, 16)']),
    (lambda t: bare(t) | {'embed_tokens.weight': t[EMBED], 'model.x': torch.ones(1)},
     ['model.x', 'no place']),
    (lambda t: t | {'embed_tokens.weight': t[EMBED]}, ['twice', 'model.'])])
def test_tensors_that_config_json_does_not_speak_of_are_refused_by_name(change, words, tmp_path, refused):
    make_folder(tmp_path / 'theirs', 'llama')
    rewrite(tmp_path / 'theirs', change)
    err = refused(tmp_path / 'theirs')
    assert all(word in err for word in words), err


def test_an_index_that_is_older_than_the_file_beside_it_is_left_out(theirs, refused):
    want = loaded(theirs)[0].state_dict()
    tensors = safetensors.load_file(theirs / 'model.safetensors')
    old = {name: torch.zeros_like(t) for name, t in tensors.items()}
    safetensors.save_file(old, theirs / 'old.safetensors')
    index = dict(weight_map=dict.fromkeys(old, 'old.safetensors'))
    (theirs / 'model.safetensors.index.json').write_text(json.dumps(index))
    got = loaded(theirs)[0].state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
    (theirs / 'model.safetensors').rename(theirs / 'new.safetensors')  # two shards with the same tensors
    index['weight_map'] |= {next(iter(old)): 'new.safetensors'}
    (theirs / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert 'in another file' in refused(theirs)


@pytest.mark.parametrize('ids, end', [(dict(eos_token_id=300), None), (dict(eos_token_id=-1), None),
                                      (dict(eos_token_id=[400, 7]), 7), (dict(eos_token_id=None), None),
                                      (dict(bos_token_id=10 ** 6), 299), (dict(eos_token_id=[]), None),
                                      (dict(bos_token_id=[5]), 299)])
def test_ids_beyond_the_vocabulary_are_none(ids, end, tmp_path):
    make_folder(tmp_path / 'theirs', 'llama', **ids)
    net, tokenizer = loaded(tmp_path / 'theirs')
    assert tokenizer.end == end and tokenizer.n_bytes([65, 299]) == (1 if end == 299 else 14)
    assert net.gpt.embed.weight.shape == (301, 16) and net.gpt.embed.weight.isfinite().all()


def test_the_caches_of_the_hubs_library_are_where_its_variables_say(monkeypatch, tmp_path):
    for name in ('HF_HOME', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    cache_of = lambda: find.places('a/b')[1].parents[1]
    assert cache_of() == tmp_path / '.cache' / 'huggingface' / 'hub'
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    assert str(cache_of()) == '/x/huggingface/hub'
    monkeypatch.setenv('HF_HOME', '~/hf')
    assert cache_of() == tmp_path / 'hf' / 'hub'
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'c'))
    cache = tmp_path / 'c' / 'models--a--b'
    make_folder(cache / 'snapshots' / '123', 'llama')
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text('123')
    assert find.download('a/b') == cache / 'snapshots' / '123'


@pytest.mark.parametrize('name', ['runs/exp1', 'out/mine', 'checkpoints/a', 'Runs/a', './a', '../a/b',
                                  'out-x/y'])
def test_a_path_of_ours_that_does_not_exist_is_not_looked_up_on_the_hub(name, workdir, monkeypatch, refused):
    monkeypatch.setattr(find, 'download', lambda *_: pytest.fail("asked the hub"))
    assert 'there is no ' in refused(name)


def test_a_written_folder_whose_config_was_changed_afterwards_is_refused(tmp_path, refused):
    own = tmp_path / 'own'
    make_folder(tmp_path / 'theirs', 'llama')
    folder.write_folder(read(tmp_path / 'theirs'), own)
    whole = json.loads((own / 'config.json').read_text())
    (own / 'config.json').write_text(json.dumps(whole | dict(rope_theta=77.0)))
    assert 'rope_base=77.0' in refused(own)
    (own / 'config.json').write_text(json.dumps(whole))
    rewrite(own, lambda t: t | {'unmask.marks': t['unmask.marks'][:, :8]})
    assert 'unmask.marks' in refused(own)
    rewrite(own, lambda t: without(t, 'unmask.marks'))
    assert 'unmask.marks is missing' in refused(own)
    (own / 'config.json').write_text(json.dumps({k: v for k, v in whole.items() if k != 'unmask'}))
    loaded(own)


def test_a_tokenizer_in_two_files_is_read_as_its_own_and_not_as_gpt2s(tmp_path):
    make_folder(tmp_path / 'theirs', 'gpt2')
    source = json.loads((tmp_path / 'theirs' / 'tokenizer.json').read_text())
    _, want = loaded(tmp_path / 'theirs')
    (tmp_path / 'theirs' / 'tokenizer.json').unlink()
    vocab = source['model']['vocab'] | {'<|endoftext|>': 299}
    (tmp_path / 'theirs' / 'vocab.json').write_text(json.dumps(vocab))
    merges = '\n'.join(' '.join(m) for m in source['model']['merges'])
    (tmp_path / 'theirs' / 'merges.txt').write_text(f'#version: 0.2\n{merges}\n')
    _, got = loaded(tmp_path / 'theirs')
    assert got.pieces == want.pieces and got.end == 299
    for text in AWKWARD[:-1]:
        assert got.encode(text) == want.encode(text)


def test_a_folder_is_a_model_of_others_or_checkpoints_of_ours_and_not_both(own, mistake, refused):
    train.main([*RUN, f'--init_from={own}', '--out_dir=out-a'])
    assert 'or checkpoints already' in mistake(export.main, '--out_dir=out-a', '--to=out-a')
    assert "Hugging Face's layout" in mistake(train.main, *RUN, f'--init_from={own}', f'--out_dir={own}')
    os.link('out-a/last.pt', own / 'last.pt')
    assert 'move one of them away' in refused(own)


def test_an_export_that_fails_leaves_nothing_and_one_that_does_not_is_readable_by_all(
        theirs, tmp_path, mistake, monkeypatch):
    checkpoint, out = read(theirs), tmp_path / 'out'

    def full(*_):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(folder.files.os, 'fsync', full)
        assert 'make room' in mistake(lambda argv: folder.write_folder(checkpoint, out))
        assert not list(out.iterdir())
    folder.write_folder(checkpoint, out)
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1 and len(list(out.iterdir())) == 3
