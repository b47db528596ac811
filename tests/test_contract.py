"""What every concept file promises the scripts (one parametrised test file, no base class)."""
import contextlib
import copy
import dataclasses
import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import configurator
import masked
import train
import vae
from parts.graphs import graphed, quick
from parts.muon import optimizers
from text import rows

SIZES = dict(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=16)
VAE = SIZES | dict(base_context=16, n_latent=2, d_latent=4)
MORE = {'vae': VAE, 'latent': dict(stride=4, vae=json.dumps(dataclasses.asdict(vae.Config(**VAE)))),
        'd3pm': dict(T=10)}


@pytest.fixture(params=common.OBJECTIVES)
def concept(request):
    return common.concept(request.param)


def config_of(concept, **knobs):
    return concept.Config(**{**SIZES, **MORE.get(concept.__name__, {}), **knobs})


def random_model(concept, **knobs):
    torch.manual_seed(0)
    model = concept.Model(config_of(concept, **knobs))
    for name, p in model.named_parameters():
        if p.dim() > 1 and (model.base or name.endswith('head.weight')):
            torch.nn.init.normal_(p, std=0.1)
    return model


def batch_of(concept, B=6):
    """What `forward` takes: tokens, but of latent diffusion latents."""
    if concept.__name__ == 'latent':
        return dict(z=torch.randn(B, 2, 4), before=torch.randn(B, 1, 2, 4),
                    there=torch.ones(B, 1, dtype=torch.bool))
    return dict(x=torch.randint(7, (B, 8)))


def test_the_config_is_a_dataclass_whose_every_knob_has_a_type_and_a_comment(concept):
    for knob in configurator.knobs_of(concept.Config).values():
        assert configurator.kind_of(knob.type) in (int, float, str, bool, configurator.Filename), knob
        assert knob.comment and configurator.convert(knob, knob.default) == knob.default, knob


def test_rules_and_samplers_have_knobs_with_types_defaults_and_comments_that_agree(concept):
    found = {}
    for function in (*concept.RULES.values(), concept.Model.sample):
        for knob in configurator.knobs_of(function).values():
            assert knob.comment and knob.type == found.setdefault(knob.name, knob).type, (function, knob)
            configurator.convert(knob, knob.default)


def test_the_class_says_what_the_scripts_must_know(concept):
    M = concept.Model
    assert M.bound in ('exact', 'upper') and set(M.takes) <= rows.KINDS.keys() and set(M.orders) <= {'left'}
    assert all(type(flag) is bool for flag in (M.revises, M.any_length, M.selects, M.measures))
    assert M.base in ('', *common.OBJECTIVES)
    assert bool(M.base) == ('base' in configurator.knobs_of(concept.Config))
    assert all(callable(getattr(M, name)) for name in M.verbs) and isinstance(M.reading, dict)


@pytest.mark.parametrize('name', [name for name in common.OBJECTIVES if common.concept(name).Model.verbs])
def test_what_is_compiled_for_sampling_traces_in_one_piece_and_writes_the_same(name, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, mode: compile(f, backend='eager', fullgraph=True))
    texts = []
    for fast in (False, True):
        model = random_model(common.concept(name)).eval()
        torch.manual_seed(1)
        with quick(model, compile=fast) as calls:
            *_, canvas = model.sample(torch.full((2, 8), 7), 4)
        texts.append(canvas)
        assert len(calls) == 4
    assert torch.equal(*texts)


def test_a_sampler_goes_on_without_a_compiler_with_a_warning(monkeypatch, capsys):
    def compile(f, mode):
        def broken(*args):
            raise RuntimeError('no compiler for you')
        return broken
    monkeypatch.setattr(torch, 'compile', compile)
    model = random_model(masked).eval()
    with quick(model, compile=True) as calls:
        *_, canvas = model.sample(torch.full((2, 8), 7), 4)
    assert (canvas < 7).all() and len(calls) == 4
    assert capsys.readouterr().err.count('RuntimeError: no compiler for you') == 1


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU'))])
def test_a_recorded_function_is_the_function_for_every_shape(device):
    """On a CPU it is not recorded; there the test holds the contract alone."""
    double = graphed(lambda x, y: (2 * x, x if y is None else x @ y))
    for n in (2, 3, 2):
        for y in (None, torch.randn(4, 5, device=device)):
            x = torch.randn(n, 4, device=device)
            a, b = double(x, y)
            assert torch.equal(a, 2 * x) and torch.allclose(b, x if y is None else x @ y)


def test_forward_gives_a_scalar_loss_and_plain_metrics_and_every_parameter_a_gradient(concept):
    model = random_model(concept)
    loss, metrics = model(**batch_of(concept))
    assert (loss.shape == () and loss.isfinite()
            and all(v.shape == () and not v.requires_grad for v in metrics.values()))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_name_that_the_model_does_not_know_is_an_error(concept):
    with pytest.raises(TypeError, match='segmnt'):
        random_model(concept)(**batch_of(concept), segmnt=None)


def test_forward_compiles_as_one_graph_and_draws_new_noise_every_call(concept):
    """Two of them to machine code, where there is a compiler: that takes a while. The masked loss is compiled
    so in test_the_compiled_loop_resumes_bit_for_bit_too."""
    model, batch = random_model(concept, n_layer=1), batch_of(concept)
    whole = concept.__name__ in ('block', 'score') and shutil.which('g++')
    backend = 'inductor' if whole else 'aot_eager'
    loss_fn = torch.compile(model, backend=backend, fullgraph=True)
    losses = {loss_fn(**batch)[0].item() for _ in range(4)}
    assert len(losses) == (1 if model.bound == 'exact' else 4)
    loss_fn(**batch)[0].backward()
    torch._dynamo.reset()


