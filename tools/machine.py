"""
The machine under a training: several processes, signals, the compiler, the disk.
"""
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from common import pick_device
from configurator import fail


def join(name):
    """(rank, world, device) of this process, one of those that torchrun has started, or the only one."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(name)
    if world > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    return rank, world, device


def leave(world):
    if world > 1:
        dist.barrier()  # rank 0 may still be writing the last checkpoint
        dist.destroy_process_group()


def average_gradients(params, world):
    """Replace every gradient by its mean over the processes."""
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, (flat / world).split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


def longest(seconds, world, device):
    """The largest of a number that every process has."""
    if world == 1:
        return seconds
    seconds = torch.tensor(seconds, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def stop_signals(world, device):
    """Catch Ctrl-C, SIGTERM and a terminal that hangs up -> a function (iteration) -> whether one has come.
    Processes agree on the iteration, so that none waits for another that has left."""
    caught = []
    stops = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        stops.append(signal.SIGHUP)
    for number in stops:
        signal.signal(number, lambda number, frame: caught.append(number))

    def stop(it):
        if world == 1:
            return bool(caught)
        if it % 10:
            return False
        flag = torch.tensor(float(bool(caught)), device=device)
        dist.all_reduce(flag)
        return flag.item() > 0
    return stop


def compiled(model, batch, amp):
    """torch.compile(model), tried on a batch under autocast; the model itself, with a line of warning, where
    there is no compiler."""
    try:
        loss_fn = torch.compile(model)
        with amp:
            loss, _ = loss_fn(**batch)
        loss.backward()
        model.zero_grad()
        return loss_fn
    except Exception as e:  # no C++ compiler, no Triton, an old GPU: many kinds
        why = next((line for line in str(e).splitlines() if line.strip()), 'no reason given')
        print(f"warning: torch.compile does not work here ({type(e).__name__}: {why.strip()}), going on "
              f"without", file=sys.stderr)
        torch._dynamo.reset()
        model.zero_grad()
        return model


def say(line, bar=None):
    """Print a line (above the bar, if there is one). A reader that has left, or a full disk behind the
    output, do not stop the training."""
    with contextlib.suppress(OSError):
        bar.write(line, file=sys.stdout) if bar else print(line)
        sys.stdout.flush()


def check_room(folder, nets, optimizers, there, resumed):
    """Is there room on the disk of the folder `there` for best.pt, last.pt and, while it is replaced, another
    last.pt? Or the script ends. resumed: those in `folder` will be replaced."""
    best = sum(t.nbytes for net in nets for t in net.state_dict().values())
    last = best + sum(p.nbytes * (2 if isinstance(o, torch.optim.AdamW) else 1)
                      for o in optimizers for g in o.param_groups for p in g['params'])
    room = shutil.disk_usage(there).free
    if resumed:
        room += sum(p.stat().st_size for p in Path(folder).glob('*.pt'))
    if best + 2 * last > room:
        fail(f"no room for the checkpoints in {folder}/: they take {(best + 2 * last) / 1e6:,.1f} MB at "
             f"most, {room / 1e6:,.1f} MB are free")
