"""Keys and values that are kept while a text is written part by part, against networks that keep nothing."""
import pytest
import torch

import masked
from parts.cached import Cached
from parts.graphs import quick

SHAPES = [dict(arch='ours'), dict(arch='gpt2'), dict(arch='llama', n_kv_head=2), dict(arch='ddit'),
          dict(arch='llama', shift=True), dict(arch='llama', shift=True, bos=False),
          dict(arch='gpt2', shift=True),
          dict(arch='ddit', time_input=True), dict(arch='ours', time_input=True),
          dict(arch='llama', old_mask=3)]


def random_model(n_layer=2, **knobs):
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, block_size=24, n_layer=n_layer, n_head=4, n_embd=32)
    net = masked.Model(masked.Config(**sizes, **knobs))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def canvas(net, B=3):
    xt = torch.full((B, 22), net.mask_id)
    xt[:, :5] = torch.randint(10, (B, 5))
    return xt


def written(net, xt, rule='confidence', **knobs):
    torch.manual_seed(1)
    return list(net.sample(xt, steps=9, rule=rule, temperature=0, part_length=6, **knobs))


@pytest.mark.parametrize('knobs', SHAPES)
@pytest.mark.parametrize('kind', ['prefix', 'dual'])
def test_refreshed_at_every_call_the_texts_are_those_without_a_cache(knobs, kind):
    net = random_model(**knobs)
    for rule in ('confidence', 'threshold', 'factor'):
        plain = written(net, xt := canvas(net), rule)
        kept = written(net, xt, rule, cache=kind, refresh=1)
        assert len(plain) == len(kept) and all(map(torch.equal, plain, kept)), rule


@pytest.mark.parametrize('knobs', SHAPES)
@pytest.mark.parametrize('kind', ['prefix', 'dual'])
@torch.no_grad()
def test_what_is_kept_is_right_as_long_as_the_text_is_the_same(knobs, kind):
    """The second call reads the part alone (or what stands behind it, too)."""
    net = random_model(**knobs)
    xt, t = canvas(net), torch.full((3,), 0.7)
    for given in (5, 11, 17):  # in the first, the second, the last part
        xt[:, :given] = torch.randint(10, (3, given))
        xt[:, given:] = net.mask_id
        cached = Cached(net, canvas(net), kind, 0, dict(part_length=6))
        calls, end = [], min(given + 6, 22)
        hook = net.gpt.blocks[0].mlp.register_forward_pre_hook(lambda m, args: calls.append(args[0].size(1)))
        first = cached(xt, t)[:, given:end].clone()
        again = cached(xt, t)[:, given:end]
        hook.remove()
        assert calls[1] < calls[0] and torch.allclose(first, again, atol=1e-5)
        assert torch.allclose(first, net.denoise(xt, t)[:, given:end], atol=1e-5)


@pytest.mark.parametrize('kind', ['prefix', 'dual'])
@pytest.mark.parametrize('knobs', [s for s in SHAPES if s['arch'] != 'ours' and not s.get('time_input')])
def test_with_one_layer_a_cache_is_exact(knobs, kind):
    """There, keys and values are functions of their own token alone."""
    net = random_model(n_layer=1, **knobs)
    plain, kept = written(net, xt := canvas(net)), written(net, xt, cache=kind)
    assert all(map(torch.equal, plain, kept))


def test_with_more_layers_it_departs_and_keeps_what_is_given_and_counts_its_calls():
    net, texts = random_model(arch='llama'), []
    for how in ({}, dict(cache='dual')):
        with quick(net) as calls:
            *_, text = frames = written(net, xt := canvas(net), **how)
        assert len(calls) == len(frames) and (text[:, :5] == xt[:, :5]).all() and (text < 11).all()
        texts.append(text)
    assert not torch.equal(*texts)


@pytest.mark.parametrize('knobs, words', [
    (dict(rule='threshold'), 'part_length'), (dict(rule='ancestral'), 'part_length'),
    (dict(rule='confidence', part_length=4, cfg=1.0), 'no cfg')])
def test_a_cache_needs_parts_and_no_guidance(knobs, words):
    net = random_model()
    with pytest.raises(ValueError, match=words):
        list(net.sample(canvas(net), 4, cache='prefix', **knobs))


def test_a_cache_needs_prompts_of_one_length():
    net = random_model()
    xt = canvas(net)
    xt[0, 5] = 1
    with pytest.raises(ValueError, match='equally many'):
        list(net.sample(xt, 4, rule='threshold', part_length=6, cache='dual'))
