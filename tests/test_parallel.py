"""Several processes against one: DDP, FSDP2, compiled, frozen parts, resumed."""
import copy
import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import common
import masked
import train
from conftest import TINY, started
from parts.muon import optimizers
from test_latent_scripts import AR, LATENT, VAE
from tools import parallel

RUN = [*TINY, '--max_iters=6', '--eval_interval=3', '--dropout=0.1']


@pytest.fixture(autouse=True)
def muon_in_float32(monkeypatch):
    """So that two runs differ by the order of sums alone, on a CPU with instructions for bfloat16, too."""
    monkeypatch.setattr(common, 'fast_dtype', lambda device: torch.float32)


@pytest.fixture
def processes(monkeypatch):
    """A function (flags): train.main in two processes, as torchrun starts them."""
    def run(*flags):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            job = dict(WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=free.getsockname()[1])
        both = []
        with monkeypatch.context() as patch:
            for rank in (0, 1):
                for name, value in dict(job, RANK=rank, LOCAL_RANK=rank).items():
                    patch.setenv(name, str(value))
                both.append(started(*flags))
        for process in both:
            process.join(120)
            assert process.exitcode == 0
    return run


def assert_close(two, one, atol=1e-4):
    """Are two last.pt of one layout, and equal but for the order of sums?"""
    two, one = (common.load(f'{folder}/last.pt') for folder in (two, one))
    assert two['tokens'] == one['tokens'] and abs(two['val'][0] - one['val'][0]) < 1e-3
    for key in ('model', 'ema'):
        assert two[key].keys() == one[key].keys()
        for name, p in one[key].items():
            assert torch.allclose(p, two[key][name], atol=atol), (key, name)
    for a, b in zip(two['optimizers'], one['optimizers'], strict=True):
        assert a['state'].keys() == b['state'].keys() and len(a['param_groups']) == len(b['param_groups'])
        for i, state in b['state'].items():
            assert all(torch.allclose(p, a['state'][i][name], atol=atol) for name, p in state.items())


@pytest.mark.parametrize('how', [[], ['--shard=True']], ids=['ddp', 'fsdp2'])
@pytest.mark.parametrize('objective', ['masked', 'score'])
def test_two_processes_equal_one_with_twice_the_accumulation(workdir, processes, how, objective):
    run = [*RUN, f'--objective={objective}']
    processes(*run, *how, '--grad_accum=2', '--out_dir=two')
    train.main([*run, '--grad_accum=4', '--out_dir=one'])
    assert_close('two', 'one')


LORA = [*TINY, '--init_from=out-a', '--lora_rank=2', '--lora_embed=False']


@pytest.mark.parametrize('how', [[], ['--shard=True']], ids=['ddp', 'fsdp2'])
@pytest.mark.parametrize('before, run', [
    ([[*TINY, '--out_dir=out-a']], LORA), ([AR], VAE), ([AR, VAE], LATENT)], ids=['lora', 'vae', 'latent'])
def test_so_they_do_when_parts_of_the_model_are_frozen(after, processes, how, before, run):
    after(*before)
    processes(*run, *how, '--out_dir=two')
    train.main([*run, '--grad_accum=2', '--out_dir=one'])
    assert_close('two', 'one')


