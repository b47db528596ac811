"""
Tiny models in the layouts of published diffusion checkpoints: the keys of config.json, the names, shapes and
types of the tensors, the files, written down by hand and not by hub/families.py. Weights follow from their
names. `numbers` are what the published code made of them; NOTES.md says how (2026-11-27).
"""
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from text.vocabulary import byte_letters

D, L, H, C = 32, 2, 4, 128            # width, blocks, heads, width of the time condition
KV, HEAD3, MLP = 2, 16, 48           # key/value heads; head width of qwen3; inner width of the gated MLPs

GPT2 = {
    '_name_or_path': 'gpt2', 'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'],
    'attn_pdrop': 0.1, 'bos_token_id': 49, 'embd_pdrop': 0.1, 'eos_token_id': 49, 'initializer_range': 0.02,
    'layer_norm_epsilon': 1e-5, 'model_type': 'gpt2', 'n_ctx': 32, 'n_embd': D, 'n_head': H, 'n_inner': None,
    'n_layer': L, 'n_positions': 32, 'reorder_and_upcast_attn': False, 'resid_pdrop': 0.1,
    'scale_attn_by_inverse_layer_idx': False, 'scale_attn_weights': True, 'summary_activation': None,
    'summary_first_dropout': 0.1, 'summary_proj_to_labels': True, 'summary_type': 'cls_index',
    'summary_use_proj': True,
    'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 24}},
    'torch_dtype': 'bfloat16', 'transformers_version': '4.44.2', 'use_cache': True, 'vocab_size': 50}
QWEN2 = {
    'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 50, 'eos_token_id': 50,
    'hidden_act': 'silu', 'hidden_size': D, 'initializer_range': 0.02, 'intermediate_size': MLP,
    'max_position_embeddings': 32, 'max_window_layers': L, 'model_type': 'qwen2', 'num_attention_heads': H,
    'num_hidden_layers': L, 'num_key_value_heads': KV, 'rms_norm_eps': 1e-6, 'rope_theta': 1000000.0,
    'sliding_window': 32, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
    'transformers_version': '4.40.1', 'use_cache': True, 'use_mrope': False, 'use_sliding_window': False,
    'vocab_size': 56}
QWEN3 = {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 50, 'eos_token_id': 50, 'head_dim': HEAD3, 'hidden_act': 'silu', 'hidden_size': D,
    'initializer_range': 0.02, 'intermediate_size': MLP, 'max_position_embeddings': 32,
    'max_window_layers': L, 'model_type': 'qwen3', 'num_attention_heads': H,
    'num_hidden_layers': L, 'num_key_value_heads': KV,
    'rms_norm_eps': 1e-6, 'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None,
    'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0',
    'use_cache': True, 'use_sliding_window': False, 'vocab_size': 56}
A2D = {k: v for k, v in QWEN3.items() if k != 'torch_dtype'} | {
    'architectures': ['A2DQwen3LMHeadModel'], 'model_type': 'a2d-qwen3', 'dtype': 'bfloat16',
    'layer_types': ['full_attention'] * L, 'transformers_version': '4.57.0'}
MDLM = {
    '_name_or_path': 'kuleshov-group/mdlm-owt', 'architectures': ['MDLM'],
    'auto_map': {'AutoConfig': 'configuration_mdlm.MDLMConfig', 'AutoModelForMaskedLM': 'modeling_mdlm.MDLM'},
    'cond_dim': C, 'dropout': 0.1, 'hidden_dim': D, 'model_length': 32, 'model_type': 'mdlm', 'n_blocks': L,
    'n_heads': H, 'return_dict': False, 'time_conditioning': False, 'torch_dtype': 'float32',
    'transformers_version': '4.38.2', 'vocab_size': 41}

