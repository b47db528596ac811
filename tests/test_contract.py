"""What every concept file promises the scripts (DESIGN: one parametrised test, no base class)."""
import contextlib
import dataclasses
import inspect
import json
import shutil

import pytest
import torch

import common
import train
import vae

SIZES = dict(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=16)
VAE = SIZES | dict(base_context=16, n_latent=2, d_latent=4)
MORE = {'vae': VAE, 'latent': dict(stride=4, vae=json.dumps(dataclasses.asdict(vae.Config(**VAE))))}


@pytest.fixture(params=common.OBJECTIVES)
def concept(request):
    return common.concept(request.param)


def config_of(concept, **knobs):
    return concept.Config(**{**SIZES, **MORE.get(concept.__name__, {}), **knobs})


def random_model(concept, **knobs):
    torch.manual_seed(0)
    model = concept.Model(config_of(concept, **knobs))
    head = model.gpt.head or model.head  # score.py has its own
    for p in model.parameters() if hasattr(model, 'unroll') else [head.weight]:
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(concept, B=6):
    """What `forward` takes: tokens, but of latent diffusion latents."""
    if concept.__name__ == 'latent':
        return torch.randn(B, 2, 4), torch.randn(B, 1, 2, 4), torch.ones(B, 1, dtype=torch.bool)
    return torch.randint(7, (B, 8)),


def test_the_config_is_a_dataclass_whose_every_knob_has_a_comment_and_a_plain_type(concept):
    from configurator import help_text
    text = help_text('', concept.Config)
    for field in dataclasses.fields(concept.Config):
        assert field.type in (int, float, str, bool)
        line, = [s for s in text.splitlines() if s.startswith(f'  --{field.name}=')]
        assert len(line.split(None, 1)) == 2, line


def test_forward_gives_a_scalar_loss_and_plain_metrics_and_every_parameter_a_gradient(concept):
    model = random_model(concept)
    loss, metrics = model(*inputs(concept))
    assert (loss.shape == () and loss.isfinite()
            and all(v.shape == () and not v.requires_grad for v in metrics.values()))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_forward_traces_as_one_graph_and_draws_new_noise_every_call(concept):
    model, x = random_model(concept), inputs(concept)
    loss_fn = torch.compile(model, backend='eager', fullgraph=True)
    losses = {loss_fn(*x)[0].item() for _ in range(4)}
    assert len(losses) == (1 if model.bound == 'exact' else 4)


def test_the_loss_compiles_to_machine_code_without_falling_back(concept, capsys):
    if not shutil.which('g++'):
        pytest.skip("no C++ compiler; tracing is tested above")
    model = concept.Model(config_of(concept, n_layer=1))
    loss_fn = train.compiled(model, inputs(concept), contextlib.nullcontext())
    assert loss_fn is not model, capsys.readouterr().err
    torch._dynamo.reset()


def test_nats_has_a_value_for_each_row_that_is_a_function_of_the_seed(concept):
    model, x = random_model(concept), torch.randint(7, (6, 8))
    values = []
    for _ in range(2):
        common.seed_everything(1, 2)
        values.append(model.nats(x, 3))
    assert values[0].shape == (6,) and torch.equal(*values) and model.bound in ('exact', 'upper', None)


def test_sample_fills_the_canvas_keeps_what_is_given_and_draws_no_blank(concept):
    model, canvas = random_model(concept), torch.full((3, 8), 7)
    canvas[:, :2] = torch.tensor([4, 5])
    frames = list(model.sample(canvas, steps=4))
    assert all(f.shape == (3, 8) and (f[:, :2] == canvas[:, :2]).all() for f in frames)
    assert (frames[-1] < 7).all() and not any(f.requires_grad for f in frames)
    assert (canvas[:, 2:] == 7).all()  # the caller's tensor is left alone


def test_packs_says_who_takes_segments_and_revises_whose_tokens_may_change(concept):
    for method in (concept.Model.forward, concept.Model.nats):
        assert ('segment' in inspect.signature(method).parameters) == concept.Model.packs
    torch.manual_seed(0)
    frames = list(random_model(concept).sample(torch.full((40, 8), 7), steps=8))
    changed = [(a != b) & (a < 7) for a, b in zip(frames, frames[1:])]
    assert any(c.any() for c in changed) == concept.Model.revises


def test_the_network_output_is_half_precision_safe(concept):
    model, x = random_model(concept), torch.randint(7, (6, 8))
    with torch.autocast('cpu', torch.bfloat16):
        common.seed_everything(0)
        low = model.nats(x, 2)
    common.seed_everything(0)
    assert low.dtype == torch.float32 and torch.allclose(low, model.nats(x, 2), rtol=0.02)
