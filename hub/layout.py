"""
GPT-2 and LLaMA in Hugging Face's layout: what config.json says and how tensors are named.
"""
import torch

# what config.json calls the knobs of model.Config
KNOBS = dict(
    gpt2=dict(vocab_size='vocab_size', block_size='n_positions', n_layer='n_layer', n_head='n_head',
              n_embd='n_embd', n_inner='n_inner', norm_eps='layer_norm_epsilon'),
    llama=dict(vocab_size='vocab_size', block_size='max_position_embeddings', n_layer='num_hidden_layers',
               n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
               n_inner='intermediate_size', norm_eps='rms_norm_eps', tied='tie_word_embeddings'))
DEFAULTS = dict(n_inner=None, layer_norm_epsilon=1e-5, num_key_value_heads=None, rms_norm_eps=1e-6,
                tie_word_embeddings=False)
# what model.py does, where others do something else
DONE = dict(gpt2=dict(activation_function='gelu_new', scale_attn_weights=True, is_causal=True,
                      scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True),
            llama=dict(hidden_act='silu', attention_bias=False, mlp_bias=False, is_causal=True,
                       partial_rotary_factor=1.0))
# the modules of a block: ours -> theirs, of which several may be one of ours, one below the other
BLOCK = dict(
    gpt2={'norm1': ['ln_1'], 'attn.qkv': ['attn.c_attn'], 'attn.proj': ['attn.c_proj'],
          'norm2': ['ln_2'], 'mlp.fc': ['mlp.c_fc'], 'mlp.proj': ['mlp.c_proj']},
    llama={'norm1': ['input_layernorm'], 'norm2': ['post_attention_layernorm'],
           'attn.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
           'attn.proj': ['self_attn.o_proj'], 'mlp.fc': ['mlp.gate_proj', 'mlp.up_proj'],
           'mlp.proj': ['mlp.down_proj']})


# ---- config.json ------------------------------------------------------------------------------------------

def refuse(what):
    raise ValueError(f"{what} is not something model.py does")


def shape_of(theirs):
    """A config.json (dict) -> the knobs of model.Config. Raises ValueError for what model.py cannot do,
    KeyError for what is missing."""
    kind = theirs.get('model_type')
    for name in ('quantization_config', 'quantization', 'compression_config'):
        if theirs.get(name):
            raise ValueError(f"its weights are quantised ({name}: {theirs[name]}), which is not read here: "
                             f"take the model as it was before")
    if kind not in ('gpt2', 'llama'):
        raise ValueError(f"model_type={kind} is not one of: gpt2, llama")
    for name, known in DONE[kind].items():
        if theirs.get(name, known) != known:
            refuse(f"{name}={theirs[name]}")
    shape = {ours: (DEFAULTS | theirs)[name] for ours, name in KNOBS[kind].items()} | dict(arch=kind)
    if kind == 'gpt2':
        for ours in ('n_embd', 'n_head', 'n_layer', 'block_size'):  # LLaMA's names are known for GPT-2, too
            alias = KNOBS['llama'][ours]
            if theirs.get(alias, shape[ours]) != shape[ours]:
                raise ValueError(f"{ours}={shape[ours]} and {alias}={theirs[alias]} contradict each other")
        return shape | dict(n_inner=shape['n_inner'] or 0)
    width = shape['n_embd'] // shape['n_head']
    if (theirs.get('head_dim') or width) != width:
        refuse(f"head_dim={theirs['head_dim']}")
    return shape | dict(n_kv_head=shape['n_kv_head'] or shape['n_head'], **rope_of(theirs))


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


def config_json(config):
    """model.Config -> the dict of a config.json."""
    c = config
    theirs = {name: getattr(c, ours) for ours, name in KNOBS[c.arch].items()}
    if c.arch == 'gpt2':
        return theirs | dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], n_ctx=c.block_size,
                             n_inner=c.n_inner or None, activation_function='gelu_new',
                             tie_word_embeddings=True)
    rope = None if c.rope_factor == 1 else dict(rope_type='linear', factor=c.rope_factor)
    if rope and c.rope_trained:
        rope |= dict(rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=c.rope_trained)
    return theirs | dict(model_type='llama', architectures=['LlamaForCausalLM'], hidden_act='silu',
                         num_key_value_heads=c.n_kv_head or c.n_head,
                         intermediate_size=c.n_inner or 4 * c.n_embd,
                         rope_theta=c.rope_base, rope_scaling=rope)


# ---- tensors ----------------------------------------------------------------------------------------------

def names_of(config):
    """Our name of every tensor of GPT -> a list of theirs (GPT-2's without the prefix `transformer.`)."""
    if config.arch == 'gpt2':
        body, kinds = 'h', ('weight', 'bias')
        names = {'embed.weight': ['wte.weight'], 'pos.weight': ['wpe.weight'],
                 'norm.weight': ['ln_f.weight'], 'norm.bias': ['ln_f.bias']}
    else:
        body, kinds = 'model.layers', ('weight',)
        names = {'embed.weight': ['model.embed_tokens.weight'], 'norm.weight': ['model.norm.weight']}
        if not config.tied:
            names['head.weight'] = ['lm_head.weight']
    return names | {f'blocks.{i}.{ours}.{kind}': [f'{body}.{i}.{name}.{kind}' for name in theirs]
                    for i in range(config.n_layer)
                    for ours, theirs in BLOCK[config.arch].items() for kind in kinds}


def transposed(name, config):
    """Is a matrix (in, out) there, where it is (out, in) here? So are those of GPT-2's blocks."""
    return (config.arch == 'gpt2' and name.startswith('blocks.') and name.endswith('weight')
            and 'norm' not in name)


def heights(name, config):
    """How many rows each of their tensors has, where several are one of ours."""
    if 'attn.qkv' in name:
        kv = (config.n_kv_head or config.n_head) * (config.n_embd // config.n_head)
        return [config.n_embd, kv, kv]
    return [config.n_inner or 4 * config.n_embd] * 2


def to_ours(get, config, shapes):
    """Their tensors -> a state dict of GPT with an embedding of V rows. get: their name, shape -> tensor;
    shapes: {our name: shape}."""
    weights = {}
    for name, theirs in names_of(config).items():
        n, *rest = shapes[name]
        if transposed(name, config):
            weights[name] = get(theirs[0], [*rest, n]).T.contiguous()
        else:
            rows = heights(name, config) if len(theirs) > 1 else [n]
            weights[name] = torch.cat([get(key, [n, *rest]) for key, n in zip(theirs, rows)])
    return weights


def to_theirs(weights, config):
    """A state dict of GPT with an embedding of V rows -> their tensors {name: tensor}."""
    out, prefix = {}, 'transformer.' if config.arch == 'gpt2' else ''
    for name, theirs in names_of(config).items():
        tensor = weights[name].T if transposed(name, config) else weights[name]
        rows = heights(name, config) if len(theirs) > 1 else [len(tensor)]
        out |= {prefix + key: part.contiguous() for key, part in zip(theirs, tensor.split(rows))}
    return out
