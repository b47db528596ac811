"""Adapters: what they add, what they leave alone, and that two of them over one base never meet."""
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from parts import lora
import model

RANK, ALPHA = 3, 5.0
ARCHS = pytest.mark.parametrize('arch', ['ours', 'gpt2'])


def random_base(arch='ours', seed=0):
    """A GPT in which every tensor is random, the biases and gains of gpt2 too; float64."""
    torch.manual_seed(seed)
    config = model.Config(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=16, arch=arch)
    net = model.GPT(config, causal=True).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def adapters(net):
    """The state dict of A and B alone."""
    return {name: p for name, p in net.state_dict().items() if name.endswith(('.A', '.B'))}


def trained(base, seed=1, **how):
    """An adapted network whose adapters are not zero."""
    torch.manual_seed(seed)
    net = lora.adapt(base, RANK, ALPHA, **how)
    for name, p in adapters(net).items():
        torch.nn.init.normal_(p, std=0.3)
    return net


def pair(base, **how):
    """An encoder, without the causal mask, and a decoder over one base."""
    encoder, decoder = trained(base, 1, **how), trained(base, 2, **how)
    for block in encoder.blocks:
        block.attn.causal = False
    return encoder, decoder


def tokens():
    return torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(net):
    """Without a graph, in which attention on CPUs is computed in another way, to other roundings."""
    return net(tokens())


def written_out(net):
    """The plain network with W + alpha / rank * B A in its weights, and the names of these weights."""
    plain, own, changed = model.GPT(net.config, net.causal).double(), net.state_dict(), []
    for block, target in zip(plain.blocks, net.blocks):
        block.attn.causal = target.attn.causal
    with torch.no_grad():
        for name, p in plain.named_parameters():
            path, _, leaf = name.rpartition('.')
            if f'{path}.linear.{leaf}' in own:
                p.copy_(own[f'{path}.linear.{leaf}'])
            else:
                p.copy_(own[name])
            if leaf == 'weight' and f'{path}.A' in own:
                p += ALPHA / RANK * own[f'{path}.B'] @ own[f'{path}.A']
                changed.append(path)
    return plain, changed


def loss_of_both(encoder, decoder, x, run=lambda f, *inputs: f(*inputs)):
    """What an autoencoder does: one vector of the encoder is the first that the decoder reads."""
    code = run(encoder.trunk, encoder.embed(x)).mean(1, keepdim=True)
    h = run(decoder.trunk, torch.cat([code, decoder.embed(x[:, :-1])], 1))
    return F.cross_entropy(decoder.logits(h).flatten(0, 1), x.flatten())


def gradients(nets, loss):
    for net in nets:
        net.zero_grad()
    loss.backward()
    return [{name: p.grad.clone() for name, p in n.named_parameters() if p.grad is not None} for n in nets]


# ---- what is computed -------------------------------------------------------------------------------------

@ARCHS
def test_a_fresh_adapter_changes_nothing_but_would_if_B_were_not_zero(arch):
    base = random_base(arch)
    before = logits(base)
    net = lora.adapt(base, RANK, ALPHA)
    assert torch.equal(logits(net), before) and torch.equal(logits(base), before)
    for path, layer in ((p, m) for p, m in net.named_modules() if isinstance(m, lora.LoRA)):
        assert (layer.B == 0).all() and (layer.A != 0).all() and layer.A.dtype == torch.float64, path
        layer.B.data.copy_(torch.arange(len(layer.B))[:, None] / 100)
        assert not torch.allclose(logits(net), before), path
        layer.B.data.zero_()


@ARCHS
def test_an_adapted_network_equals_a_plain_one_with_the_changes_written_into_its_weights(arch):
    base = random_base(arch)
    net = trained(base)
    plain, changed = written_out(net)
    assert len(changed) == 8  # two layers of qkv, proj, fc, proj
    assert torch.allclose(logits(net), logits(plain), atol=1e-12)
    assert not torch.allclose(logits(net), logits(base), atol=1e-2)


@ARCHS
def test_two_adapters_in_one_graph_get_the_gradients_of_two_plain_networks_by_the_chain_rule(arch):
    """dL/dB = s dL/dW A', dL/dA = s B' dL/dW."""
    nets = pair(random_base(arch))
    plains, (names, _) = zip(*map(written_out, nets))
    ours = gradients(nets, loss_of_both(*nets, tokens()))
    theirs = gradients(plains, loss_of_both(*plains, tokens()))
    for net, own, expected in zip(nets, ours, theirs):
        assert sorted(own) == sorted(f'{path}.{leaf}' for path in names for leaf in 'AB')
        for path in names:
            layer, dW = net.get_submodule(path), expected[f'{path}.weight']
            assert torch.allclose(own[f'{path}.B'], ALPHA / RANK * dW @ layer.A.T, atol=1e-12), path
            assert torch.allclose(own[f'{path}.A'], ALPHA / RANK * layer.B.T @ dW, atol=1e-12), path
            assert own[f'{path}.A'].abs().max() > 1e-6 and own[f'{path}.B'].abs().max() > 1e-6, path


