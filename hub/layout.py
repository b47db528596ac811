"""
What the tables of hub/families.py say of one model: the knobs in a config.json, and where the numbers of
each of our tensors lie.
"""
import functools

import torch

import common
from configurator import fail
from hub import ddit
from hub.families import FAMILIES, kin
from hub.tensors import Weights, read

DEFAULTS = dict(n_inner=None, layer_norm_epsilon=1e-5, num_key_value_heads=None, rms_norm_eps=1e-6,
                tie_word_embeddings=False, head_dim=None, n_kv_heads=None, weight_tying=False,
                time_conditioning=False, block_size=None)


# ---- config.json ------------------------------------------------------------------------------------------

def refuse(what):
    raise ValueError(f"{what} is not something model.py does")


def family_of(theirs, name='', tensors={}):
    """The table for a config.json (dict); name: of the model; tensors: {name: Stored}, if they are known.
    Raises ValueError."""
    for key in ('quantization_config', 'quantization', 'compression_config'):
        if theirs.get(key):
            raise ValueError(f"its weights are quantised ({key}: {theirs[key]}), which is not read here: "
                             f"take the model as it was before")
    kind = 'sedd' if 'graph' in theirs and 'noise' in theirs else theirs.get('model_type')
    if type(kind) is not str or kind not in FAMILIES:
        code = ", and what its own code (auto_map) does is not known: it is never run" \
            if 'auto_map' in theirs else ""
        raise ValueError(f"model_type={kind} is not one of: {', '.join(FAMILIES)}{code}")
    family = kin(FAMILIES[kind], theirs, name.lower(), tensors)
    if family.objective not in common.OBJECTIVES:
        raise ValueError(f"model_type={kind} is {family.objective} diffusion, an objective that this "
                         f"repository does not have")
    return family


def value_of(theirs, key, defaults={}):
    """The value of a key of config.json, 'a.b' is b in the dict a; KeyError if it is missing."""
    outer, dot, inner = key.partition('.')
    return theirs[outer][inner] if dot else (defaults | theirs)[key]


def shape_of(theirs, family):
    """The knobs of a config.json (dict), model.Config's and its objective's, but for what the rows of [MASK]
    decide. Raises ValueError for what model.py cannot do, KeyError for what is missing."""
    for name, able in family.only.items():
        try:
            value = value_of(theirs, name)
        except KeyError:
            continue
        if value not in able:
            refuse(f"{name}={value}")
    shape = {ours: value_of(theirs, name, DEFAULTS) for ours, name in family.knobs.items()}
    shape |= dict(arch=family.arch) | family.sets
    if family.arch == 'gpt2':
        for ours in ('n_embd', 'n_head', 'n_layer', 'block_size'):  # LLaMA's names are known for GPT-2, too
            alias = FAMILIES['llama'].knobs[ours]
            if theirs.get(alias, shape[ours]) != shape[ours]:
                raise ValueError(f"{ours}={shape[ours]} and {alias}={theirs[alias]} contradict each other")
        return shape | dict(n_inner=shape['n_inner'] or 0)
    if family.arch == 'ddit':
        return shape
    width, given = shape['n_embd'] // shape['n_head'], shape.get('head_width') or 0
    return shape | dict(n_kv_head=shape['n_kv_head'] or shape['n_head'], **rope_of(theirs),
                        head_width=given if given != width else 0)


def rope_of(theirs):
    """The rotary positions in a config.json, which transformers 5 calls `rope_parameters` and earlier ones
    `rope_scaling` -> knobs of model.Config. Raises ValueError, KeyError."""
    found = [theirs[name] for name in ('rope_parameters', 'rope_scaling') if theirs.get(name)]
    if not all(isinstance(rope, dict) for rope in found) or found[1:] and found[0] != found[1]:
        refuse(f"rotary positions of {' and '.join(map(str, found))}")
    rope, trained = found[0] if found else {}, 'original_max_position_embeddings'
    if trained in theirs and rope.get(trained, theirs[trained]) != theirs[trained]:
        raise ValueError(f"{trained} is {theirs[trained]} and {rope[trained]}")
    base = dict(rope_base=float(rope.get('rope_theta', theirs.get('rope_theta', 10000.0))))
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'default':
        return base
    if kind == 'linear':
        return base | dict(rope_factor=float(rope['factor']))
    if kind != 'llama3' or (rope['low_freq_factor'], rope['high_freq_factor']) != (1, 4):
        refuse(f"rotary positions of {rope}")
    return base | dict(rope_factor=float(rope['factor']), rope_trained=(theirs | rope)[trained])


