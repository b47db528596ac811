"""
The weights of others: GPT-2 and LLaMA shapes in Hugging Face's layout, read and written.

    python train.py config/adapt_gpt2.py --init_from=gpt2            # or any of what follows
    python sample.py --out_dir=HuggingFaceTB/SmolLM2-135M --start="The capital of Italy is" --length=16
    python eval.py --out_dir=FOLDER --input=my.txt
    python -m hub.pretrained --out_dir=out-adapt --to=FOLDER             # a checkpoint of ours in that layout

Wherever a script takes a checkpoint it may be named in four ways: a folder or file of ours; a folder with
config.json, *.safetensors and a tokenizer; gpt2, gpt2-medium, gpt2-large, gpt2-xl; owner/name on the Hugging
Face hub. The last two are downloaded once, into HF_HOME, unless the hub's own library has them already (in
HF_HUB_CACHE); HF_ENDPOINT names a mirror, HF_TOKEN opens what is behind a consent. Only tensors are read, no
code (no pickle), and all of them: one that has no place in the model ends the script, as quantised weights
do.

What is written is such a folder again, adapters merged. What others do not have, the rows of [MASK] and
[BOS] and the objective, stands in a tensor `unmask.marks` and in config.json under `unmask`; others leave it
out.
"""
import base64
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import torch

from hub import adapt
import common
from text import files
from parts import lora
import model
from configurator import Filename, convert, fail, knobs_of, script, settings
from hub import web

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
MISSING = "pip install safetensors"


@dataclass
class Config:
    out_dir: Filename = ''  # the checkpoint to write down; '': the newest out*/
    which: str = 'best'     # best | last
    to: Filename = ''       # the folder that is made


# ---- names: ours -> theirs --------------------------------------------------------------------------------

def gpt2_names(n_layer):
    """Our names -> those of GPT-2 (without their prefix `transformer.`)."""
    names = {'embed.weight': 'wte.weight', 'pos.weight': 'wpe.weight',
             'norm.weight': 'ln_f.weight', 'norm.bias': 'ln_f.bias'}
    parts = {'norm1': 'ln_1', 'attn.qkv': 'attn.c_attn', 'attn.proj': 'attn.c_proj',
             'norm2': 'ln_2', 'mlp.fc': 'mlp.c_fc', 'mlp.proj': 'mlp.c_proj'}
    return {k: (v,) for k, v in names.items()} | {
        f'blocks.{i}.{a}.{w}': (f'h.{i}.{b}.{w}',)
        for i in range(n_layer) for a, b in parts.items() for w in ('weight', 'bias')}


def llama_names(n_layer, tied):
    """Our names -> those of LLaMA; several are one of ours, one below the other."""
    names = {'embed.weight': ('model.embed_tokens.weight',), 'norm.weight': ('model.norm.weight',)}
    parts = {'norm1': ('input_layernorm',), 'norm2': ('post_attention_layernorm',),
             'attn.qkv': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
             'attn.proj': ('self_attn.o_proj',), 'mlp.fc': ('mlp.gate_proj', 'mlp.up_proj'),
             'mlp.proj': ('mlp.down_proj',)}
    return names | ({} if tied else {'head.weight': ('lm_head.weight',)}) | {
        f'blocks.{i}.{a}.weight': tuple(f'model.layers.{i}.{b}.weight' for b in those)
        for i in range(n_layer) for a, those in parts.items()}


def names_of(config):
    """Our name of every tensor -> a tuple of theirs. config: of model.GPT."""
    return gpt2_names(config.n_layer) if config.arch == 'gpt2' else llama_names(config.n_layer, config.tied)


def turned(name, config):
    """Is a matrix (in, out) there, where it is (out, in) here? So are those of GPT-2's layers."""
    return config.arch == 'gpt2' and name.startswith('blocks.') and name.endswith('weight') \
        and 'norm' not in name


