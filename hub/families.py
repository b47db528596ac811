"""
The published models that can be read, as tables: what their config.json says, how their tensors are called,
and what kind of language model they are. hub/layout.py puts the tables to use; to add a family is to add a
table and a line of FAMILIES.
"""
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    arch: str                # of model.Config
    knobs: dict              # knobs of model.Config and the objective's: what config.json calls them
    names: dict              # our tensors outside of the blocks: what theirs are called
    block: dict              # our modules of a block: theirs, of which several may be one of ours
    body: str                # what the names in a block begin with, before its number
    prefix: str = ''         # in front of all names but of those in `bare`; may be missing
    bare: tuple = ('lm_head.weight',)
    objective: str = 'ar'    # ar | masked | sedd | block; another one that we do not have is refused
    only: dict = field(default_factory=dict)   # keys of config.json: the values that can be done, if present
    sets: dict = field(default_factory=dict)   # knobs that all models of the family have
    # denoisers: the id of [MASK], the key of config.json that says it, its name in tokenizer.json, 'last' of
    # the rows, or 'beyond', one more than config.json says
    mask: object = None
    first: bool = False      # was every row in training begun by <|endoftext|>?
    by_tensor: bool = False  # may config.json be wrong about the number of rows?
    tokenizer: str = ''      # 'gpt2': that one, where the folder has none
    words: str = ''          # regular expression of words, where there are merges and no tokenizer.json
    writes: dict = field(default_factory=dict)  # what a config.json that we write says besides


# ---- bodies -----------------------------------------------------------------------------------------------

LLAMA = Family(
    arch='llama', body='layers.', prefix='model.',
    knobs=dict(vocab_size='vocab_size', block_size='max_position_embeddings', n_layer='num_hidden_layers',
               n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
               n_inner='intermediate_size', norm_eps='rms_norm_eps', tied='tie_word_embeddings',
               head_width='head_dim'),
    names={'embed.weight': 'embed_tokens.weight', 'norm.weight': 'norm.weight',
           'head.weight': 'lm_head.weight'},
    block={'norm1': ['input_layernorm'], 'norm2': ['post_attention_layernorm'],
           'attn.qkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
           'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm'],
           'attn.proj': ['self_attn.o_proj'], 'mlp.fc': ['mlp.gate_proj', 'mlp.up_proj'],
           'mlp.proj': ['mlp.down_proj']},
    only=dict(hidden_act=('silu',), attention_bias=(False,), mlp_bias=(False,), is_causal=(True,),
              partial_rotary_factor=(1.0,), use_sliding_window=(False,)),
    writes=dict(model_type='llama', architectures=['LlamaForCausalLM'], hidden_act='silu'))
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = replace(LLAMA, words=QWEN_WORDS, sets=dict(qkv_bias=True),
                only=LLAMA.only | dict(attention_bias=(True,)),
                writes=dict(model_type='qwen2', architectures=['Qwen2ForCausalLM'], hidden_act='silu'))
QWEN3 = replace(LLAMA, words=QWEN_WORDS, sets=dict(qk_norm=True),
                writes=dict(model_type='qwen3', architectures=['Qwen3ForCausalLM'], hidden_act='silu'))

GPT2 = Family(
    arch='gpt2', body='h.', prefix='transformer.',
    knobs=dict(vocab_size='vocab_size', block_size='n_positions', n_layer='n_layer', n_head='n_head',
               n_embd='n_embd', n_inner='n_inner', norm_eps='layer_norm_epsilon'),
    names={'embed.weight': 'wte.weight', 'pos.weight': 'wpe.weight', 'norm.weight': 'ln_f.weight',
           'norm.bias': 'ln_f.bias'},
    block={'norm1': ['ln_1'], 'attn.qkv': ['attn.c_attn'], 'attn.proj': ['attn.c_proj'],
           'norm2': ['ln_2'], 'mlp.fc': ['mlp.c_fc'], 'mlp.proj': ['mlp.c_proj']},
    only=dict(activation_function=('gelu_new',), scale_attn_weights=(True,), is_causal=(True,),
              scale_attn_by_inverse_layer_idx=(False,), tie_word_embeddings=(True,)),
    tokenizer='gpt2',
    writes=dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], activation_function='gelu_new',
                tie_word_embeddings=True))