def test_two_adapters_in_one_graph_get_the_gradients_of_finite_differences():
    nets, x, step = pair(random_base()), tokens(), 1e-5
    ours = gradients(nets, loss_of_both(*nets, x))
    generator = torch.Generator().manual_seed(0)
    for net, own in zip(nets, ours):
        for name, p in adapters(net).items():
            way, ends = torch.randn(p.shape, generator=generator, dtype=p.dtype), []
            for sign in (1, -1, 0):
                old = p.clone()
                p += sign * step * way
                with torch.no_grad():
                    ends.append(loss_of_both(*nets, x))
                p.copy_(old)
            slope = (ends[0] - ends[1]) / (2 * step)
            assert torch.allclose((own[name] * way).sum(), slope, rtol=1e-4, atol=1e-8), name


def test_checkpointing_both_adapters_gives_the_same_gradients_with_dropout_too():
    nets = pair(random_base(), dropout=0.5)
    again = lambda f, *inputs: checkpoint(f, *inputs, use_reentrant=False)
    found = []
    for run in ({}, dict(run=again)):
        torch.manual_seed(3)
        loss = loss_of_both(*nets, tokens(), **run)
        torch.manual_seed(4)  # what is computed again must find its own random numbers
        found.append((loss.detach(), gradients(nets, loss)))
    assert torch.equal(found[0][0], found[1][0])
    for plain, checkpointed in zip(found[0][1], found[1][1]):
        assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-12) for name in plain)
    torch.manual_seed(4)
    other = gradients(nets, loss_of_both(*nets, tokens()))  # the numbers do matter
    assert not any(torch.allclose(other[i][name], found[0][1][i][name]) for i in (0, 1) for name in other[i])


# ---- what is left alone -----------------------------------------------------------------------------------

def test_the_base_never_changes_when_two_adapters_learn_and_both_hold_its_very_tensors():
    base = random_base()
    kept = {name: t.clone() for name, t in [*base.named_parameters(), *base.named_buffers()]}
    nets = pair(base)
    every = dict.fromkeys(p for net in nets for p in net.parameters())  # those of the base too, once
    optimizer = torch.optim.AdamW(every, lr=0.02, weight_decay=0.1)
    first = [copy.deepcopy(adapters(net)) for net in nets]
    losses = []
    for _ in range(5):
        loss = loss_of_both(*nets, tokens())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for old, net in zip(first, nets):
        assert all(not torch.equal(old[name], p) for name, p in adapters(net).items())
    own = dict([*base.named_parameters(), *base.named_buffers()])
    assert all(torch.equal(own[name], kept[name]) for name in kept)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    for net in nets:
        shared = {name.replace('.linear.', '.'): t for name, t in
                  [*net.named_parameters(), *net.named_buffers()] if name not in adapters(net)}
        assert shared.keys() == own.keys()
        assert all(t.data_ptr() == own[name].data_ptr() for name, t in shared.items())
    own_of = [{p.data_ptr() for p in adapters(net).values()} for net in nets]
    assert len(own_of[0]) == len(own_of[1]) == 16 and not own_of[0] & own_of[1]


def test_networks_over_one_base_share_tensors_but_not_modules():
    base = random_base()
    encoder, decoder = pair(base)
    assert not {id(m) for m in encoder.modules()} & {id(m) for m in [*decoder.modules(), *base.modules()]}
    assert lora.layers(base) == [] and len(lora.layers(encoder)) == 8
    x = tokens()
    other = torch.cat([x[:, :-1], (x[:, -1:] + 1) % 7], 1)  # who sees the last token?
    unseen = [torch.allclose(n(x)[:, :-1], n(other)[:, :-1], atol=1e-9) for n in (encoder, decoder, base)]
    assert unseen == [False, True, True]
    encoder.train(), decoder.eval()
    assert encoder.blocks[0].mlp.fc.drop.training and not decoder.blocks[0].mlp.fc.drop.training


@ARCHS
def test_folded_weights_equal_the_adapted_network_and_touch_neither_the_base_nor_the_other(arch):
    base, x = random_base(arch), tokens()
    net, other = pair(base, dropout=0.5)
    net.eval(), other.eval()
    kept = {name: p.clone() for name, p in base.state_dict().items()}
    with torch.no_grad():
        before = [n(x) for n in (net, other, base)]
        plain = random_base(arch, seed=5)
        for block in plain.blocks:
            block.attn.causal = False
        plain.load_state_dict(lora.folded(net.state_dict(), dict(lora_alpha=ALPHA)))
        assert torch.allclose(plain(x), before[0], atol=1e-12)
        assert not torch.allclose(plain(x), before[2], atol=1e-2)
        assert all(torch.equal(n(x), b) for n, b in zip((net, other, base), before))
        assert all(torch.equal(base.state_dict()[name], p) for name, p in kept.items())
    assert loss_of_both(net, other, x).requires_grad