# knobs that lead through other lines of `forward` and `nats`
OTHERWISE = {'masked': [dict(masking='count', time_input=True), dict(shift=True, anneal_iters=2, lora_rank=2),
                        dict(t_law='uniform', schedule='cosine', loss_weight='elbo')],
             'd3pm': [dict(carry_over=True)], 'block': [dict(loss_weight='elbo'), dict(block_length=1)],
             'score': [dict(self_condition=True, mse=0.1, loss_weight='edm', reads='scaled')],
             'vae': [dict(pooled=True, learned_variance=True, sentences=True, short=0.5, free_bits=0.1),
                     dict(whole=True)],
             'latent': [dict(sigma_law='lognormal', error_weight='x0')], 'sedd': [dict(masking='count')],
             'ar': [dict(arch='gpt2')]}
CASES = [(name, knobs) for name in common.OBJECTIVES for knobs in [{}, *OTHERWISE.get(name, [])]]


def apart(model, B=6):
    """What a model may be told of its rows beside the tokens: segments, prompts."""
    kinds = dict(lines=('segment', torch.long), pairs=('given', torch.bool))
    return {name: torch.zeros(B, 8, dtype=dtype) for kind, (name, dtype) in kinds.items()
            if kind in model.takes}


def on_meta(batch):
    return {name: tensor.to('meta') for name, tensor in batch.items()}


class MetaOnly(TorchDispatchMode):
    """Fails where an operation makes a tensor on another device than `meta`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert all(t.is_meta for t in tree_leaves(out) if isinstance(t, torch.Tensor)), function
        return out


@pytest.mark.parametrize('name, knobs', CASES)
def test_a_training_step_makes_no_tensor_elsewhere_and_waits_for_nothing(name, knobs):
    """On `meta` no number can be read. (AdamW keeps its step count on the CPU.)"""
    concept = common.concept(name)
    model = random_model(concept, n_layer=1, **knobs).to('meta')
    ema = copy.deepcopy(model)
    pairs = [(p, e) for p, e in zip(model.parameters(), ema.parameters()) if p.requires_grad]
    params, averages = zip(*pairs)
    state = SimpleNamespace(run=train.Config(batch_size=6), model=model, iter=0, tokens=0,
                            optimizers=optimizers(model, 0.1, 0.1), peak=[0.1, 0.1], params=params,
                            averages=averages)

    def loss_fn(**batch):
        with MetaOnly():
            return model(**batch)
    batch = on_meta({**batch_of(concept), **(apart(model) if knobs else {})})
    rows = SimpleNamespace(batch=lambda B: (batch, 48))
    metrics = train.step(state, loss_fn, rows, 0, 1, contextlib.nullcontext())
    assert all(value.is_meta for value in metrics.values())


@pytest.mark.parametrize('name, knobs', CASES)
def test_the_bound_makes_no_tensor_elsewhere_and_waits_for_nothing(name, knobs):
    model = random_model(common.concept(name), n_layer=1, **knobs).to('meta').eval()
    batch = on_meta(dict(x=torch.randint(7, (6, 8)), **apart(model)))
    with torch.no_grad(), MetaOnly():
        nats = model.nats(n=2, **batch)
    assert nats.is_meta and nats.shape == (6,)


def test_nats_has_a_value_for_each_row_that_is_a_function_of_the_seed(concept):
    model, x = random_model(concept), torch.randint(7, (6, 8))
    values = []
    for _ in range(2):
        common.seed_everything(1, 2)
        values.append(model.nats(x=x, n=3))
    assert values[0].shape == (6,) and torch.equal(*values)


def test_sample_fills_the_canvas_keeps_what_is_given_and_draws_no_mask(concept):
    model, canvas = random_model(concept), torch.full((3, 8), 7)
    canvas[:, :2] = torch.tensor([4, 5])
    frames = list(model.sample(canvas, steps=4))
    assert all(f.shape == (3, 8) and (f[:, :2] == canvas[:, :2]).all() for f in frames)
    assert (frames[-1] < 7).all() and not any(f.requires_grad for f in frames)
    assert (canvas[:, 2:] == 7).all()  # the caller's tensor is left alone


def test_takes_says_who_takes_segments_and_prompts_and_revises_whose_tokens_may_change(concept):
    for method in (concept.Model.forward, concept.Model.nats):
        names = inspect.signature(method).parameters
        assert ('segment' in names) == ('lines' in concept.Model.takes)
        assert ('given' in names) == ('pairs' in concept.Model.takes)
    torch.manual_seed(0)
    frames = list(random_model(concept).sample(torch.full((40, 8), 7), steps=8))
    changed = [(a != b) & (a < 7) for a, b in zip(frames, frames[1:])]
    assert any(c.any() for c in changed) == concept.Model.revises


def test_orders_says_whose_likelihood_from_left_to_right_is_known(concept):
    assert hasattr(concept.Model, 'nats_left') == ('left' in concept.Model.orders)


def test_the_network_output_is_half_precision_safe(concept):
    model, x = random_model(concept), torch.randint(7, (6, 8))
    with torch.autocast('cpu', torch.bfloat16):
        common.seed_everything(0)
        low = model.nats(x=x, n=2)
    common.seed_everything(0)
    assert low.dtype == torch.float32 and torch.allclose(low, model.nats(x=x, n=2), rtol=0.02)