# the body of MDLM and its kin (arXiv 2406.07524); the changes that a noise level makes: hub/ddit.py
DDIT = Family(
    arch='ddit', body='blocks.', prefix='backbone.', bare=(), tokenizer='gpt2',
    knobs=dict(vocab_size='vocab_size', block_size='model_length', n_layer='n_blocks', n_head='n_heads',
               n_embd='hidden_dim'),
    names={'embed.weight': 'vocab_embed.embedding', 'norm.weight': 'output_layer.norm_final.weight',
           'head.weight': 'output_layer.linear.weight', 'head.bias': 'output_layer.linear.bias',
           'time.fc.weight': 'sigma_map.mlp.0.weight', 'time.fc.bias': 'sigma_map.mlp.0.bias',
           'time.proj.weight': 'sigma_map.mlp.2.weight', 'time.proj.bias': 'sigma_map.mlp.2.bias',
           'film.weight': 'output_layer.adaLN_modulation.weight',
           'film.bias': 'output_layer.adaLN_modulation.bias'},
    block={'norm1': ['norm1'], 'attn.qkv': ['attn_qkv'], 'attn.proj': ['attn_out'], 'norm2': ['norm2'],
           'mlp.fc': ['mlp.0'], 'mlp.proj': ['mlp.2'], 'film': ['adaLN_modulation']},
    mask='last', only=dict(cond_dim=(128,), causal=(False,), adaln=(True,)))

# ---- families ---------------------------------------------------------------------------------------------

DREAM = replace(QWEN2, objective='masked', mask='mask_token_id',
                sets=dict(qkv_bias=True, shift=True, bos=False),
                writes=dict(model_type='Dream', architectures=['DreamModel'], hidden_act='silu'))
LLADA = replace(
    LLAMA, objective='masked', mask='mask_token_id', body='transformer.blocks.', bare=(),
    knobs=dict(vocab_size='embedding_size', block_size='max_sequence_length', n_layer='n_layers',
               n_head='n_heads', n_kv_head='n_kv_heads', n_embd='d_model', n_inner='mlp_hidden_size',
               norm_eps='rms_norm_eps', tied='weight_tying'),
    names={'embed.weight': 'transformer.wte.weight', 'norm.weight': 'transformer.ln_f.weight',
           'head.weight': 'transformer.ff_out.weight'},
    block={'norm1': ['attn_norm'], 'norm2': ['ff_norm'], 'attn.qkv': ['q_proj', 'k_proj', 'v_proj'],
           'attn.proj': ['attn_out'], 'mlp.fc': ['ff_proj', 'up_proj'], 'mlp.proj': ['ff_out']},
    only=dict(block_type=('llama',), activation_type=('silu',), layer_norm_type=('rms',), rope=(True,),
              include_bias=(False,), include_qkv_bias=(False,), attention_layer_norm=(False,),
              scale_logits=(False,), input_emb_norm=(False,), alibi=(False,), clip_qkv=(None,),
              block_group_size=(1,), multi_query_attention=(False, None)),
    writes=dict(model_type='llada', architectures=['LLaDAModelLM'], block_type='llama', block_group_size=1,
                activation_type='silu', layer_norm_type='rms', rope=True, rope_full_precision=True,
                include_bias=False, include_qkv_bias=False, attention_layer_norm=False,
                scale_logits=False, input_emb_norm=False, alibi=False))

DIFFUGPT = replace(
    GPT2, objective='masked', mask='last', by_tensor=True, prefix='denoise_model.', sets=dict(shift=True),
    bare=('embed_tokens.weight', 'lm_head.weight'),
    names=GPT2.names | {'embed.weight': 'embed_tokens.weight'})
DIFFUGPT_S = replace(DIFFUGPT, mask=10541)  # an ordinary piece
DIFFULLAMA = replace(LLAMA, objective='masked', mask=811, sets=dict(shift=True))  # so is this
OPEN_DCODER = replace(DREAM, mask='<|mask|>')

MDLM = replace(
    DDIT, objective='masked', first=True, knobs=DDIT.knobs | dict(time_input='time_conditioning'),
    writes=dict(model_type='mdlm', architectures=['MDLM'], cond_dim=128, dropout=0.1))