def pieces_of(name, config):
    """How many rows each of their tensors has of one of ours that holds several."""
    width, kv = config.n_embd // config.n_head, config.n_kv_head or config.n_head
    if 'attn.qkv' in name:
        return [config.n_embd, kv * width, kv * width]
    return [config.n_inner or 4 * config.n_embd] * 2


# ---- config.json ------------------------------------------------------------------------------------------

def shape_of(theirs):
    """A config.json (dict) -> the knobs of model.Config. Raises ValueError for what model.py cannot do."""
    kind = theirs.get('model_type')
    for name in ('quantization_config', 'quantization', 'compression_config'):
        if theirs.get(name):
            how = theirs[name].get('quant_method', '') if isinstance(theirs[name], dict) else theirs[name]
            raise ValueError(f"its weights are quantised ({name}{f': {how}' if how else ''}), which is not "
                             f"read here: take the model as it was before")
    refused = {'gpt2': dict(activation_function='gelu_new', scale_attn_weights=True, is_causal=True,
                            scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True),
               'llama': dict(hidden_act='silu', attention_bias=False, mlp_bias=False, is_causal=True,
                             partial_rotary_factor=1.0)}
    if kind not in ('gpt2', 'llama'):
        raise ValueError(f"model_type={kind} is not one of: gpt2, llama")
    for name, known in refused[kind].items():
        if theirs.get(name, known) != known:
            raise ValueError(f"{name}={theirs[name]} is not something model.py does")
    if kind == 'gpt2':
        for name, alias in dict(n_embd='hidden_size', n_head='num_attention_heads',
                                n_layer='num_hidden_layers', n_positions='max_position_embeddings').items():
            if theirs.get(alias, theirs[name]) != theirs[name]:
                raise ValueError(f"{name}={theirs[name]} and {alias}={theirs[alias]} contradict each other")
        return dict(arch='gpt2', vocab_size=theirs['vocab_size'], block_size=theirs['n_positions'],
                    n_layer=theirs['n_layer'], n_head=theirs['n_head'], n_embd=theirs['n_embd'],
                    n_inner=theirs.get('n_inner') or 0, norm_eps=theirs.get('layer_norm_epsilon', 1e-5))
    rope = rope_in(theirs)
    width, heads = theirs['hidden_size'], theirs['num_attention_heads']
    if (theirs.get('head_dim') or width // heads) != width // heads:
        raise ValueError(f"head_dim={theirs['head_dim']} is not something model.py does")
    return dict(arch='llama', vocab_size=theirs['vocab_size'], block_size=theirs['max_position_embeddings'],
                n_layer=theirs['num_hidden_layers'], n_head=heads, n_embd=width,
                n_kv_head=theirs.get('num_key_value_heads') or heads, n_inner=theirs['intermediate_size'],
                rope_base=float(rope.get('rope_theta', theirs.get('rope_theta', 10000.0))),
                norm_eps=theirs.get('rms_norm_eps', 1e-6), tied=theirs.get('tie_word_embeddings', False),
                **rope_of(rope))


def rope_in(theirs):
    """What a config.json says of rotary positions: `rope_parameters` of transformers 5, `rope_scaling`
    before. Raises ValueError for two that differ."""
    found = [theirs[name] for name in ('rope_parameters', 'rope_scaling') if theirs.get(name)]
    if not all(isinstance(rope, dict) for rope in found) or found[1:] and found[0] != found[1]:
        raise ValueError(f"rotary positions of {' and '.join(map(str, found))} are not something model.py "
                         f"does")
    name, rope = 'original_max_position_embeddings', dict(found[0]) if found else {}
    if theirs.get(name, rope.get(name)) != rope.get(name, theirs.get(name)):
        raise ValueError(f"{name} is {theirs[name]} and {rope[name]}")
    return {name: theirs[name]} | rope if name in theirs else rope


def rope_of(rope):
    """What a config.json says of longer contexts -> the knobs of model.Config. Raises ValueError."""
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'default':
        return {}
    if kind == 'linear':
        return dict(rope_factor=float(rope['factor']))
    if kind != 'llama3' or (rope['low_freq_factor'], rope['high_freq_factor']) != (1, 4):
        raise ValueError(f"rotary positions of {rope} are not something model.py does")
    return dict(rope_factor=float(rope['factor']), rope_trained=rope['original_max_position_embeddings'])


def config_json(config):
    """model.Config -> the dict of a config.json."""
    c = config
    if c.arch == 'gpt2':
        return dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=c.vocab_size,
                    n_positions=c.block_size, n_ctx=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
                    n_embd=c.n_embd, n_inner=c.n_inner or None, layer_norm_epsilon=c.norm_eps,
                    activation_function='gelu_new', tie_word_embeddings=True)
    rope = None if c.rope_factor == 1 else dict(rope_type='linear', factor=c.rope_factor)
    if rope and c.rope_trained:
        rope |= dict(rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=c.rope_trained)
    return dict(model_type='llama', architectures=['LlamaForCausalLM'], vocab_size=c.vocab_size,
                max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head,
                hidden_size=c.n_embd, intermediate_size=c.n_inner or 4 * c.n_embd, hidden_act='silu',
                rope_theta=c.rope_base, rope_scaling=rope, rms_norm_eps=c.norm_eps,
                tie_word_embeddings=c.tied)


