"""The transformer: causality, cache, twins, presets, attention; each against another way to compute it."""
import itertools
import math

import numpy as np
import pytest
import torch

import ar
import masked
import model
from parts import muon as optimizing
from parts import neighbours


def random_gpt(causal, arch='ours', T=12):
    torch.manual_seed(0)
    gpt = model.GPT(model.Config(vocab_size=7, block_size=T, n_layer=2, n_head=2, n_embd=8, arch=arch),
                    causal).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return gpt


def convolved(h, taps, first, seen):
    """h + the sum over neighbours that are seen, one by one. h (B, T, C), seen (B, T, T)."""
    out = h.clone()
    for b, i, (k, tap) in itertools.product(range(len(h)), range(h.size(1)), enumerate(taps)):
        j = i + first + k
        if 0 <= j < h.size(1) and seen[b, i, j]:
            out[b, i] += tap * h[b, j]
    return out


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('kind', ['none', 'keys', 'full'])
def test_the_convolution_adds_up_the_neighbours_that_a_token_sees(causal, kind):
    torch.manual_seed(0)
    config, h = model.Config(vocab_size=7, n_head=2, n_embd=8), torch.randn(2, 9, 8)
    near = neighbours.Neighbours(config, causal)
    torch.nn.init.normal_(near.taps)
    mask = dict(none=None, keys=torch.rand(2, 1, 1, 9) < 0.6, full=torch.rand(9, 9) < 0.6)[kind]
    seen = torch.ones(2, 9, 9, dtype=torch.bool) if mask is None else mask.view(-1, *mask.shape[-2:])
    beside = neighbours.beside if mask is None else neighbours.seen_beside(mask, 9)
    expected = convolved(h, near.taps, near.first, seen.expand(2, 9, 9))
    assert torch.allclose(near(h, beside, None), expected, atol=1e-6)
    assert (near.first == -4) == causal


@pytest.mark.parametrize('arch', ['ours', 'gpt2'])
def test_with_the_causal_mask_a_token_changes_no_earlier_logits_and_without_it_all(arch):
    x = torch.randint(7, (1, 12))
    y = x.clone()
    y[0, 6] = (y[0, 6] + 1) % 7
    for causal in (True, False):
        gpt = random_gpt(causal, arch)
        changed = (gpt(x) - gpt(y)).abs().amax(-1)[0] > 1e-6
        assert changed.tolist() == [not causal or i >= 6 for i in range(12)]


