"""
Folders in Hugging Face's layout: config.json, *.safetensors and a tokenizer, read and written.

Only tensors are read, no code (no pickle), and all of them: one that has no place in the model ends the
script, and so do quantised weights. What others do not have, the rows of [MASK] and [BOS] and the objective,
is written into a tensor `unmask.marks` and into config.json under `unmask`; others ignore it.
"""
import base64
import functools
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import common
import model
from configurator import convert, fail, knobs_of
from hub import adapt, layout
from parts import lora
from text import files
from text.vocabulary import library

PLAIN = ('F64', 'F32', 'F16', 'BF16')  # safetensors' names for the types of weights that are numbers
# constants of attention that may stand beside the weights, in older versions too
CONSTANTS = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')


# ---- tensors ----------------------------------------------------------------------------------------------

def shards(folder):
    """The names of the files that hold the tensors: model.safetensors, or else what the index says. (As in
    transformers; an index beside model.safetensors is an older one's.)"""
    index = folder / 'model.safetensors.index.json'
    if not index.is_file():
        return ['model.safetensors']
    names = files.read_json(index).get('weight_map')
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(Path(name).name != name or not name.endswith('.safetensors') for name in names):
        fail(f"{index} names no files, or others than *.safetensors beside it")
    return ['model.safetensors'] if (folder / 'model.safetensors').is_file() else names


def tensors_in(folder):
    """{name: tensor} of a folder, or the script ends. safetensors reads a tensor when it is used."""
    tensors, safetensors = {}, library('safetensors', 'weights in *.safetensors')
    for path in (folder / name for name in shards(folder)):
        if not path.is_file():
            fail(f"{path} is missing; weights in a pickle (pytorch_model.bin) are not read")
        try:
            file = safetensors.safe_open(path, 'pt')
        except Exception as e:  # SafetensorError is no class of Python's own
            fail(f"{path} is cut short or damaged ({e}): remove it and get it again")
        for name in file.keys():
            kind = file.get_slice(name).get_dtype()
            if kind not in PLAIN and not name.endswith(CONSTANTS):
                fail(f"the tensor {name} in {path} is of type {kind}: quantised weights are not read here, "
                     f"take the model as it was before")
            if name in tensors:
                fail(f"the tensor {name} is in {path} and in another file of the same model")
            tensors[name] = file.get_tensor(name)
    return tensors


def renamed(tensors, config):
    """The tensors by the names of `layout.names_of`, however they are stored: with or without the prefix of
    the body, and an embedding that is also the head under either name, or both."""
    prefix, embed, head = 'model.', 'model.embed_tokens.weight', 'lm_head.weight'
    if config.arch == 'gpt2':
        tensors = {name.removeprefix('transformer.'): t for name, t in tensors.items()}
        embed = 'wte.weight'
    elif not any(name.startswith(prefix) for name in tensors):
        tensors = {name if name in (head, 'unmask.marks') else prefix + name: t
                   for name, t in tensors.items()}
    if (config.tied or config.arch == 'gpt2') and head in tensors:
        same = tensors.pop(head)
        if not tensors.setdefault(embed, same).equal(same):
            fail(f"{embed} and {head} differ, but config.json says that they are one (tie_word_embeddings)")
    return tensors


def take(tensors, name, shape):
    """Remove a tensor of this shape from the dict and return it in float32, or the script ends."""
    if name not in tensors:
        fail(f"the tensor {name} is missing")
    tensor = tensors.pop(name)
    if list(tensor.shape) != list(shape):
        fail(f"the tensor {name} is of shape {tuple(tensor.shape)} instead of {tuple(shape)}")
    return tensor.float()


# ---- reading ----------------------------------------------------------------------------------------------

def read_folder(folder):
    """A folder in Hugging Face's layout -> a checkpoint dict, see common.load; or the script ends. One of
    others is an autoregressive model; its [BOS] is the row of their bos token."""
    folder = Path(folder)
    theirs = files.read_json(folder / 'config.json')
    own, (shape, shapes) = part_of_ours(theirs), shape_in(folder, theirs)
    tensors = renamed(tensors_in(folder), shape)
    weights = layout.to_ours(functools.partial(take, tensors), shape, shapes)
    embed = weights['embed.weight']
    if own:
        for name in adapt.SHAPE & own['config'].keys() - {'block_size'}:
            if own['config'][name] != getattr(shape, name):
                fail(f"{folder / 'config.json'} says {name}={getattr(shape, name)}, its part `unmask` "
                     f"{own['config'][name]}")
        n = len(adapt.marks(own['objective'], own['config']))
        marks = take(tensors, 'unmask.marks', (n, shape.n_embd))
    else:
        own = dict(objective='ar', config=asdict(shape), run={'dataset': ''}, iter=0, tokens=0)
        ids = [i for i in (special(theirs, 'bos'), special(theirs, 'eos')) if i is not None]
        marks = embed[ids[0]:ids[0] + 1] if ids else embed.mean(0, keepdim=True)
    # what is left may change what the others mean, as the scales of quantised weights do, or biases
    rest = [name for name in tensors if not name.endswith(CONSTANTS)]
    if rest:
        fail(f"the tensor {min(rest)} (of {len(rest)}) has no place in this model: config.json and the "
             f"weights do not belong together, or they are quantised or of a kind that model.py does not do")
    weights['embed.weight'] = torch.cat([embed, marks])
    weights = {f'gpt.{name}': p for name, p in weights.items()}
    return own | dict(tokenizer=tokenizer_of(folder, theirs), model=weights, ema=weights)