BD3LM = replace(
    DDIT, objective='block', first=True, sets=dict(first_given=True),
    knobs=DDIT.knobs | dict(block_length='block_size'),
    only=DDIT.only | dict(time_conditioning=(False,), cross_attn=(True,)),
    writes=dict(model_type='bd3lm', architectures=['BD3LM'], cond_dim=128, dropout=0.1, adaln=True,
                causal=False, cross_attn=True, attn_backend='sdpa', time_conditioning=False, var_min=True,
                sampling_eps_min=0.001, sampling_eps_max=0.999))
SEDD = replace(
    DDIT, objective='sedd', prefix='', sets=dict(time_input=True),
    knobs=dict(vocab_size='tokens', block_size='model.length', n_layer='model.n_blocks',
               n_head='model.n_heads', n_embd='model.hidden_size'),
    mask='beyond',
    only={'graph.type': ('absorb',), 'model.scale_by_sigma': (True,), 'model.cond_dim': (128,)},
    writes=dict(graph=dict(type='absorb', file='data', report_all=False), noise=dict(
        type='loglinear', sigma_min=1e-4, sigma_max=20)))
GIDD = replace(
    DDIT, objective='masked', mask='[MASK]', by_tensor=True, prefix='',
    sets=dict(time_input=True, time_as_t=True),
    knobs=dict(vocab_size='vocab_size', block_size='max_seq_len', n_layer='num_hidden_layers',
               n_head='num_attention_heads', n_embd='hidden_size'),
    only=dict(p_uniform=(0.0,), timestep_cond_dim=(128,)))
A2D_BLOCKS = dict(block_length=32)  # of a2d's block diffusion, which its config.json does not say


def bidirectional(body):
    """Language models made denoisers by dllm (ZHZisZZ/dllm, a2d)."""
    return replace(body, objective='masked', mask='<|mask|>')


# by `model_type` in config.json
FAMILIES = {
    'gpt2': GPT2, 'llama': LLAMA, 'qwen2': QWEN2, 'qwen3': QWEN3, 'mdlm': MDLM, 'bd3lm': BD3LM, 'sedd': SEDD,
    'dit': GIDD, 'DUO': replace(DDIT, objective='uniform'), 'llada': LLADA, 'Dream': DREAM,
    'a2d-llama': bidirectional(LLAMA), 'a2d-qwen2': bidirectional(QWEN2), 'a2d-qwen3': bidirectional(QWEN3)}


def kin(family, theirs, name, tensors):
    """The family of a model whose config.json (dict) does not say all: by its name, in small letters, and by
    its tensors {name: Stored}, if they are known."""
    kind = theirs.get('model_type')
    if kind == 'gpt2' and ('diffugpt' in name or any(t.startswith('denoise_model.') for t in tensors)):
        embedding = tensors.get('embed_tokens.weight')
        rows = embedding.shape[0] if embedding else theirs.get('vocab_size')
        return DIFFUGPT_S if rows == 50257 else DIFFUGPT
    if kind == 'llama' and 'diffullama' in name:
        return DIFFULLAMA
    if kind == 'qwen2' and 'open-dcoder' in name:
        return OPEN_DCODER
    if 'bd3lm' in name and kind in ('a2d-llama', 'a2d-qwen2', 'a2d-qwen3'):
        return replace(family, objective='block', sets=family.sets | A2D_BLOCKS)
    return family


def family_to_write(objective, config):
    """The family in whose layout a model of ours with this Config is written, or None. Where it has no row
    for [MASK], that goes into a tensor of its own."""
    shift, bos = getattr(config, 'shift', False), getattr(config, 'bos', True)
    if config.arch == 'ddit':
        return dict(masked=MDLM, block=BD3LM, sedd=SEDD).get(objective)
    if objective not in ('ar', 'masked') or config.arch == 'ours':
        return None
    if config.arch == 'gpt2':
        return DIFFUGPT if objective == 'masked' and shift else GPT2
    body = QWEN3 if config.qk_norm else QWEN2 if config.qkv_bias else LLAMA
    if objective == 'masked' and body is LLAMA:
        return replace(DIFFULLAMA, mask='last') if shift else LLADA
    if objective == 'masked' and body is QWEN2 and shift and not bos:
        return DREAM
    return body
