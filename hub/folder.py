"""
Folders in Hugging Face's layout: config.json, *.safetensors and a tokenizer, read and written.

Only tensors are read, no code (no pickle), and all of them: one that has no place in the model ends the
script, and so do quantised weights. hub/families.py has the tables of the models that are known. What others
do not have, the objective and a tokenizer without a file, is written into config.json under `unmask`; so are,
into a tensor `unmask.marks`, rows of [MASK] and [BOS] where a layout has no place for them. Others ignore it.
"""
import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import common
from configurator import convert, fail, knobs_of
from hub import adapt, layout
from hub.families import Family, family_to_write
from hub.tensors import PLAIN, Weights, read, stored_in
from parts import lora
from text import files
from text.chat import marks_in, template_in
from text.vocabulary import library

# constants that may stand beside the weights
CONSTANTS = ('.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq', 'rotary_emb.cos_cached',
             'rotary_emb.sin_cached', 'sampling_eps_min', 'sampling_eps_max')


# ---- reading ----------------------------------------------------------------------------------------------

def read_folder(folder, name=''):
    """A folder in Hugging Face's layout -> a checkpoint dict, see common.load, whose tensors are read when
    they are asked for; or the script ends. name: of the model, if it is not the folder's."""
    folder, stored = Path(folder), stored_in(Path(folder), CONSTANTS)
    what = described(folder, name, stored)
    try:
        with torch.device('meta'):
            net = common.concept(what.objective).Model(what.config).gpt
    except (ValueError, RuntimeError) as e:
        fail(f"{folder / 'config.json'}: {e}")
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    stored = one_embedding(layout.plain_names(stored, what.family), what.family, what.config)
    marks = marks_beside(stored, shapes['embed.weight'], what.config) if what.marks is None else what.marks
    embedding = stored.get(what.family.names['embed.weight'])
    dtype = PLAIN[embedding.type] if embedding else None
    weights = layout.to_ours(stored, what.family, what.config, shapes, what.rows, marks)
    if stored:  # it may change what the others mean, as the scales of quantised weights do, or biases
        fail(f"the tensor {min(s.name for s in stored.values())} (of {len(stored)}) has no place in this "
             f"model: config.json and the weights do not belong together, or they are quantised or of a kind "
             f"that model.py does not do")
    weights = Weights({f'gpt.{name}': make for name, make in weights.made.items()}, dtype)
    own = part_of_ours(what.theirs) or dict(run={'dataset': ''}, iter=0, tokens=0)
    return own | dict(objective=what.objective, config=asdict(what.config), tokenizer=what.tokenizer,
                      model=weights, ema=weights)


class Described(NamedTuple):
    """What the small files of a folder say."""
    theirs: dict       # config.json
    family: Family
    objective: str
    config: object     # of the objective
    tokenizer: dict    # the meta of vocabulary.Tokenizer
    rows: int          # of their embedding
    marks: list        # what our rows of [MASK] and [BOS] are, see layout.to_ours; None: a tensor of its own


def described(folder, name='', stored={}):
    """What kind of model lies in a folder, from its small files; or the script ends. name: of the model, if
    it is not the folder's; stored: its tensors, if they are there."""
    folder = Path(folder)
    theirs = files.read_json(folder / 'config.json')
    own = part_of_ours(theirs)
    try:
        family = layout.family_of(theirs, name or folder.absolute().name, stored)
        knobs = layout.shape_of(theirs, family)
        if family.by_tensor and stored:
            plain = layout.plain_names(stored, family)
            knobs['vocab_size'] = plain[family.names['embed.weight']].shape[0]
        objective = own.get('objective', family.objective)
        rows = knobs['vocab_size'] + (family.mask == 'beyond')
        if own:
            config, marks = own['config'], own.get('mark_rows')
            check_same(knobs, config, folder)
        else:
            config, marks = without_marks(knobs, family, theirs, rows, folder)
        Config = common.concept(objective).Config
        of_concept = knobs_of(Config)
        config = Config(**{name: convert(of_concept[name], value) for name, value in config.items()})
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        fail(f"{folder / 'config.json'}: {f'{e} is missing' if type(e) is KeyError else e}")
    tokenizer = tokenizer_of(folder, theirs, family, config.vocab_size)
    return Described(theirs, family, objective, config, tokenizer, rows, marks)