@pytest.mark.parametrize('how', [[], ['--shard=True']], ids=['ddp', 'fsdp2'])
def test_so_they_do_compiled(workdir, processes, monkeypatch, how):
    """By dynamo alone, which is where processes could matter; with buckets of 1 KB DDP cuts the graph."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    monkeypatch.setattr(dist, '_DEFAULT_FIRST_BUCKET_BYTES', 1024)
    run = [*RUN, '--compile=True', '--n_layer=2']
    processes(*run, *how, '--grad_accum=2', '--out_dir=two')
    train.main([*run, '--grad_accum=4', '--out_dir=one'])
    assert_close('two', 'one')


def test_where_one_process_has_no_compiler_all_go_on_without(workdir, processes, monkeypatch, capfd):
    def compile(model):
        if os.environ['RANK'] == '1':
            raise RuntimeError('no compiler for you')
        return real(model, backend='eager')
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', compile)
    processes(*RUN, '--compile=True', '--out_dir=two')
    err = capfd.readouterr().err
    assert 'no compiler for you' in err and 'another process could not' in err
    train.main([*RUN, '--grad_accum=2', '--out_dir=one'])
    assert_close('two', 'one')


@pytest.mark.parametrize('first, then', [(True, False), (False, True)])
def test_a_sharded_run_goes_on_unsharded_and_the_other_way_round(workdir, processes, first, then):
    run = [*RUN, '--cooldown=0']
    train.main([*run, '--out_dir=one', '--max_iters=8', '--grad_accum=2'])
    for shard, flags in ((first, run), (then, ['--init_from=resume', '--max_iters=8'])):
        if shard:
            processes(*flags, '--out_dir=two', '--shard=True', '--grad_accum=1')
        else:
            train.main([*flags, '--out_dir=two', '--shard=False', '--grad_accum=2'])
    assert_close('two', 'one')


# ---- in one process ---------------------------------------------------------------------------------------

@pytest.fixture
def group():
    """A group of one process, which works as one of many does."""
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def networks(shard, **knobs):
    """A model and its average, placed."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=16)
    model = masked.Model(masked.Config(**sizes, **knobs))
    torch.nn.init.normal_(model.gpt.head.weight)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parallel.place(model, ema, torch.device('cpu'), shard)
    return model, ema


def test_a_process_keeps_its_part_of_what_is_trained_and_of_the_blocks():
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group('fake', rank=0, world_size=4, store=FakeStore())
    for knobs, left in (({}, []), (dict(lora_rank=4), ['gpt.head.weight'])):
        for net in networks(True, **knobs):
            parts = {name: len(p.to_local()) / len(p) for name, p in net.named_parameters()
                     if hasattr(p, 'to_local')}
            assert [name for name, _ in net.named_parameters() if name not in parts] == left
            whole = [name for name in parts if name.endswith(('.weight', '.A', '.B')) and 'head' not in name
                     and 'gate' not in name]  # whose rows are too few for four
            assert {parts[name] for name in whole} == {1 / 4}
    dist.destroy_process_group()


def test_gradients_are_averaged_at_the_last_micro_batch_only(group):
    model, _ = networks(shard=False)
    ddp, calls = parallel.averaging(model), []

    def count(state, bucket):
        calls.append(bucket.index())
        return allreduce_hook(state, bucket)
    ddp.register_comm_hook(None, count)
    x = torch.randint(7, (4, 8))
    for last in (False, False, True):
        with parallel.micro_batch(ddp, last):
            ddp(x=x)[0].backward()
        assert bool(calls) == last
    sharded, _ = networks(shard=True)
    for last in (False, False, True):
        with parallel.micro_batch(sharded, last):
            sharded(x=x)[0].backward()
        assert all((p.grad is not None) == last for p in sharded.parameters())


def test_a_sharded_average_is_evaluated_and_sampled_as_a_whole_one_also_after_it_has_moved(group):
    x, found = torch.randint(7, (4, 8)), []
    for shard in (False, True):
        model, ema = networks(shard)
        values = []
        for _ in range(2):
            torch.manual_seed(1)
            values += [ema.nats(x=x, n=2), *ema.sample(torch.full((2, 8), 7), steps=4)]
            model(x=x)[0].backward()
            for p in model.parameters():
                p.data.sub_(p.grad)
            train.update_ema(list(ema.parameters()), list(model.parameters()), 0.5, 100)
        found.append(values)
    assert not torch.equal(values[0], values[5])
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


def test_muon_and_adamw_load_into_shards_what_whole_ones_have_saved(group):
    states = []
    for shard in (False, True):
        model, _ = networks(shard)
        own = optimizers(model, 0.1, 0.1, dtype=torch.float32)
        if states:
            parallel.take_whole_states(own)
            for optimizer, state in zip(own, states[0], strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))
            assert all(hasattr(s['momentum_buffer'], 'to_local') for s in own[1].state.values())
        else:
            model(x=torch.randint(7, (4, 8)))[0].backward()
            for optimizer in own:
                optimizer.step()
        states.append(parallel.whole([optimizer.state_dict() for optimizer in own]))
    for a, b in zip(*states):
        for i, state in a['state'].items():
            assert all(torch.equal(p, b['state'][i][name]) for name, p in state.items())