# ---- tensors ----------------------------------------------------------------------------------------------

PLAIN = ('F64', 'F32', 'F16', 'BF16')  # as safetensors calls the types of weights that are numbers
# what may stand beside the weights: constants of attention, also of older versions
CONSTANTS = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')


class Tensors:
    """The tensors of a folder by name, read when asked for: of model.safetensors, or of the files that
    model.safetensors.index.json names."""

    def __init__(self, folder):
        try:
            from safetensors import safe_open
        except ImportError:
            fail(f"reading {folder} needs the library safetensors: {MISSING}")
        self.where, self.used = {}, set()  # name -> (file, its name there)
        for name in shards(Path(folder)):
            path = Path(folder, name)
            if not path.is_file():
                fail(f"{path} is missing" + (": weights in a pickle (pytorch_model.bin) are not read"
                                             if Path(folder, 'pytorch_model.bin').is_file() else ""))
            try:
                file = safe_open(path, 'pt')
            except Exception as e:  # SafetensorError is no class of Python's own
                fail(f"{path} is cut short or damaged ({e}): remove it and get it again")
            for key in file.keys():
                kind = str(file.get_slice(key).get_dtype())
                if kind not in PLAIN and not key.endswith(CONSTANTS):
                    fail(f"the tensor {key} in {path} is of type {kind}: quantised weights are not read "
                         f"here, take the model as it was before")
                if key in self.where:
                    fail(f"the tensor {key} is in {path} and in another file of the same model")
                self.where[key] = file, key

    def get(self, name, shape):
        """One tensor in float32, or the script ends and names it. shape: its own, None: any."""
        if name not in self.where:
            fail(f"the tensor {name} is missing")
        self.used.add(name)
        file, key = self.where[name]
        tensor = file.get_tensor(key).float()
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            fail(f"the tensor {key} is of shape {tuple(tensor.shape)} instead of {tuple(shape)}")
        return tensor

    def settle(self, config):
        """Give the tensors the names of `names_of`, however they are stored: the prefix of the body may be
        there or not, and an embedding that is the head too may have either name, or both."""
        prefix, embed, head = 'model.', 'model.embed_tokens.weight', 'lm_head.weight'
        if config.arch == 'gpt2':
            self.where = {name.removeprefix('transformer.'): at for name, at in self.where.items()}
            embed = 'wte.weight'
        elif not any(name.startswith(prefix) for name in self.where):
            own = (head, 'unmask.marks')
            self.where = {name if name in own else prefix + name: at for name, at in self.where.items()}
        if (config.tied or config.arch == 'gpt2') and head in self.where:
            if embed in self.where and not self.get(embed, None).equal(self.get(head, None)):
                fail(f"{embed} and {head} differ, but config.json says that they are one "
                     f"(tie_word_embeddings)")
            self.where[embed] = self.where.pop(head)

    def check_rest(self):
        """A tensor that has not been asked for ends the script: it may change what the others mean, as the
        scales of quantised weights, biases and further layers do."""
        rest = [name for name in self.where if name not in self.used and not name.endswith(CONSTANTS)]
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            fail(f"the tensor {min(rest)}{more} has no place in this model: config.json and the weights do "
                 f"not belong together, or they are quantised or of a kind that model.py does not do")