def check_same(knobs, config, folder):
    """Do config.json and its part `unmask` say the same? Or the script ends."""
    default = dict(n_inner=4 * knobs['n_embd'], n_kv_head=knobs['n_head'])  # what 0 stands for
    for name in adapt.SHAPE & config.keys() & knobs.keys() - {'block_size', 'vocab_size'}:
        if (config[name] or default.get(name)) != (knobs[name] or default.get(name)):
            fail(f"{folder / 'config.json'} says {name}={knobs[name]}, its part `unmask` {config[name]}")


def without_marks(knobs, family, theirs, rows, folder):
    """The knobs of a model of others, whose rows of the embedding are tokens and, maybe, [MASK] -> (knobs of
    ours, what the rows of our marks are, see layout.to_ours)."""
    config = dict(knobs)
    ids = [i for i in (special(theirs, 'bos'), special(theirs, 'eos')) if i is not None]
    bos = ids[0] if ids else None
    if family.mask is None:
        return config, [bos]
    mask = mask_of(family.mask, theirs, rows, folder)
    if mask == rows - 1:  # the last row is no token
        config['vocab_size'] = rows - 1
    else:
        config['old_mask'] = mask
    if config.get('shift') and config.get('bos', True):
        config['block_size'] -= 1  # [BOS] takes a place
        return config, [mask, bos]
    return config, [mask]


def mask_of(mask, theirs, rows, folder):
    """The id of [MASK]. mask: see families.Family. Raises ValueError, KeyError."""
    if mask in ('last', 'beyond'):
        return rows - 1
    if isinstance(mask, str) and mask in theirs:
        mask = theirs[mask]
    elif isinstance(mask, str):
        path = folder / 'tokenizer.json'
        added = files.read_json(path).get('added_tokens', []) if path.is_file() else added_in(folder, {})
        found = {token.get('content'): token.get('id') for token in added}
        if mask not in found:
            raise ValueError(f"its [MASK] is the token {mask}, which the folder has no tokenizer.json for")
        mask = found[mask]
    if type(mask) is not int or not 0 <= mask < rows:
        raise ValueError(f"the id of [MASK], {mask}, has no row in an embedding of {rows}")
    return mask


def one_embedding(stored, family, config):
    """The stored tensors without a head that is the embedding once more, under either name or both."""
    embed, head = family.names['embed.weight'], 'lm_head.weight'
    if (config.tied or config.arch == 'gpt2') and head in stored:
        same = stored.pop(head)
        if embed in stored and not read(stored[embed]).equal(read(same)):
            fail(f"{embed} and {head} differ, but config.json says that they are one (tie_word_embeddings)")
        stored.setdefault(embed, same)
    return stored


def marks_beside(stored, shape, config):
    """A function that gives the rows of the marks, which we wrote into a tensor of its own."""
    if 'unmask.marks' not in stored:
        fail("the tensor unmask.marks is missing")
    marks, n = stored.pop('unmask.marks'), shape[0] - config.vocab_size
    if marks.shape != (n, shape[1]):
        fail(f"the tensor unmask.marks is of shape {marks.shape} instead of {(n, shape[1])}")
    return lambda: read(marks)


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
    size = theirs.get('vocab_size', 0)
    return next((i for i in ids if type(i) is int and 0 <= i < size), None)


def tokenizer_of(folder, theirs, family, size):
    """The meta of the tokenizer in a folder of a model of `size` tokens, see vocabulary.Tokenizer; or the
    script ends."""
    own, there = part_of_ours(theirs).get('tokenizer', {}), lambda name: (folder / name).is_file()
    if own.get('kind', 'json') != 'json':
        return own
    known = dict(vocab_size=size, bos=special(theirs, 'bos'), end=special(theirs, 'eos'))
    known |= dict(first=True) if family.first and not own else {}
    template = template_in(folder)
    known |= dict(chat=dict(template=template, **marks_in(folder))) if template else {}
    known |= own
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
        source = dict(model=dict(type='BPE', vocab=vocab, merges=merges),
                      added_tokens=added_in(folder, vocab), pre_tokenizer=dict(type='ByteLevel'))
        if family.words:
            split = dict(type='Split', pattern=dict(Regex=family.words), behavior='Isolated', invert=False)
            source |= dict(normalizer=dict(type='NFC'), pre_tokenizer=dict(
                type='Sequence', pretokenizers=[split, dict(type='ByteLevel', use_regex=False)]))
    if source:
        return known | dict(kind='json', json=source)
    if family.tokenizer == 'gpt2' and size >= 50257:
        more = dict(vocab_size=size) if size > 50257 else {}  # GIDD's padding
        return dict(kind='gpt2') | more | ({'first': True} if family.first else {})
    fail(f"{folder} holds no tokenizer.json and no tokenizer.model")