def test_dropout_is_on_what_enters_the_change_and_only_in_training():
    linear = random_base().blocks[0].mlp.fc
    torch.manual_seed(1)
    layer, x = lora.LoRA(linear, RANK, ALPHA, 0.5), torch.randn(5, 16, dtype=torch.float64)
    torch.manual_seed(2)
    assert torch.equal(layer.train()(x), linear(x))  # B = 0
    torch.nn.init.normal_(layer.B)
    torch.manual_seed(2)
    dropped = layer(x)
    torch.manual_seed(2)
    entering = F.dropout(x, 0.5)
    assert torch.allclose(dropped, linear(x) + ALPHA / RANK * entering @ layer.A.T @ layer.B.T, atol=1e-12)
    whole = linear(x) + ALPHA / RANK * x @ layer.A.T @ layer.B.T
    assert not torch.allclose(dropped, whole) and torch.allclose(layer.eval()(x), whole, atol=1e-12)


def test_dropout_of_a_fresh_adapter_changes_nothing_in_training_and_of_a_trained_one_does():
    base = random_base()
    fresh, net = lora.adapt(base, RANK, ALPHA, dropout=0.5).train(), trained(base, dropout=0.5).train()
    assert torch.equal(logits(fresh), logits(base))
    assert not torch.allclose(logits(net), logits(net))
    assert torch.equal(logits(net.eval()), logits(net))
    assert torch.equal(logits(net), logits(trained(base).train()))  # the default is none


# ---- what is kept -----------------------------------------------------------------------------------------

def test_adapters_alone_are_saved_and_make_another_network_over_the_base_the_same(tmp_path):
    base = random_base()
    net, other = trained(base, 1), trained(base, 2)
    own = adapters(net)
    assert sorted(own) == sorted(f'blocks.{i}.{path}.{leaf}' for i in (0, 1) for leaf in 'AB'
                                 for path in ('attn.qkv', 'attn.proj', 'mlp.fc', 'mlp.proj'))
    torch.save(own, tmp_path / 'adapters.pt')
    assert (tmp_path / 'adapters.pt').stat().st_size < 8 * sum(p.numel() for p in own.values()) + 20_000
    again = torch.load(tmp_path / 'adapters.pt', weights_only=True)
    expected = logits(net)
    assert not torch.allclose(logits(other), expected)
    missing, unexpected = other.load_state_dict(again, strict=False)
    assert unexpected == [] and not any(name.endswith(('.A', '.B')) for name in missing)
    assert torch.equal(logits(other), expected)


@ARCHS
def test_a_plain_network_fills_the_base_of_an_adapted_one_and_of_all_that_share_it(arch):
    base, plain = random_base(arch), random_base(arch, seed=5)
    weights = {name: p.clone() for name, p in plain.state_dict().items()}
    net, other, fresh = trained(base, 1), trained(base, 2), lora.adapt(base, RANK, ALPHA)
    own = copy.deepcopy(adapters(net))
    lora.load_base(net, weights)
    assert torch.equal(logits(fresh), logits(plain)) and torch.equal(logits(base), logits(plain))
    assert all(torch.equal(own[name], p) for name, p in adapters(net).items())
    assert torch.equal(logits(net), logits(trained(plain, 1)))
    assert torch.equal(logits(other), logits(trained(plain, 2)))
    for p in weights.values():
        p.zero_()  # it was a copy
    assert torch.equal(logits(fresh), logits(plain))


@pytest.mark.parametrize('name', ['blocks.1.mlp.fc.weight', 'blocks.0.attn.proj.bias', 'norm.weight',
                                  'embed.weight'])
def test_a_base_that_lacks_a_tensor_or_has_another_shape_is_refused_by_name(name):
    net, weights = trained(random_base('gpt2')), random_base('gpt2', seed=5).state_dict()
    lora.load_base(net, weights)
    with pytest.raises(ValueError, match='^' + re.escape(name)):
        lora.load_base(net, {key: p for key, p in weights.items() if key != name})
    for p in (weights[name][:-1], weights[name][:1], weights[name][None]):  # the last two would broadcast
        with pytest.raises(ValueError, match='^' + re.escape(name)):
            lora.load_base(net, {**weights, name: p})


# ---- targets ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('targets, paths', [(('qkv',), ['attn.qkv']), (('proj',), ['attn.proj', 'mlp.proj']),
                                            (('fc', 'qkv'), ['attn.qkv', 'mlp.fc'])], ids=str)
def test_only_the_named_targets_are_adapted(targets, paths):
    net = lora.adapt(random_base(), RANK, ALPHA, targets=targets)
    found = sorted(path for path, m in net.named_modules() if isinstance(m, lora.LoRA))
    assert found == sorted(f'blocks.{i}.{path}' for i in (0, 1) for path in paths)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(adapters(net))
    assert set(adapters(net)) == {f'{path}.{leaf}' for path in found for leaf in 'AB'}


def test_targets_that_match_no_linear_layer_are_told_what_there_is():
    for targets in (('query', 'key'), ('mlp',), ('blocks', 'norm1')):  # the others are there, but not linear
        with pytest.raises(ValueError) as told:
            lora.adapt(random_base(), RANK, ALPHA, targets=targets)
        asked, there = str(told.value).split(';')
        assert ','.join(targets) in asked and re.findall(r'\w+', there)[-5:] == [
            'fc', 'gate', 'head', 'proj', 'qkv']