def weights_of(tensors, config, shapes):
    """Their tensors -> a state dict of GPT with an embedding of V rows. shapes: of its tensors."""
    tensors.settle(config)
    weights = {}
    for name, theirs in names_of(config).items():
        shape = list(shapes[name])
        rows = pieces_of(name, config) if len(theirs) > 1 else shape[:1]
        if turned(name, config):
            weights[name] = tensors.get(theirs[0], shape[::-1]).T.contiguous()
        else:
            weights[name] = torch.cat([tensors.get(key, [n, *shape[1:]]) for key, n in zip(theirs, rows)])
    return weights


def tensors_of(weights, config):
    """A state dict of GPT with an embedding of V rows -> theirs, {name: tensor}."""
    out = {}
    for name, theirs in names_of(config).items():
        tensor = weights[name].T if turned(name, config) else weights[name]
        rows = pieces_of(name, config) if len(theirs) > 1 else [len(tensor)]
        prefix = 'transformer.' if config.arch == 'gpt2' else ''
        out |= {prefix + key: part.contiguous() for key, part in zip(theirs, tensor.split(rows))}
    return out


# ---- folders ----------------------------------------------------------------------------------------------

def shards(folder):
    """The names of the files that hold the tensors: model.safetensors, or what the index says. (An index
    beside model.safetensors is an older one's; transformers leaves it out too.)"""
    index = folder / 'model.safetensors.index.json'
    if not index.is_file():
        return ['model.safetensors']
    names = files.read_json(index).get('weight_map', {})
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name or not name.endswith('.safetensors') for name in names):
        fail(f"{index} names no files, or others than *.safetensors beside it")
    return ['model.safetensors'] if (folder / 'model.safetensors').is_file() else names


def part_of_ours(theirs):
    """What `write_folder` has put into a config.json, {} in one of others; or the script ends."""
    own = theirs.get('unmask', {})
    parts = dict(config=dict, run=dict, tokenizer=dict, objective=str, iter=int, tokens=int)
    if not isinstance(own, dict) or own and not all(isinstance(own.get(k), t) for k, t in parts.items()):
        fail("the part `unmask` of config.json is damaged: without it the folder is read as others' model")
    return own


def special(theirs, name):
    """The id of the bos or eos token in a config.json, of several the first; None if it has no row."""
    ids = theirs.get(f'{name}_token_id')
    ids = ids if isinstance(ids, list) else [ids]
    return next((i for i in ids if type(i) is int and 0 <= i < theirs['vocab_size']), None)


def tokenizer_of(folder, theirs):
    """The meta of the tokenizer in a folder, see vocabulary.Tokenizer."""
    own = part_of_ours(theirs).get('tokenizer', {})
    if own.get('kind', 'json') != 'json':
        return own
    size = theirs.get('vocab_size')
    if not isinstance(size, int):
        fail(f"{Path(folder, 'config.json')} has no vocab_size")
    known = dict(vocab_size=size, bos=special(theirs, 'bos'), end=special(theirs, 'eos')) | own
    pieces, model_file = Path(folder, 'tokenizer.json'), Path(folder, 'tokenizer.model')
    source = files.read_json(pieces) if pieces.is_file() else {}
    merges = source.get('model')
    of_bytes = isinstance(merges, dict) and not merges.get('byte_fallback')
    if model_file.is_file() and not of_bytes:  # LLaMA 2 has both files
        return known | dict(kind='sentencepiece', model=base64.b64encode(model_file.read_bytes()).decode())
    if not source and (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        source = of_two_files(folder)
    if source:
        return known | dict(kind='json', json=source)
    if theirs.get('model_type') == 'gpt2' and size == 50257:
        return dict(kind='gpt2')
    return fail(f"{folder} holds no tokenizer.json and no tokenizer.model")


def of_two_files(folder):
    """vocab.json and merges.txt, as GPT-2's tokenizer was first published -> the dict of a tokenizer.json."""
    vocab = files.read_json(folder / 'vocab.json')
    merges = [line for line in files.read_text(folder / 'merges.txt').split('\n')
              if line.strip() and not line.startswith('#version')]
    added = [dict(id=vocab[name], content=name) for name in ('<|endoftext|>',) if name in vocab]
    return dict(model=dict(type='BPE', vocab=vocab, merges=merges), added_tokens=added,
                pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False, use_regex=True))