def config_json(config, family, **changed):
    """A Config of ours (dataclass), some knobs changed -> the dict of a config.json."""
    c, theirs = config, {}
    if c.arch == 'llama':
        changed |= dict(n_kv_head=c.n_kv_head or c.n_head, n_inner=c.n_inner or 4 * c.n_embd,
                        head_width=c.width)
    for ours, name in family.knobs.items():
        outer, _, inner = name.partition('.')
        where = theirs.setdefault(outer, {}) if inner else theirs
        where[inner or outer] = changed.get(ours, getattr(c, ours))
    if c.arch == 'gpt2':
        theirs |= dict(n_ctx=theirs['n_positions'], n_inner=c.n_inner or None)
    if c.arch == 'llama':
        rope = None if c.rope_factor == 1 else dict(rope_type='linear', factor=c.rope_factor)
        if rope and c.rope_trained:
            rope |= dict(rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0,
                         original_max_position_embeddings=c.rope_trained)
        theirs |= dict(rope_theta=c.rope_base, rope_scaling=rope)
        theirs.setdefault('vocab_size', theirs.get('embedding_size'))
    if 'model' in theirs:  # SEDD's
        theirs['model'] |= dict(cond_dim=128, scale_by_sigma=True, dropout=0.1)
    return theirs | family.writes


# ---- tensors ----------------------------------------------------------------------------------------------

def names_of(family, ours):
    """Our names of tensors -> {name: list of theirs}, without the family's prefix. Raises ValueError for
    names that the family has none for."""
    found = {}
    for name in ours:
        if name.startswith('blocks.'):
            number, _, rest = name.removeprefix('blocks.').partition('.')
            module, _, kind = rest.rpartition('.')
            at = f'{family.body}{number}.'
            found[name] = [f'{at}{theirs}.{kind}' for theirs in family.block.get(module, [])]
        else:
            found[name] = [family.names[name]] if name in family.names else []
    homeless = [name for name, theirs in found.items() if not theirs and name not in ddit.OURS_ALONE]
    if homeless:
        raise ValueError(', '.join(homeless[:3]))
    return found


def transposed(name, family):
    """Is a matrix (in, out) there, where it is (out, in) here? So are those of GPT-2's blocks."""
    return (family.arch == 'gpt2' and name.startswith('blocks.') and name.endswith('weight')
            and 'norm' not in name)


def heights(name, n, config):
    """How many rows each of their tensors has, where several are one of ours of n rows."""
    if 'attn.qkv' in name:
        kv = (config.n_kv_head or config.n_head) * config.width
        return [n - 2 * kv, kv, kv]
    return [n // 2] * 2


def plain_names(stored, family):
    """{their name without the family's prefix: Stored}. The prefix may be missing."""
    known = {name.removeprefix(family.prefix): s for name, s in stored.items()}
    if len(known) < len(stored):
        fail("some tensors are there twice, with and without the prefix " + family.prefix)
    return known


def to_ours(stored, family, config, shapes, rows, marks):
    """Their tensors {plain name: Stored}, those that are used are removed -> our state dict of GPT, Weights.

    shapes: {our name: shape}; rows: of their embedding, of which the first V are the tokens'; marks: what the
    rows of [MASK] and [BOS] below those of the tokens are: the id of another row, None, the mean of all, or a
    function that gives all of them. Ends the script by name where a tensor is missing or of another shape.
    """
    def take(key, shape):
        if key not in stored:
            fail(f"the tensor {family.prefix * (key not in family.bare)}{key} is missing")
        if stored[key].shape != tuple(shape):
            fail(f"the tensor {stored[key].name} is of shape {stored[key].shape} instead of {tuple(shape)}")
        return stored.pop(key)
    names = names_of(family, shapes)
    made = ddit.folded(take, shapes, config.n_embd) if family.arch == 'ddit' else {}
    for name, theirs in names.items():
        if name in made:
            continue
        (n, *rest), turned = shapes[name], transposed(name, family)
        tall = [rows] if name.startswith(('embed.', 'head.')) else [n]
        tall = heights(name, n, config) if len(theirs) > 1 else tall
        found = [take(key, [*rest, h] if turned else [h, *rest]) for key, h in zip(theirs, tall)]
        made[name] = functools.partial(read, *found, transposed=turned, height=n)
    made['embed.weight'] = functools.partial(with_marks, made['embed.weight'], config.vocab_size, marks)
    return Weights(made)


def with_marks(embedding, V, marks):
    """The embedding, the rows below those of the V tokens replaced by the marks; see `to_ours`."""
    rows = embedding()
    row = lambda i: rows[:V].float().mean(0).to(rows.dtype) if i is None else rows[i]
    rows[V:] = marks() if callable(marks) else torch.stack([row(i) for i in marks])
    return rows


def to_theirs(weights, family, config):
    """A state dict of GPT with their embedding's rows -> their tensors {name: tensor}. Raises ValueError for
    one that has no place there."""
    out, weights = {}, ddit.unfolded(weights) if family.arch == 'ddit' else weights
    for name, theirs in names_of(family, weights).items():
        tensor = weights[name].T if transposed(name, family) else weights[name]
        rows = heights(name, len(tensor), config) if len(theirs) > 1 else [len(tensor)]
        out |= {key if key in family.bare else family.prefix + key: part.contiguous()
                for key, part in zip(theirs, tensor.split(rows))}
    return out