@pytest.mark.parametrize('arch', ['ours', 'gpt2'])
def test_reading_through_the_cache_in_any_pieces_equals_reading_at_once(arch):
    gpt, x = random_gpt(True, arch), torch.randint(7, (3, 12))
    for pieces in ([1] * 12, [5, 1, 6], [12]):
        cache = model.Cache()
        with torch.no_grad():
            logits = torch.cat([gpt(part, cache=cache) for part in x.split(pieces, dim=1)], dim=1)
        assert torch.allclose(logits, gpt(x), atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('masked_keys', [True, False])
@pytest.mark.parametrize('t', [1, 4, 9])
def test_attention_with_gradients_on_cpu_equals_the_fused_one(causal, masked_keys, t):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, t, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    mask = (torch.arange(9) < 7)[None, None, None] if masked_keys else None
    if causal and masked_keys:
        mask = mask | (torch.arange(9) == 0)  # every query sees something
    fused = model.attention(q, k, v, causal, mask)
    assert torch.allclose(model.attention(q.requires_grad_(), k, v, causal, mask), fused, atol=1e-6)


def test_twins_have_the_same_parameters():
    a, b = (module.Model(module.Config(vocab_size=65, n_layer=2)) for module in (ar, masked))
    assert {n: p.shape for n, p in a.named_parameters()} == {n: p.shape for n, p in b.named_parameters()}


def test_the_first_prediction_is_uniform():
    logits = model.GPT(model.Config(vocab_size=7, n_layer=2), causal=False)(torch.randint(7, (2, 5)))
    assert (logits == 0).all()


def test_the_mask_row_is_an_input_only():
    gpt = random_gpt(False)
    assert gpt.embed.num_embeddings == 8 and gpt(torch.full((1, 3), 7)).size(-1) == 7
    assert random_gpt(False, 'gpt2')(torch.full((1, 3), 7)).size(-1) == 7


def test_the_gpt2_preset_equals_gpt2_written_in_numpy():
    gpt, x = random_gpt(True, 'gpt2').double(), np.random.default_rng(0).integers(7, size=9)
    w = {name: p.detach().numpy() for name, p in gpt.named_parameters()}
    norm = lambda h, n: ((h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
                         * w[n + '.weight'] + w[n + '.bias'])
    dense = lambda h, n: h @ w[n + '.weight'].T + w[n + '.bias']
    h = w['embed.weight'][x] + w['pos.weight'][:9]
    for i in range(2):
        b = f'blocks.{i}.'
        q, k, v = (part.reshape(9, 2, 4).swapaxes(0, 1)
                   for part in np.split(dense(norm(h, b + 'norm1'), b + 'attn.qkv'), 3, -1))
        score = q @ k.swapaxes(1, 2) / 2 + np.triu(np.full((9, 9), -np.inf), 1)
        p = np.exp(score - score.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        h = h + dense((p @ v).swapaxes(0, 1).reshape(9, 8), b + 'attn.proj')
        u = dense(norm(h, b + 'norm2'), b + 'mlp.fc')
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        h = h + dense(u, b + 'mlp.proj')
    logits = norm(h, 'norm') @ w['embed.weight'][:7].T
    assert np.allclose(gpt(torch.tensor(x)[None])[0].detach().numpy(), logits, atol=1e-9)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(4), torch.randn(4)
    cos, sin = model.rotary_table(10, 4)
    score = lambda i, j: model.rotate(q, cos[i], sin[i]) @ model.rotate(k, cos[j], sin[j])
    assert (torch.allclose(score(2, 5), score(6, 9), atol=1e-5)
            and not torch.allclose(score(2, 5), score(2, 6), atol=1e-3))


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    gpt = random_gpt(False)
    adam, muon = optimizing.optimizers(gpt, 1e-3, 1e-2)
    shapes = [p.shape for g in muon.param_groups for p in g['params']]
    assert len(shapes) == 2 * 4 and all(len(s) == 2 for s in shapes)
    assert sum(len(g['params']) for g in adam.param_groups) == 2 + 4 * 2  # embedding, head; 4 a block
    assert len(optimizing.optimizers(gpt, 1e-3, 0.0)) == 1
    timed = model.GPT(gpt.config, causal=False, timed=True)
    adam, muon = optimizing.optimizers(timed, 1e-3, 1e-2)
    assert sum(len(g['params']) for g in muon.param_groups) == 2 * 4
    assert sum(len(g['params']) for g in adam.param_groups) == 2 + 6 * 2  # and the films


def test_an_optimizer_that_would_have_nothing_to_do_is_left_out():
    gpt = random_gpt(False)
    for name, p in gpt.named_parameters():
        p.requires_grad_(name.startswith('blocks.') and not name.endswith(('taps', 'gate.weight', 'mix')))
    only, = optimizing.optimizers(gpt, 1e-3, 1e-2)
    assert type(only) is optimizing.Muon and len(optimizing.optimizers(gpt, 1e-3, 0.0)) == 1
    gpt.requires_grad_(False)
    with pytest.raises(ValueError, match='nothing to train'):
        optimizing.optimizers(gpt, 1e-3, 1e-2)


def pushed(G):
    """G (..., m, n) with its singular values as Newton-Schulz leaves them, by an SVD."""
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    S = S / S.norm(dim=-1, keepdim=True)
    a, b, c = optimizing.COEFFICIENTS
    for _ in range(optimizing.STEPS):
        S = a * S + b * S ** 3 + c * S ** 5
    return U @ torch.diag_embed(S) @ V


@pytest.mark.parametrize('shape', [(6, 4), (4, 6), (5, 5)])
def test_muon_equals_torchs_but_for_rounding(shape):
    torch.manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.ones(shape)) for _ in range(3))
    steps = (torch.optim.Muon([a], lr=0.1, weight_decay=0.1), optimizing.Muon([b], 0.1, 0.1, rows=False),
             optimizing.Muon([c], 0.1, 0.1, dtype=torch.float32, rows=False))
    expected, momentum = torch.ones(shape).double(), torch.zeros(shape).double()
    for _ in range(5):
        gradient = torch.randn(shape)
        for p, optimizer in zip((a, b, c), steps):
            p.grad = gradient.clone()
            optimizer.step()
        momentum.lerp_(gradient.double(), 0.05)
        direction = pushed(gradient.double().lerp(momentum, 0.95))
        expected = 0.99 * expected - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * direction
        assert (a - b).abs().max() < 0.014  # both of bfloat16's 8 bits
        assert (c - expected).abs().max() < 1e-4
    fresh = optimizing.Muon([b], 0.1)
    fresh.load_state_dict(steps[0].state_dict())  # of a run that began with torch's
    b.grad = gradient.clone()
    fresh.step()


def test_rows_that_always_move_little_move_as_far_as_the_others_and_the_step_is_as_long():
    torch.manual_seed(0)
    squares, sizes = torch.zeros(2, 4, 1), torch.tensor([1.0, 2.0, 0.1, 5.0])
    for _ in range(300):
        update = torch.randn(2, 4, 50) * sizes[:, None]
        out, squares = optimizing.evened(update, squares)
        assert torch.allclose(out.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    rows = out.norm(dim=-1)
    assert (rows / rows.mean(-1, keepdim=True) - 1).abs().max() < 0.3  # 50 numbers a row, 20 steps of memory
    assert torch.equal(optimizing.evened(torch.zeros(2, 4, 50), squares)[0], torch.zeros(2, 4, 50))


@pytest.mark.parametrize('shape', [(3, 8, 24), (2, 24, 8), (1, 8, 8)])
def test_the_orthogonalised_matrix_has_the_singular_vectors_of_the_matrix_and_values_near_1(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    assert torch.allclose(optimizing.orthogonal(G), pushed(G), atol=1e-4)
    low = optimizing.orthogonal(G, torch.bfloat16).float()
    assert (low - pushed(G)).norm() / G[:, 0].numel() ** 0.5 < 0.2


@pytest.mark.parametrize('shape', [(2, 64, 256), (2, 192, 64), (2, 64, 64), (2000, 4, 6)])
def test_in_bfloat16_no_singular_value_of_a_badly_conditioned_matrix_blows_up(shape):
    torch.manual_seed(0)
    G = torch.randn(*shape[:2], 4) @ torch.randn(shape[0], 4, shape[2]) + 1e-3 * torch.randn(shape)
    out = optimizing.orthogonal(G, torch.bfloat16).float()
    assert torch.linalg.svdvals(out).max() < 1.25  # 1.20 in exact arithmetic
    assert torch.cosine_similarity(out.flatten(), pushed(G).flatten(), dim=0) > 0.8  # bfloat16 itself


def test_a_time_for_every_token_may_differ_and_every_scale_and_shift_is_used():
    torch.manual_seed(0)
    gpt = model.GPT(random_gpt(False).config, causal=False, timed=True)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, t = torch.randint(7, (3, 5)), torch.rand(3)
    assert torch.allclose(gpt(x, time=t), gpt(x, time=t[:, None].expand(3, 5)), atol=1e-5)
    other = t[:, None].repeat(1, 5)
    other[:, 4] += 0.3
    assert not torch.allclose(gpt(x, time=t), gpt(x, time=other), atol=1e-3)
    gpt(x, time=t).sum().backward()
    for block in gpt.blocks:
        assert all(part.abs().max() > 0 for part in block.film.weight.grad.chunk(4))


def test_the_cost_of_a_token_is_right_to_the_last_digits_with_a_large_vocabulary():
    V, x = 50_000, torch.tensor([[7, 0, 9]])
    logits = torch.zeros(1, 3, V)
    logits[..., 7] = 12.0  # the others' exponentials are small beside it, but many
    total = math.log(math.exp(12) + V - 1)
    assert ar.token_nats(logits, x)[0].tolist() == pytest.approx([total - 12, total, total], abs=3e-6)


def test_more_tokens_than_the_block_are_refused():
    with pytest.raises(ValueError, match='block_size=12'):
        random_gpt(True)(torch.zeros(1, 13, dtype=torch.long))
