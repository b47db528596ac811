"""Tiny models in the layouts of published diffusion checkpoints: config.json and tensors with the names, shapes
and types of the real files, written down by hand (not by hub/families.py). Weights are functions of a name."""
import json
import zlib

import numpy as np
import torch

from text.vocabulary import byte_letters

C, L, T = 32, 2, 32   # width, blocks, longest text
V = 264               # ordinary tokens: the 256 bytes and a few more


# ---- {name: shape} ----------------------------------------------------------------------------------------

def ddit(rows, prefix):
    shapes = {'vocab_embed.embedding': (rows, C), 'output_layer.norm_final.weight': (C,),
              'output_layer.linear.weight': (rows, C), 'output_layer.linear.bias': (rows,),
              'output_layer.adaLN_modulation.weight': (2 * C, 128), 'output_layer.adaLN_modulation.bias': (2 * C,),
              'sigma_map.mlp.0.weight': (128, 256), 'sigma_map.mlp.0.bias': (128,),
              'sigma_map.mlp.2.weight': (128, 128), 'sigma_map.mlp.2.bias': (128,)}
    for i in range(L):
        shapes |= {f'blocks.{i}.{name}': shape for name, shape in {
            'norm1.weight': (C,), 'norm2.weight': (C,), 'attn_qkv.weight': (3 * C, C), 'attn_out.weight': (C, C),
            'mlp.0.weight': (4 * C, C), 'mlp.0.bias': (4 * C,), 'mlp.2.weight': (C, 4 * C), 'mlp.2.bias': (C,),
            'adaLN_modulation.weight': (6 * C, 128), 'adaLN_modulation.bias': (6 * C,)}.items()}
    return {prefix + name: shape for name, shape in shapes.items()}


def gpt2(rows, embedding, prefix):
    shapes = {embedding: (rows, C), prefix + 'wpe.weight': (T, C), prefix + 'ln_f.weight': (C,),
              prefix + 'ln_f.bias': (C,)}
    for i in range(L):
        shapes |= {f'{prefix}h.{i}.{name}': shape for name, shape in {
            'ln_1.weight': (C,), 'ln_1.bias': (C,), 'ln_2.weight': (C,), 'ln_2.bias': (C,),
            'attn.c_attn.weight': (C, 3 * C), 'attn.c_attn.bias': (3 * C,), 'attn.c_proj.weight': (C, C),
            'attn.c_proj.bias': (C,), 'mlp.c_fc.weight': (C, 4 * C), 'mlp.c_fc.bias': (4 * C,),
            'mlp.c_proj.weight': (4 * C, C), 'mlp.c_proj.bias': (C,)}.items()}
    return shapes


def llama(rows, kv=4, width=8, tied=False, biases=False, norms=False):
    shapes = {'model.embed_tokens.weight': (rows, C), 'model.norm.weight': (C,)}
    shapes |= {} if tied else {'lm_head.weight': (rows, C)}
    for i in range(L):
        layer = {'input_layernorm.weight': (C,), 'post_attention_layernorm.weight': (C,),
                 'self_attn.q_proj.weight': (4 * width, C), 'self_attn.k_proj.weight': (kv * width, C),
                 'self_attn.v_proj.weight': (kv * width, C), 'self_attn.o_proj.weight': (C, 4 * width),
                 'mlp.gate_proj.weight': (48, C), 'mlp.up_proj.weight': (48, C), 'mlp.down_proj.weight': (C, 48)}
        if biases:
            layer |= {'self_attn.q_proj.bias': (4 * width,), 'self_attn.k_proj.bias': (kv * width,),
                      'self_attn.v_proj.bias': (kv * width,)}
        if norms:
            layer |= {'self_attn.q_norm.weight': (width,), 'self_attn.k_norm.weight': (width,)}
        shapes |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
    return shapes


def llada(rows):
    at = 'model.transformer.'
    shapes = {at + 'wte.weight': (rows, C), at + 'ln_f.weight': (C,), at + 'ff_out.weight': (rows, C)}
    for i in range(L):
        shapes |= {f'{at}blocks.{i}.{name}.weight': shape for name, shape in {
            'attn_norm': (C,), 'ff_norm': (C,), 'q_proj': (C, C), 'k_proj': (C, C), 'v_proj': (C, C),
            'attn_out': (C, C), 'ff_proj': (48, C), 'up_proj': (48, C), 'ff_out': (C, 48)}.items()}
    return shapes