CONFIG = {
    'mdlm': MDLM,
    'bd3lm': MDLM | {
        '_name_or_path': 'kuleshov-group/bd3lm-owt-block_size4', 'architectures': ['BD3LM'],
        'attn_backend': 'sdpa', 'block_size': 4, 'cross_attn': True, 'model_type': 'bd3lm', 'var_min': True,
        'auto_map': {'AutoConfig': 'configuration_bd3lm.BD3LMConfig',
                     'AutoModelForMaskedLM': 'modeling_bd3lm.BD3LM'},
        'sampling_eps_max': 0.999, 'sampling_eps_min': 0.001, 'transformers_version': '4.49.0'},
    'duo': {
        '_name_or_path': 's-sahoo/duo', 'architectures': ['DUO'], 'causal': False, 'cond_dim': C,
        'auto_map': {'AutoConfig': 'config.DUOConfig', 'AutoModelForMaskedLM': 'model.DUO'},
        'dropout': 0.1, 'hidden_dim': D, 'model_length': 32, 'model_type': 'DUO', 'n_blocks': L, 'n_heads': H,
        'return_dict': False, 'torch_dtype': 'float32', 'transformers_version': '4.38.2', 'var_min': True,
        'vocab_size': 41},
    'sedd': {
        'data': {'cache_dir': 'data', 'train': 'openwebtext', 'valid': 'wikitext103'},
        'eval': {'batch_size': 512, 'perplexity': True, 'perplexity_batch_size': 32},
        'graph': {'file': 'data', 'report_all': False, 'type': 'absorb'},
        'model': {'cond_dim': C, 'dropout': 0.1, 'hidden_size': D, 'length': 32, 'n_blocks': L, 'n_heads': H,
                  'name': 'small', 'scale_by_sigma': True, 'type': 'ddit'},
        'ngpus': 8, 'noise': {'sigma_max': 20, 'sigma_min': 0.0001, 'type': 'loglinear'},
        'optim': {'beta1': 0.9, 'beta2': 0.999, 'eps': 1e-8, 'grad_clip': 1.0, 'lr': 0.0003,
                  'optimizer': 'AdamW', 'warmup': 2500, 'weight_decay': 0},
        'sampling': {'noise_removal': True, 'predictor': 'euler', 'steps': 128}, 'tokens': 40,
        'training': {'accum': 1, 'batch_size': 512, 'ema': 0.9999, 'eval_freq': 100, 'log_freq': 50,
                     'n_iters': 1300001, 'snapshot_freq': 50000, 'snapshot_freq_for_preemption': 10000,
                     'snapshot_sampling': True, 'weight': 'standard'}},
    'gidd': {
        'architectures': ['DIT'], 'attention_dropout': 0.0,
        'auto_map': {'AutoConfig': 'configuration_dit.DITConfig', 'AutoModelForMaskedLM': 'modeling_dit.DIT'},
        'hidden_size': D, 'max_seq_len': 24, 'model_type': 'dit', 'num_attention_heads': H,
        'num_hidden_layers': L, 'p_uniform': 0.0, 't_eps': 0.0001, 'timestep_cond_dim': C,
        'torch_dtype': 'float32', 'transformers_version': '4.47.1', 'vocab_size': 42},
    'diffugpt-s': GPT2,
    'diffugpt-m': GPT2 | {'_name_or_path': 'gpt2-medium', 'bos_token_id': 48, 'eos_token_id': 48},
    'diffullama': {
        '_name_or_path': 'meta-llama/Llama-2-7b-hf', 'architectures': ['LlamaForCausalLM'],
        'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'hidden_size': D, 'initializer_range': 0.02, 'intermediate_size': MLP,
        'max_position_embeddings': 32, 'mlp_bias': False, 'model_type': 'llama', 'num_attention_heads': H,
        'num_hidden_layers': L, 'num_key_value_heads': H, 'pretraining_tp': 1, 'rms_norm_eps': 1e-5,
        'rope_scaling': None, 'rope_theta': 10000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.44.2', 'use_cache': True, 'vocab_size': 48},
    'llada': {
        'activation_type': 'silu', 'alibi': False, 'alibi_bias_max': 8.0, 'architectures': ['LLaDAModelLM'],
        'attention_dropout': 0.0, 'attention_layer_norm': False, 'attention_layer_norm_with_affine': True,
        'auto_map': {'AutoConfig': 'configuration_llada.LLaDAConfig',
                     'AutoModel': 'modeling_llada.LLaDAModelLM',
                     'AutoModelForCausalLM': 'modeling_llada.LLaDAModelLM'},
        'bias_for_layer_norm': False, 'block_group_size': 1, 'block_type': 'llama', 'd_model': D,
        'embedding_dropout': 0.0, 'embedding_size': 60, 'eos_token_id': 41, 'flash_attention': False,
        'include_bias': False, 'include_qkv_bias': False, 'init_cutoff_factor': None, 'init_device': 'meta',
        'init_fn': 'mitchell', 'init_std': 0.02, 'input_emb_norm': False, 'layer_norm_type': 'rms',
        'layer_norm_with_affine': True, 'mask_token_id': 50, 'max_sequence_length': 32,
        'mlp_hidden_size': MLP, 'mlp_ratio': 4, 'model_type': 'llada',
        'multi_query_attention': None, 'n_heads': H, 'n_kv_heads': KV,
        'n_layers': L, 'pad_token_id': 41, 'precision': 'amp_bf16', 'residual_dropout': 0.0,
        'rms_norm_eps': 1e-5, 'rope': True, 'rope_full_precision': True, 'rope_theta': 500000.0,
        'scale_logits': False, 'transformers_version': '4.46.3', 'use_cache': False, 'vocab_size': 60,
        'weight_tying': False},
    'dream': {
        'architectures': ['DreamModel'], 'attention_dropout': 0.0,
        'auto_map': {'AutoConfig': 'configuration_dream.DreamConfig',
                     'AutoModel': 'modeling_dream.DreamModel'},
        'bos_token_id': 50, 'eos_token_id': 50, 'hidden_act': 'silu', 'hidden_size': D,
        'initializer_range': 0.02, 'intermediate_size': MLP, 'mask_token_id': 52,
        'max_position_embeddings': 32, 'max_window_layers': L, 'model_type': 'Dream',
        'num_attention_heads': H, 'num_hidden_layers': L,
        'num_key_value_heads': KV, 'pad_token_id': 50, 'rms_norm_eps': 1e-6, 'rope_scaling': None,
        'rope_theta': 1000000.0, 'sliding_window': None, 'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.46.2', 'use_cache': True,
        'use_sliding_window': False, 'vocab_size': 56},
    'qwen2': QWEN2,
    'qwen3': QWEN3,
    'a2d-qwen3-mdlm': A2D,
    'a2d-qwen3-bd3lm': A2D,
    'open-dcoder': QWEN2 | {'rope_scaling': None},
}
MASK = {'mdlm': 40, 'bd3lm': 40, 'sedd': 40, 'gidd': 41, 'diffugpt-s': 10, 'diffugpt-m': 49, 'diffullama': 8,
        'llada': 50, 'dream': 52, 'a2d-qwen3-mdlm': 51, 'a2d-qwen3-bd3lm': 51, 'open-dcoder': 51}
WORDS = {'mdlm': 40, 'bd3lm': 40, 'sedd': 40, 'duo': 41, 'gidd': 40, 'diffugpt-s': 50, 'diffugpt-m': 49,
         'diffullama': 48, 'llada': 60, 'dream': 50, 'qwen2': 50, 'qwen3': 50, 'a2d-qwen3-mdlm': 50,
         'a2d-qwen3-bd3lm': 50, 'open-dcoder': 50}            # the ids that x may hold: 0 .. WORDS - 1
SHARDED = {'diffullama', 'llada', 'dream'}
FLOAT32 = {'mdlm', 'bd3lm', 'sedd', 'duo', 'gidd'}


def ddit(vocab, front=''):
    s = {'vocab_embed.embedding': (vocab, D), 'sigma_map.mlp.0.weight': (C, 256),
         'sigma_map.mlp.0.bias': (C,), 'sigma_map.mlp.2.weight': (C, C), 'sigma_map.mlp.2.bias': (C,),
         'rotary_emb.inv_freq': (D // H // 2,)}
    for i in range(L):
        s |= {f'blocks.{i}.{k}': v for k, v in {
            'norm1.weight': (D,), 'attn_qkv.weight': (3 * D, D), 'attn_out.weight': (D, D),
            'norm2.weight': (D,), 'mlp.0.weight': (4 * D, D), 'mlp.0.bias': (4 * D,),
            'mlp.2.weight': (D, 4 * D), 'mlp.2.bias': (D,), 'adaLN_modulation.weight': (6 * D, C),
            'adaLN_modulation.bias': (6 * D,)}.items()}
    s |= {'output_layer.norm_final.weight': (D,), 'output_layer.linear.weight': (vocab, D),
          'output_layer.linear.bias': (vocab,), 'output_layer.adaLN_modulation.weight': (2 * D, C),
          'output_layer.adaLN_modulation.bias': (2 * D,)}
    return {front + k: v for k, v in s.items()}


def gpt2(vocab):
    s = {'embed_tokens.weight': (vocab, D), 'denoise_model.wpe.weight': (32, D)}
    for i in range(L):
        s |= {f'denoise_model.h.{i}.{k}': v for k, v in {
            'ln_1.weight': (D,), 'ln_1.bias': (D,), 'attn.c_attn.weight': (D, 3 * D),
            'attn.c_attn.bias': (3 * D,), 'attn.c_proj.weight': (D, D), 'attn.c_proj.bias': (D,),
            'ln_2.weight': (D,), 'ln_2.bias': (D,),
            'mlp.c_fc.weight': (D, 4 * D), 'mlp.c_fc.bias': (4 * D,), 'mlp.c_proj.weight': (4 * D, D),
            'mlp.c_proj.bias': (D,)}.items()}
    return s | {'denoise_model.ln_f.weight': (D,), 'denoise_model.ln_f.bias': (D,)}


def llama(vocab, kv=KV, head=D // H, bias=False, norms=False, tied=False):
    q, k = H * head, kv * head
    s = {'model.embed_tokens.weight': (vocab, D)}
    for i in range(L):
        p = f'model.layers.{i}.'
        s |= {p + 'input_layernorm.weight': (D,), p + 'self_attn.q_proj.weight': (q, D),
              p + 'self_attn.k_proj.weight': (k, D), p + 'self_attn.v_proj.weight': (k, D),
              p + 'self_attn.o_proj.weight': (D, q), p + 'post_attention_layernorm.weight': (D,),
              p + 'mlp.gate_proj.weight': (MLP, D), p + 'mlp.up_proj.weight': (MLP, D),
              p + 'mlp.down_proj.weight': (D, MLP)}
        if bias:
            s |= {p + 'self_attn.q_proj.bias': (q,), p + 'self_attn.k_proj.bias': (k,),
                  p + 'self_attn.v_proj.bias': (k,)}
        if norms:
            s |= {p + 'self_attn.q_norm.weight': (head,), p + 'self_attn.k_norm.weight': (head,)}
    return s | {'model.norm.weight': (D,)} | ({} if tied else {'lm_head.weight': (vocab, D)})


def llada(vocab):
    k = KV * D // H
    s = {'model.transformer.wte.weight': (vocab, D)}
    for i in range(L):
        s |= {f'model.transformer.blocks.{i}.{n}.weight': v for n, v in {
            'attn_norm': (D,), 'ff_norm': (D,), 'q_proj': (D, D), 'k_proj': (k, D), 'v_proj': (k, D),
            'attn_out': (D, D), 'ff_proj': (MLP, D), 'up_proj': (MLP, D), 'ff_out': (D, MLP)}.items()}
    return s | {'model.transformer.ln_f.weight': (D,), 'model.transformer.ff_out.weight': (vocab, D)}


def shapes(name):
    """{tensor name: shape} of the file(s)."""
    c = CONFIG[name]
    v = c.get('vocab_size', 0)
    if name in ('mdlm', 'duo'):
        return ddit(v, 'backbone.')
    if name == 'bd3lm':
        return ddit(v, 'backbone.') | {'sampling_eps_min': (), 'sampling_eps_max': ()}
    if name == 'sedd':
        return ddit(c['tokens'] + 1)
    if name == 'gidd':
        s = ddit(v)
        del s['rotary_emb.inv_freq']
        table = (1, c['max_seq_len'], 3, 1, D // H)
        return s | {'rotary_emb.cos_cached': table, 'rotary_emb.sin_cached': table}
    if name.startswith('diffugpt'):
        return gpt2(v)
    if name == 'llada':
        return llada(v)
    if name == 'diffullama':
        return llama(v, kv=H)
    if name == 'dream':
        return llama(v, bias=True)
    if name in ('qwen2', 'open-dcoder'):
        return llama(v, bias=True, tied=True)
    return llama(v, head=HEAD3, norms=True, tied=True)


def dtype_of(name):
    return torch.float32 if name in FLOAT32 else torch.bfloat16


def buffer_of(tensor, shape):
    """The values of a buffer, None for a weight."""
    half = D // H // 2
    freq = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    if tensor.endswith('inv_freq'):
        return freq
    if tensor.endswith('sampling_eps_min'):
        return np.float32(0.001)
    if tensor.endswith('sampling_eps_max'):
        return np.float32(0.999)
    if tensor.endswith('_cached'):
        angle = np.tile(np.arange(shape[1], dtype=np.float32)[:, None] * freq, (1, 2))
        turn = np.cos if 'cos' in tensor else np.sin
        table = np.broadcast_to(turn(angle)[None, :, None, None], shape).copy()
        table[:, :, 2] = 1.0 if 'cos' in tensor else 0.0          # the values are not turned
        return table
    return None


def spread(tensor):
    """The scale of a matrix: the time moves the network mildly, attention looks at few places."""
    if 'sigma_map' in tensor or 'adaLN' in tensor:
        return 0.05
    return 0.6 if any(k in tensor for k in ('attn', 'q_proj', 'k_proj', 'v_proj')) else 0.3


def tensors_of(name):
    """{tensor name: float32 array}, the same at every call, rounded to the dtype of the file."""
    out = {}
    for tensor, shape in shapes(name).items():
        z = np.random.default_rng(zlib.crc32(f'{name} {tensor}'.encode())).standard_normal(shape)
        buffer = buffer_of(tensor, shape)
        if buffer is not None:
            z = buffer
        elif len(shape) > 1:
            z = spread(tensor) * z
        elif tensor.endswith('weight'):
            z = 1 + 0.2 * z
        else:
            z = 0.5 * z + 0.5 if 'adaLN' in tensor else 0.2 * z
        t = torch.tensor(np.asarray(z, np.float32))
        out[tensor] = t.to(dtype_of(name)).float().numpy()
    return out


def tokenizer_json(name):
    """Letters for as many ids as the model has, and the token that says [MASK] where config.json does not."""
    V = CONFIG[name].get('vocab_size', 41)
    V = V - (MASK.get(name) == V - 1)  # the last row may be that of [MASK] alone
    mark = dict(gidd='[MASK]').get(name, '<|mask|>')
    added = [dict(id=MASK[name], content=mark, special=True)] if name in MASK else []
    letters = {letter: i for i, letter in enumerate(list(byte_letters())[:V])}
    return dict(model=dict(type='BPE', vocab=letters, merges=[]),
                pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False), added_tokens=added)


def make(folder, name, **changes):
    """Write the checkpoint; changes: of its config.json. Returns {tensor name: tensor}."""
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(CONFIG[name] | changes, indent=2) + '\n')
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer_json(name)))
    tensors = {k: torch.tensor(v).to(dtype_of(name)) for k, v in tensors_of(name).items()}
    names, where = list(tensors), {}
    if name not in SHARDED:
        save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
        return tensors
    for i, part in enumerate((names[:len(names) // 2], names[len(names) // 2:]), 1):
        file = f'model-{i:05d}-of-00002.safetensors'
        save_file({k: tensors[k] for k in part}, folder / file, metadata={'format': 'pt'})
        where |= {k: file for k in part}
    index = dict(metadata=dict(total_size=sum(t.nbytes for t in tensors.values())), weight_map=where)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
    return tensors


@functools.cache
def numbers():
    """{name: what the published code makes of it}."""
    return json.loads(Path(__file__).with_name('published.json').read_text())


def sample(name, n=16):
    """x, and x with every third position (1, 4, 7, ...) masked; without a mask id the second is None."""
    mask, words = MASK.get(name), WORDS[name]
    x = [(7 * i * i + 13 * i + 5) % words for i in range(n)]
    x = [i + 1 if i == mask else i for i in x]
    return x, None if mask is None else [mask if i % 3 == 1 else t for i, t in enumerate(x)]