def shape_in(folder, theirs):
    """config.json (dict) -> model.Config and the shapes of GPT's tensors, or the script ends."""
    try:
        shape = shape_of(theirs)
        knobs = knobs_of(model.Config)
        shape = model.Config(**{name: convert(knobs[name], value) for name, value in shape.items()})
        with torch.device('meta'):
            return shape, {name: p.shape for name, p in model.GPT(shape, True, marks=0).state_dict().items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        fail(f"{Path(folder, 'config.json')}: {f'{e} is missing' if type(e) is KeyError else e}")


def read_folder(folder):
    """A folder in Hugging Face's layout -> a checkpoint dict, see common.load. Of others' it is an
    autoregressive model, whose [BOS] is the row of their bos token. Or the script ends."""
    theirs = files.read_json(Path(folder, 'config.json'))
    shape, shapes = shape_in(folder, theirs)
    tensors, own = Tensors(folder), part_of_ours(theirs)
    weights = weights_of(tensors, shape, shapes)
    embed = weights['embed.weight']
    if own:
        for name in adapt.SHAPE & own['config'].keys() - {'block_size'}:
            if own['config'][name] != getattr(shape, name):
                fail(f"{Path(folder, 'config.json')} says {name}={getattr(shape, name)}, its part `unmask` "
                     f"{own['config'][name]}")
        if 'unmask.marks' not in tensors.where:
            fail(f"{folder} has lost the tensor unmask.marks, the rows of [MASK] and [BOS]; without the part "
                 f"`unmask` of its config.json it is read as others' model")
        marks = tensors.get('unmask.marks', (len(adapt.marks(own['objective'], own['config'])), shape.n_embd))
    else:
        bos = next((i for i in (special(theirs, 'bos'), special(theirs, 'eos')) if i is not None), None)
        marks = embed.mean(0, keepdim=True) if bos is None else embed[bos:bos + 1]
    tensors.check_rest()
    weights['embed.weight'] = torch.cat([embed, marks])
    weights = {f'gpt.{name}': p for name, p in weights.items()}
    return dict(objective=own.get('objective', 'ar'), config=own.get('config', asdict(shape)),
                run=own.get('run', {'dataset': ''}), tokenizer=tokenizer_of(folder, theirs),
                model=weights, ema=weights, iter=own.get('iter', 0), tokens=own.get('tokens', 0))


def write_model(folder, tensors, others):
    """model.safetensors and the other files {name: bytes}, all or none; or the script ends."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    temporary = files.temporary(folder / 'model.safetensors')
    with files.disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, {'format': 'pt'})
            os.umask(mask := os.umask(0))
            temporary.chmod(0o666 & ~mask)  # as any other file; the library gives it to its owner alone
            files.write_all(folder, others)
            os.replace(temporary, folder / 'model.safetensors')
        except SafetensorError as e:
            raise OSError(str(e))
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(checkpoint, folder):
    """A checkpoint dict of ours -> a folder in Hugging Face's layout, or the script ends."""
    if not importlib.util.find_spec('safetensors'):
        fail(f"writing {folder} needs the library safetensors: {MISSING}")
    config = common.concept(checkpoint['objective']).Config(**checkpoint['config'])
    if checkpoint['objective'] not in ('ar', 'masked') or config.arch == 'ours':
        fail(f"objective={checkpoint['objective']}, arch={getattr(config, 'arch', '')} has no counterpart "
             f"in Hugging Face's layout: ar and masked of arch=gpt2 and arch=llama have")
    weights = lora.folded(checkpoint['ema'], checkpoint['config'])
    weights = {name.removeprefix('gpt.'): p for name, p in weights.items()}
    embed, V = weights['embed.weight'], config.vocab_size
    weights['embed.weight'] = embed[:V]
    if len(weights.get('head.weight', embed[:V])) != V:
        fail("a head that predicts [MASK] (d3pm) has no counterpart in Hugging Face's layout")
    shape = model.Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(model.Config)})
    if config.arch == 'gpt2':  # with shift there is a position more, for [BOS]
        shape = dataclasses.replace(shape, block_size=len(weights['pos.weight']))
    try:
        tensors = tensors_of(weights, shape)
    except (KeyError, RuntimeError) as e:
        fail(f"the checkpoint has no counterpart in Hugging Face's layout: {e}")
    extra = weights.keys() - names_of(shape).keys()
    if extra:
        fail(f"the checkpoint has no counterpart in Hugging Face's layout: {', '.join(sorted(extra)[:3])}")
    meta, folder = checkpoint['tokenizer'], Path(folder)
    plain = {**checkpoint['config'], 'lora_rank': 0}
    own = dict(objective=checkpoint['objective'], config=plain,
               **{name: checkpoint[name] for name in ('run', 'iter', 'tokens')})
    theirs, small = config_json(shape), {}
    if meta['kind'] == 'json':
        own['tokenizer'] = {k: v for k, v in meta.items() if k != 'json'}
        theirs |= dict(eos_token_id=meta['end'], bos_token_id=meta.get('bos'))
        small['tokenizer.json'] = json.dumps(meta['json'], ensure_ascii=False).encode()
    else:
        own['tokenizer'] = meta
        print(f"note: a tokenizer of kind {meta['kind']} has no file in that layout, it goes into "
              f"config.json, where only this repository looks", file=sys.stderr)
    small['config.json'] = json.dumps(theirs | dict(unmask=own), indent=1).encode()
    write_model(folder, tensors | {'unmask.marks': embed[V:].contiguous()}, small)
    return tensors


