"""
The machine under a training: several processes, signals, the compiler, the disk.
"""
import contextlib
import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from common import pick_device
from configurator import fail
from parts.graphs import warn
from text import files
from tools import parallel


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


def compile_loss(loss_fn, batch, amp, accumulates=False):
    """Compile the loss of a model, in place, and try it on a batch under autocast; a line of warning, and it
    stays as it is, where there is no compiler. On CUDA its kernels become one graph, unless gradients are
    added up over several batches or processes: a graph writes them to the same place every time."""
    model = getattr(loss_fn, 'module', loss_fn)  # under DDP, which then cuts the graph at its buckets
    alone = getattr(loss_fn, 'no_sync', contextlib.nullcontext)
    device, why = next(iter(batch.values())).device, RuntimeError('another process could not')
    graph = device.type == 'cuda' and not accumulates and not parallel.several()
    try:
        model.compile(**dict(mode='reduce-overhead') if graph else {})
        for _ in range(3 if graph else 1):  # warm up, record, replay
            with alone():
                with amp:
                    loss, _ = loss_fn(**batch)
                loss.backward()
            model.zero_grad()
        works = True
    except Exception as e:  # see `warn`
        works, why = False, e
    model.zero_grad()
    if not parallel.everywhere(works, device):
        warn(why)
        torch._dynamo.reset()
        model._compiled_call_impl = None  # as before nn.Module.compile


def set_aside(folder):
    """Move the checkpoints of an earlier run in this folder into old-1/ (or -2 ...) there, so that a new run
    neither mixes with it nor destroys it -> that folder, or None if there are none."""
    old = [path for path in (Path(folder, 'best.pt'), Path(folder, 'last.pt')) if path.exists()]
    if not old:
        return None
    there = next(p for i in itertools.count(1) if not (p := Path(folder, f'old-{i}')).exists())
    with files.disk(there):
        there.mkdir()
        for path in old:
            path.rename(there / path.name)
    return there


UNUSUAL, MEASURED = 5, 25  # iterations: the first, which are slow; those by whose speed a run is planned
UNPLANNED = 10 ** 9        # max_iters of a run with a time to fill, until then


def length(run):
    """How long a run (train.Config) will be, in words."""
    return f"{run.max_iters:,} iterations" if planned(run) else f"{run.minutes:g} minutes"


def planned(run):
    """max_iters, or None while a run with a time to fill has none yet."""
    return None if run.max_iters == UNPLANNED else run.max_iters


class Pace:
    """How fast a run is, which sets its length if it has a time to fill."""

    def __init__(self, run, iter):
        self.run, self.first, self.began, self.usual = run, iter, time.time(), None

    def words(self, iter, loss):
        """After each iteration: once how long the run will take, else ''. loss: of that iteration."""
        done = iter - self.first
        if done in (UNUSUAL, UNUSUAL + MEASURED):
            loss.item()  # waits for the device
            if done == UNUSUAL:
                self.usual = time.time()
            else:
                times = (time.time() - self.usual) / MEASURED, time.time() - self.began
                return plan(self.run, iter, *parallel.of_first(times))
        return ''


def plan(run, iter, seconds, spent):
    """Say how long the rest of a run will take at these seconds an iteration. One with a time to fill, of
    which so many seconds are spent, gets its max_iters first; a tenth is for evaluations and texts."""
    if run.max_iters == UNPLANNED:
        done = UNUSUAL + MEASURED
        run.max_iters = max(2 * done, done + int(0.09 * (60 * run.minutes - spent) / seconds) * 10)
    minutes = (run.max_iters - iter) * seconds / 0.9 / 60
    return f"about {minutes:.1f} minutes to iteration {run.max_iters:,}, {seconds:.2f} s each"


LOG_SECONDS = 10  # between two lines


class Log:
    """What a training says of itself: the means of a step's metrics and its speed since the last line."""

    def __init__(self, iter):
        self.begin(iter)

    def begin(self, iter):
        self.metrics, self.began, self.first = [], time.time(), iter

    def due(self):
        return time.time() - self.began > LOG_SECONDS

    def line(self, iter, tokens, end):
        """(The line, how long the rest takes). tokens: of an iteration; end: the last iteration or None."""
        seconds = (time.time() - self.began) / (iter - self.first)
        means = {name: torch.stack([m[name] for m in self.metrics]).mean() for name in self.metrics[0]}
        parts = [f"{name} {mean:.4f}" for name, mean in means.items()]
        left = f", {seconds * (end - iter):.0f} s left" if end else ''
        return ', '.join([*parts, f"{tokens / seconds:,.0f} tokens/s"]), left


def check_finite(state, bad_iter, never, saving):
    """A loss, or weights about to be saved, that are no numbers end the script; a look waits for a GPU.
    state: of train.py; bad_iter: the first iteration with such a loss, `never` if there is none."""
    before = f"{state.run.out_dir}/last.pt, if there is one, is from before"
    if int(bad_iter) < int(never):
        sys.exit(f"error: the loss of iteration {int(bad_iter)} is not finite; {before}; a smaller --lr or "
                 f"--muon_lr may help")
    if saving and not all(p.isfinite().all() for p in state.params):
        sys.exit(f"error: iteration {state.iter - 1} made weights that are not finite; {before}; a smaller "
                 f"--lr may help")


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
