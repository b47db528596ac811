"""A tiny random model in Hugging Face's layout, the names of its tensors written down by hand."""
import json

import pytest
import torch

from text import vocabulary

LETTERS = {b: letter for letter, b in vocabulary.byte_letters().items()}
SHAPES = dict(
    gpt2=dict(model_type='gpt2', vocab_size=300, n_positions=24, n_layer=2, n_head=2, n_embd=16,
              layer_norm_epsilon=1e-5, activation_function='gelu_new', bos_token_id=299, eos_token_id=299),
    llama=dict(model_type='llama', vocab_size=300, max_position_embeddings=24, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=40,
               hidden_act='silu', rms_norm_eps=1e-5, rope_theta=5000.0, tie_word_embeddings=False,
               bos_token_id=299, eos_token_id=299))
ADDED = [dict(id=299, content='<|endoftext|>', special=True)]
BYTE_LEVEL = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)


def tokenizer_json(merges=(('t', 'h'), ('th', 'e'), ('Ġ', 'the'), ('Ġ', 'b')), pre=BYTE_LEVEL):
    """A tokenizer.json of the 256 bytes and a few merges."""
    pieces = [LETTERS[b] for b in range(256)] + [a + b for a, b in merges]
    return dict(model=dict(type='BPE', vocab={piece: i for i, piece in enumerate(pieces)},
                           merges=[list(m) for m in merges]),
                pre_tokenizer=pre, normalizer=None, added_tokens=ADDED)


def shapes_of(theirs):
    """{their name: shape}, written down by hand."""
    C, V = theirs.get('n_embd') or theirs['hidden_size'], theirs['vocab_size']
    if theirs['model_type'] == 'gpt2':
        shapes = {'wte.weight': (V, C), 'wpe.weight': (theirs['n_positions'], C), 'ln_f.weight': (C,),
                  'ln_f.bias': (C,)}
        for i in range(2):
            layer = {'ln_1.weight': (C,), 'ln_1.bias': (C,), 'ln_2.weight': (C,), 'ln_2.bias': (C,),
                     'attn.c_attn.weight': (C, 3 * C), 'attn.c_attn.bias': (3 * C,),
                     'attn.c_proj.weight': (C, C), 'attn.c_proj.bias': (C,),
                     'mlp.c_fc.weight': (C, 4 * C), 'mlp.c_fc.bias': (4 * C,),
                     'mlp.c_proj.weight': (4 * C, C), 'mlp.c_proj.bias': (C,)}
            shapes |= {f'h.{i}.{name}': shape for name, shape in layer.items()}
        return shapes
    inner, width = theirs['intermediate_size'], C // theirs['num_attention_heads']
    kv = width * theirs['num_key_value_heads']
    shapes = {'model.embed_tokens.weight': (V, C), 'model.norm.weight': (C,), 'lm_head.weight': (V, C)}
    for i in range(2):
        layer = {'input_layernorm': (C,), 'post_attention_layernorm': (C,), 'self_attn.q_proj': (C, C),
                 'self_attn.k_proj': (kv, C), 'self_attn.v_proj': (kv, C), 'self_attn.o_proj': (C, C),
                 'mlp.gate_proj': (inner, C), 'mlp.up_proj': (inner, C), 'mlp.down_proj': (C, inner)}
        shapes |= {f'model.layers.{i}.{name}.weight': shape for name, shape in layer.items()}
    return shapes


def make_folder(folder, kind, **changes):
    """A random model in Hugging Face's layout; returns its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in
               shapes_of(SHAPES[kind]).items()}
    safetensors = pytest.importorskip('safetensors.torch')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(SHAPES[kind] | changes))
    (folder / 'tokenizer.json').write_text(json.dumps(tokenizer_json()))
    safetensors.save_file(tensors, folder / 'model.safetensors')
    return tensors