# ---- the hub ----------------------------------------------------------------------------------------------

def hf_home():
    caches = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return Path(os.environ.get('HF_HOME') or Path(caches, 'huggingface')).expanduser()


def hub_cache():
    """Where the hub's own library keeps repositories."""
    named = os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE')
    return Path(named).expanduser() if named else hf_home() / 'hub'


def whole(folder, weights):
    """Does the folder hold all there is to a model, its weights too if told so?"""
    needed = ['config.json', *(shards(folder) if weights else [])]
    if not all((folder / name).exists() for name in needed):
        return False
    tokens = any((folder / name).exists() for name in ('tokenizer.json', 'tokenizer.model'))
    return tokens or files.read_json(folder / 'config.json').get('model_type') == 'gpt2'  # tiktoken has those


def snapshot(repository):
    """The folder in which the hub's own library keeps a repository, if it does."""
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    try:
        return folder / 'snapshots' / (folder / 'refs' / 'main').read_text().strip()
    except OSError:
        return folder


def published(url, headers):
    """The sha256 that the hub publishes for a large file, or ''; None if there is no such file. Raises
    requests.RequestException."""
    for _ in range(5):
        response = requests.head(url, headers=headers, timeout=20)
        there = urljoin(url, response.headers.get('location', ''))
        if not response.is_redirect or urlsplit(there).netloc != urlsplit(url).netloc:
            break  # to where large files lie; what is published about them is said here
        url = there  # the repository has another name now, as gpt2 has
    if response.status_code == 404:
        return None
    if response.status_code in (401, 403):
        raise PermissionError
    response.raise_for_status()
    etag = response.headers.get('x-linked-etag', '').strip('"')
    return etag if len(etag) == 64 else ''