def added_in(folder, vocab):
    """The special tokens of a folder without tokenizer.json, as they would stand in that."""
    path = folder / 'added_tokens.json'
    added = files.read_json(path) if path.is_file() else {}
    added |= {name: vocab[name] for name in ('<|endoftext|>',) if name in vocab}
    return [dict(id=i, content=name) for name, i in added.items()]


# ---- writing ----------------------------------------------------------------------------------------------

def write_folder(checkpoint, folder):
    """A checkpoint dict of ours -> a folder in the layout of its family, adapters merged; or the script ends.
    Returns their tensors."""
    config, family = in_layout(checkpoint)
    weights = lora.folded(checkpoint['ema'], checkpoint['config'])
    weights = {name.removeprefix('gpt.'): p for name, p in weights.items()}
    own = {name: checkpoint[name] for name in ('objective', 'run', 'iter', 'tokens')}
    merged = {name: 0 for name in checkpoint['config'] if name == 'lora_rank'}
    own |= dict(config=checkpoint['config'] | merged, rows=checkpoint.get('rows', {}))
    beside = place_marks(weights, family, config.vocab_size, own)
    try:
        tensors = layout.to_theirs(weights, family, config) | beside
    except ValueError as e:
        fail(f"the checkpoint has no counterpart in Hugging Face's layout: {e}")
    rows, size = len(weights['embed.weight']), config.block_size
    theirs = layout.config_json(config, family, vocab_size=rows - (family.mask == 'beyond'),
                                block_size=len(weights.get('pos.weight', range(size))))
    if isinstance(family.mask, str) and family.mask.endswith('_id'):
        theirs[family.mask] = rows - 1
    if len(own.get('mark_rows', [])) > 1:
        theirs['bos_token_id'] = config.vocab_size
    small = tokenizer_files(checkpoint['tokenizer'], own, theirs)
    small['config.json'] = json.dumps(theirs | dict(unmask=own), indent=1).encode()
    whole = library('safetensors.torch', "a folder in this layout").save(tensors, {'format': 'pt'})
    files.write_all(folder, small | {'model.safetensors': whole})
    return tensors


def place_marks(weights, family, V, own):
    """Put the rows of [MASK] and [BOS] where the family has them, behind the tokens', [MASK] last, and say so
    in `own`; or, where it has none, into a tensor beside, which is returned as {name: tensor}."""
    rows = weights['embed.weight']
    n = len(rows) - V
    if family.mask is None:
        weights['embed.weight'] = rows[:V]
        return {'unmask.marks': rows[V:].contiguous()}
    weights['embed.weight'] = torch.cat([rows[:V], rows[V:].flip(0)])
    own['mark_rows'] = [len(rows) - 1 - i for i in range(n)]
    for name in {'head.weight', 'head.bias'} & weights.keys():
        p = weights[name]
        weights[name] = torch.cat([p, p.new_zeros(n, *p.shape[1:])])
    return {}


def tokenizer_files(meta, own, theirs):
    """The files {name: bytes} of a tokenizer; what has none goes into our part of config.json."""
    if meta['kind'] != 'json':
        own['tokenizer'] = meta
        print(f"note: a tokenizer of kind {meta['kind']} has no file in that layout, it goes into "
              f"config.json, where only this repository looks", file=sys.stderr)
        return {}
    own['tokenizer'] = {k: v for k, v in meta.items() if k != 'json'}
    theirs |= dict(eos_token_id=meta['end'], pad_token_id=meta['end'])
    theirs.setdefault('bos_token_id', meta.get('bos'))
    return {'tokenizer.json': json.dumps(meta['json'], ensure_ascii=False).encode()}


def in_layout(checkpoint):
    """A checkpoint dict -> (its Config, the Family of its layout), or the script ends."""
    objective = checkpoint['objective']
    config = common.concept(objective).Config(**checkpoint['config'])
    family = family_to_write(objective, config)
    if family is None:
        fail(f"objective={objective}, arch={config.arch} has no counterpart in Hugging Face's layout: ar and "
             f"masked of arch=gpt2, llama and ddit have, block and sedd of ddit")
    return config, family
