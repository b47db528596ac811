"""
Several processes, one training: each has micro-batches of its own, and the gradients are averaged.

DistributedDataParallel (DDP) keeps the whole model in every process. With FSDP2 (`shard`, arXiv 2304.11277)
a process keeps only its part of every weight, average and optimizer state, and a block's weights are gathered
when the block is called. Checkpoints hold whole tensors either way, so a run goes on with or without it.
"""
import contextlib
import functools
from collections import Counter

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import common
import model as transformer


def several():
    """Is this one of several processes?"""
    return dist.is_available() and dist.is_initialized()


def of_first(value):
    """The first process's value, for all: what they decide by must not differ in a last digit."""
    values = [value]
    if several():
        dist.broadcast_object_list(values)
    return values[0]


def everywhere(true, device):
    """Is it true in all processes?"""
    if not several():
        return true
    flag = torch.tensor(float(true), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return flag.item() > 0


# ---- gradients --------------------------------------------------------------------------------------------

def averaging(model):
    """The model as it is to be called for a loss, so that `backward` averages the gradients over processes.
    A sharded one does so by itself. DDP leaves frozen parameters alone; buffers are the same everywhere."""
    if not several() or hasattr(model, 'set_requires_gradient_sync'):
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def micro_batch(loss_fn, last):
    """Around forward and backward of a micro-batch: processes speak at the last one of a step only."""
    if hasattr(loss_fn, 'set_requires_gradient_sync'):
        loss_fn.set_requires_gradient_sync(last)
    with loss_fn.no_sync() if hasattr(loss_fn, 'no_sync') and not last else contextlib.nullcontext():
        yield


# ---- sharded models ---------------------------------------------------------------------------------------

def place(model, ema, device, shard):
    """Bring a model and its average to the device; with `shard`, if there are several processes, this
    process's part of them."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for net in (model, ema):
        if shard and several():
            divide(net, trained, device)
        net.to(device)


def divide(net, trained, device):
    """Shard a network in place. trained: names of the parameters that are trained in a run. Frozen ones stay
    whole outside of blocks, in blocks where nothing is trained, and where two networks have them in common:
    a model may use these without a forward of its own, as latent.py does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    uses = Counter(p for _, p in net.named_parameters(remove_duplicate=False))
    blocks = [block for path, block in net.named_modules() if isinstance(block, transformer.Block)
              and any(name.startswith(f'{path}.') for name in trained)]
    inside = {p for block in blocks for p in block.parameters() if uses[p] == 1}
    left = {p for name, p in net.named_parameters() if name not in trained and p not in inside}
    # the root is resharded, too: what an evaluation has gathered would be out of date after the next step
    how = dict(mesh=init_device_mesh(device.type, (dist.get_world_size(),)), reshard_after_forward=True,
               ignored_params=left)
    sample = net.sample
    net.sample = functools.wraps(sample)(lambda *args, **knobs: list(sample(*args, **knobs)))
    for module in (*blocks, net):
        fully_shard(module, **how)
    for name in {'nats', 'measure', 'sample'} & set(dir(net)):
        register_fsdp_forward_method(net, name)  # of `sample` a list: FSDP2 would leave a generator early


def whole(tree):
    """A tree of dicts and lists with whole tensors, on the CPU, in place of sharded ones; only in the first
    process, None elsewhere, but all must call it."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    if not hasattr(tree, 'full_tensor'):
        return tree
    tensor = tree.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else None


def save(checkpoint, path):
    """common.save, of whole tensors, by the first process; all must call it."""
    checkpoint = whole(checkpoint) if several() else checkpoint
    if not several() or dist.get_rank() == 0:
        common.save(checkpoint, path)


def take_whole_states(optimizers):
    """Let optimizers of sharded parameters load what `save` has written."""
    def part(tensor, p):
        if not hasattr(p, 'full_tensor') or getattr(tensor, 'shape', None) != p.shape:
            return tensor
        from torch.distributed.tensor import distribute_tensor  # takes a while
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    def hook(optimizer, saved):
        params = [p for group in optimizer.param_groups for p in group['params']]
        states = {i: {name: part(value, params[i]) for name, value in state.items()} if i < len(params)
                  else state for i, state in saved['state'].items()}
        return saved | dict(state=states)
    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(hook)