def download(repository, weights=True):
    """owner/name, or gpt2 -> a folder with its files (weights: also those of the model), downloaded unless
    they are there. Or the script ends."""
    folder = hf_home() / 'unmask' / repository.replace('/', '--')
    for there in (snapshot(repository), folder):
        if whole(there, weights):
            return there
    while int(os.environ.get('LOCAL_RANK', 0)):  # of several processes one downloads
        time.sleep(1)
        if whole(folder, weights):
            return folder
    token = os.environ.get('HF_TOKEN')
    headers = {'Authorization': f'Bearer {token}'} if token else {}

    def get(name, needed=False):
        """Is the file there now?"""
        if (folder / name).exists():
            return True
        url = web.hub(repository, name, '')
        try:
            sha256 = published(url, headers)
            if sha256 is None:
                return fail(f"{repository} on the hub has no {name}") if needed else False
            web.download(url, folder / name, sha256, headers)
        except PermissionError:
            fail(f"{repository} does not exist here nor on the hub, or is behind a consent, for which "
                 f"HF_TOKEN must hold a token")
        except (requests.RequestException, ValueError) as e:
            fail(f"{url} could not be downloaded ({type(e).__name__}): run the same command again, it goes "
                 f"on where it stopped; offline, name a folder that holds the model")
        return True
    get('config.json', needed=True)
    if not (get('tokenizer.json') or get('tokenizer.model')):
        get('vocab.json'), get('merges.txt')
    if weights and not get('model.safetensors'):
        get('model.safetensors.index.json')
        for name in shards(folder):
            get(name, needed=True)
    return folder


def tokenizer(source):
    """The meta of the tokenizer of a model, named as for `find`. Or the script ends."""
    folder = Path(source)
    if Path(source, 'last.pt').is_file() or folder.is_file():
        meta = find(source)[1]['tokenizer']
    else:
        if not folder.is_dir():
            folder = download(source, weights=False)
        meta = tokenizer_of(folder, files.read_json(folder / 'config.json'))
    return {k: v for k, v in meta.items() if k not in ('source', 'sha256', 'before', 'sep')}


# the first part of a path that is rather a folder here than an owner on the hub
OURS = re.compile(r'out.*|(run|experiment|exp|log|checkpoint|ckpt|model|result|save|train|test|tmp|data'
                  r'|config)s?', re.IGNORECASE)


def find(source, which='best'):
    """What a person calls a checkpoint (see above; '': the newest out*/) -> (its name, checkpoint dict), or
    the script ends."""
    path = Path(source)
    if source and path.is_dir() and (path / 'config.json').is_file():
        if (path / 'best.pt').is_file() or (path / 'last.pt').is_file():
            fail(f"{path}/ holds a config.json with its model and checkpoints of ours too: move one of them "
                 f"away")
        return path, read_folder(path)
    if path.is_file():
        return path, common.load(path)
    hub = re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', source) and path.suffix != '.pt' and \
        not path.parent.exists() and not OURS.fullmatch(path.parts[0])
    if source in GPT2 and not path.exists() or hub:
        return source, read_folder(download(source))
    if source and not path.exists() and len(path.parts) == 1 and not source.startswith('out'):
        fail(f"there is no {source} here: `python train.py config/train_mdlm.py` makes a checkpoint; "
             f"others' are {', '.join(GPT2)}, and owner/name on the hub")
    path = common.find_checkpoint(source, which)
    return path, common.load(path)


def main(argv):
    config, _ = settings(argv, __doc__, Config)
    if not config.to:
        fail("where to? --to=FOLDER")
    if Path(config.to, 'config.json').exists():
        fail(f"{config.to} holds a model already: name another folder")
    if any(Path(config.to).glob('*.pt')):
        fail(f"{config.to} holds checkpoints of ours: name another folder")
    files.folder(config.to, 'to')
    path, checkpoint = find(config.out_dir, config.which)
    tensors = write_folder(checkpoint, config.to)
    print(f"{path}: {len(tensors)} tensors and the rows of the marks, to {config.to}/")


if __name__ == '__main__':
    script(main)