# ---- families ---------------------------------------------------------------------------------------------

HF_DDIT = dict(vocab_size=V + 1, model_length=T, hidden_dim=C, cond_dim=128, n_blocks=L, n_heads=4, dropout=0.1,
               torch_dtype='float32')
GPT2 = dict(model_type='gpt2', n_positions=T, n_ctx=T, n_embd=C, n_layer=L, n_head=4, layer_norm_epsilon=1e-5,
            activation_function='gelu_new', bos_token_id=V - 1, eos_token_id=V - 1, torch_dtype='bfloat16',
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
LLAMA = dict(vocab_size=V, max_position_embeddings=T, num_hidden_layers=L, num_attention_heads=4, hidden_size=C,
             intermediate_size=48, hidden_act='silu', tie_word_embeddings=False, bos_token_id=V - 1,
             eos_token_id=V - 1, torch_dtype='bfloat16')
QWEN = LLAMA | dict(num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0, use_sliding_window=False)
DREAM = QWEN | dict(model_type='Dream', architectures=['DreamModel'], mask_token_id=100, pad_token_id=V - 2,
                    auto_map={'AutoModel': 'modeling_dream.DreamModel'})
QWEN3 = QWEN | dict(head_dim=16, attention_bias=False, tie_word_embeddings=True)
CODE = {'AutoModelForMaskedLM': 'modeling.Model'}
SEDD = dict(tokens=V, ngpus=8, model=dict(name='small', type='ddit', hidden_size=C, cond_dim=128, length=T,
                                          n_blocks=L, n_heads=4, scale_by_sigma=True, dropout=0.02),
            graph=dict(type='absorb', file='data', report_all=False),
            noise=dict(type='loglinear', sigma_min=1e-4, sigma_max=20))

# name: (config.json, {tensor: shape}, type of the file, number of files)
FAMILIES = {
    'mdlm': (HF_DDIT | dict(model_type='mdlm', architectures=['MDLM'], time_conditioning=False, auto_map=CODE),
             ddit(V + 1, 'backbone.'), 'float32', 1),
    'mdlm-timed': (HF_DDIT | dict(model_type='mdlm', architectures=['MDLM'], time_conditioning=True, auto_map=CODE),
                   ddit(V + 1, 'backbone.'), 'float32', 1),
    'bd3lm': (HF_DDIT | dict(model_type='bd3lm', architectures=['BD3LM'], block_size=4, cross_attn=True,
                             attn_backend='sdpa', sampling_eps_min=0.001, sampling_eps_max=0.999, var_min=True,
                             time_conditioning=False, auto_map=CODE),
              ddit(V + 1, 'backbone.') | {'sampling_eps_min': (), 'sampling_eps_max': (),
                                          'backbone.rotary_emb.inv_freq': (4,)}, 'float32', 1),
    'duo': (HF_DDIT | dict(model_type='DUO', architectures=['DUO'], causal=False, var_min=True, auto_map=CODE),
            ddit(V + 1, 'backbone.'), 'float32', 1),
    'sedd': (SEDD, ddit(V + 1, ''), 'float32', 1),
    'gidd': (dict(model_type='dit', architectures=['DIT'], vocab_size=V + 1, max_seq_len=T, hidden_size=C,
                  timestep_cond_dim=128, num_hidden_layers=L, num_attention_heads=4, attention_dropout=0.0,
                  p_uniform=0.0, t_eps=1e-4, torch_dtype='float32'), ddit(V + 1, ''), 'float32', 1),
    'diffugpt-s': (GPT2 | dict(vocab_size=V), gpt2(V, 'embed_tokens.weight', 'denoise_model.'), 'bfloat16', 1),
    'diffugpt-m': (GPT2 | dict(vocab_size=V + 1), gpt2(V + 1, 'embed_tokens.weight', 'denoise_model.'),
                   'bfloat16', 1),
    'diffullama': (LLAMA | dict(model_type='llama', architectures=['LlamaForCausalLM'], num_key_value_heads=4,
                                rms_norm_eps=1e-5, rope_theta=10000.0), llama(V), 'bfloat16', 2),
    'llada': (dict(model_type='llada', architectures=['LLaDAModelLM'], block_type='llama', block_group_size=1,
                   d_model=C, n_layers=L, n_heads=4, n_kv_heads=4, mlp_hidden_size=48, activation_type='silu',
                   layer_norm_type='rms', rms_norm_eps=1e-5, layer_norm_with_affine=True, rope=True,
                   rope_theta=500000.0, rope_full_precision=True, include_bias=False, include_qkv_bias=False,
                   bias_for_layer_norm=False, attention_layer_norm=False, embedding_size=V, vocab_size=V,
                   weight_tying=False, scale_logits=False, input_emb_norm=False, alibi=False, clip_qkv=None,
                   multi_query_attention=None, max_sequence_length=T, mask_token_id=100, eos_token_id=V - 1,
                   pad_token_id=V - 1, use_cache=False, torch_dtype='bfloat16', auto_map=CODE),
              llada(V), 'bfloat16', 2),
    'dream': (DREAM, llama(V, kv=2, biases=True), 'bfloat16', 2),
    'qwen2': (QWEN | dict(model_type='qwen2', architectures=['Qwen2ForCausalLM']), llama(V, kv=2, biases=True),
              'bfloat16', 1),
    'qwen3': (QWEN3 | dict(model_type='qwen3', architectures=['Qwen3ForCausalLM']),
              llama(V, kv=2, width=16, tied=True, norms=True), 'bfloat16', 1),
    'qwen3-mdlm': (QWEN3 | dict(model_type='a2d-qwen3', architectures=['A2DQwen3LMHeadModel']),
                   llama(V, kv=2, width=16, tied=True, norms=True), 'bfloat16', 1),
    'qwen3-bd3lm': (QWEN3 | dict(model_type='a2d-qwen3', architectures=['A2DQwen3LMHeadModel']),
                    llama(V, kv=2, width=16, tied=True, norms=True), 'bfloat16', 1),
    'open-dcoder': (QWEN | dict(model_type='qwen2', architectures=['Qwen2ForCausalLM'], tie_word_embeddings=True),
                    llama(V, kv=2, tied=True, biases=True), 'bfloat16', 1)}


def tensor(family, name, shape, dtype):
    """A weight: normal numbers that follow from its name."""
    x = np.random.default_rng(zlib.crc32(f'{family} {name}'.encode())).standard_normal(shape)
    if name.endswith('adaLN_modulation.bias'):
        x = 0.5 + 0.5 * x
    elif 'norm' in name.rpartition('.')[0].rpartition('.')[2] or '.ln_' in name:
        x = 1 + 0.2 * x if name.endswith('weight') else 0.2 * x
    else:
        x = (0.2 if len(shape) < 2 else 0.3) * x
    return torch.tensor(x, dtype=torch.float32).to(getattr(torch, dtype))


def tokenizer():
    """A tokenizer.json of V pieces: the bytes, three pairs, and special tokens behind them."""
    letters = {b: letter for letter, b in byte_letters().items()}
    merges = [('t', 'h'), ('th', 'e'), ('Ġ', 'the')]
    pieces = [letters[b] for b in range(256)] + [a + b for a, b in merges]
    names = ['<|im_start|>', '<|im_end|>', '<|mask|>', '<|pad|>', '<|endoftext|>'][len(pieces) + 5 - V:]
    added = [dict(id=len(pieces) + i, content=name, special=True) for i, name in enumerate(names)]
    return dict(model=dict(type='BPE', vocab={piece: i for i, piece in enumerate(pieces)},
                           merges=[list(m) for m in merges]),
                pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True),
                normalizer=None, added_tokens=added)


def make(folder, family, **changes):
    """Write a folder as the family is published; returns its tensors."""
    import safetensors.torch as safetensors
    config, shapes, dtype, n = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config | changes, indent=1))
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer()))
    tensors = {name: tensor(family, name, shape, dtype) for name, shape in shapes.items()}
    names = sorted(tensors)
    if n == 1:
        safetensors.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        return tensors
    index = {}
    for i in range(n):
        file = f'model-{i + 1:05}-of-{n:05}.safetensors'
        part = {name: tensors[name] for name in names[i::n]}
        safetensors.save_file(part, folder / file, {'format': 'pt'})
        index |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.itemsize for t in tensors.values())
    (folder / 'model.safetensors.index.json').write_text(
        json.dumps(dict(metadata=dict(total_size=size), weight_map=index)))
    return tensors