def shape_in(folder, theirs):
    """config.json (dict) -> (model.Config, {name: shape} of GPT's tensors), or the script ends."""
    try:
        shape, knobs = layout.shape_of(theirs), knobs_of(model.Config)
        shape = model.Config(**{name: convert(knobs[name], value) for name, value in shape.items()})
        with torch.device('meta'):
            return shape, {name: p.shape for name, p in model.GPT(shape, True, marks=0).state_dict().items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        fail(f"{folder / 'config.json'}: {f'{e} is missing' if type(e) is KeyError else e}")


def part_of_ours(theirs):
    """What `write_folder` has put into a config.json, {} for one of others; or the script ends."""
    own = theirs.get('unmask', {})
    parts = common.KINDS.items() - dict(model=dict, ema=dict).items()
    if not isinstance(own, dict) or own and not all(isinstance(own.get(k), t) for k, t in parts):
        fail("the part `unmask` of config.json is damaged: without it the folder is read as others' model")
    return own


def special(theirs, name):
    """The id of the bos or eos token in a config.json, the first of several; None if it has no row."""
    ids = theirs.get(f'{name}_token_id')
    ids = ids if isinstance(ids, list) else [ids]
    return next((i for i in ids if type(i) is int and 0 <= i < theirs['vocab_size']), None)


def tokenizer_of(folder, theirs):
    """The meta of the tokenizer in a folder, see vocabulary.Tokenizer; or the script ends."""
    own = part_of_ours(theirs).get('tokenizer', {})
    if own.get('kind', 'json') != 'json':
        return own
    size, there = theirs.get('vocab_size'), lambda name: (folder / name).is_file()
    if not isinstance(size, int):
        fail(f"{folder / 'config.json'} has no vocab_size")
    known = dict(vocab_size=size, bos=special(theirs, 'bos'), end=special(theirs, 'eos')) | own
    source = files.read_json(folder / 'tokenizer.json') if there('tokenizer.json') else {}
    pairs = source.get('model')
    of_bytes = isinstance(pairs, dict) and not pairs.get('byte_fallback')
    if there('tokenizer.model') and not of_bytes:  # LLaMA 2 has both files
        data = base64.b64encode(files.read_bytes(folder / 'tokenizer.model')).decode()
        return known | dict(kind='sentencepiece', model=data)
    if not source and there('vocab.json') and there('merges.txt'):  # GPT-2's, as first published
        vocab = files.read_json(folder / 'vocab.json')
        merges = [line for line in files.read_text(folder / 'merges.txt').split('\n')
                  if line.strip() and not line.startswith('#version')]
        added = [dict(id=vocab[name], content=name) for name in ('<|endoftext|>',) if name in vocab]
        source = dict(model=dict(type='BPE', vocab=vocab, merges=merges), added_tokens=added,
                      pre_tokenizer=dict(type='ByteLevel'))
    if source:
        return known | dict(kind='json', json=source)
    if theirs.get('model_type') == 'gpt2' and size == 50257:
        return dict(kind='gpt2')
    fail(f"{folder} holds no tokenizer.json and no tokenizer.model")


# ---- writing ----------------------------------------------------------------------------------------------

def write_folder(checkpoint, folder):
    """A checkpoint dict of ours -> a folder in Hugging Face's layout, adapters merged; or the script ends.
    Returns their tensors."""
    tensors, shape = in_layout(checkpoint)
    meta, theirs, small = checkpoint['tokenizer'], layout.config_json(shape), {}
    own = {name: checkpoint[name] for name in ('objective', 'run', 'iter', 'tokens')}
    own |= dict(config=checkpoint['config'] | {'lora_rank': 0}, tokenizer=meta,
                rows=checkpoint.get('rows', {}))
    if meta['kind'] == 'json':
        own['tokenizer'] = {k: v for k, v in meta.items() if k != 'json'}
        theirs |= dict(eos_token_id=meta['end'], bos_token_id=meta.get('bos'))
        small['tokenizer.json'] = json.dumps(meta['json'], ensure_ascii=False).encode()
    else:
        print(f"note: a tokenizer of kind {meta['kind']} has no file in that layout, it goes into "
              f"config.json, where only this repository looks", file=sys.stderr)
    small['config.json'] = json.dumps(theirs | dict(unmask=own), indent=1).encode()
    whole = library('safetensors.torch', "a folder in this layout").save(tensors, {'format': 'pt'})
    files.write_all(folder, small | {'model.safetensors': whole})
    return tensors


def in_layout(checkpoint):
    """A checkpoint dict -> (their tensors and ours of the marks, model.Config), or the script ends."""
    objective, lost = checkpoint['objective'], "has no counterpart in Hugging Face's layout"
    arch = checkpoint['config'].get('arch', 'ours')
    if objective not in ('ar', 'masked') or arch == 'ours':
        fail(f"objective={objective}, arch={arch} {lost}: ar and masked of arch=gpt2 and arch=llama have")
    config = common.concept(objective).Config(**checkpoint['config'])
    weights = lora.folded(checkpoint['ema'], checkpoint['config'])
    weights = {name.removeprefix('gpt.'): p for name, p in weights.items()}
    rows, V = weights['embed.weight'], config.vocab_size
    weights['embed.weight'] = rows[:V]
    shape = model.Config(**{f.name: getattr(config, f.name) for f in fields(model.Config)})
    if arch == 'gpt2':  # with shift there is a position more, for [BOS]
        shape = replace(shape, block_size=len(weights['pos.weight']))
    odd = weights.keys() ^ layout.names_of(shape).keys()
    if odd:
        fail(f"the checkpoint {lost}: {', '.join(sorted(odd)[:3])}")
    return layout.to_theirs(weights, shape) | {'unmask.marks': rows[V:].contiguous()}, shape
