"""
What it takes to measure a machine, for tools/bench.py: clocks, memory, arithmetic and a table.

A time is the median over repeats, with the 10th and the 90th percentile, after calls that do not count; the
device has finished whenever a clock is read.
"""
import platform
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn as nn

import model as transformer

WARM = 2                                  # calls that do not count
SQUARES = [2 ** i for i in range(8, 15)]  # sides of the matrices that are multiplied


def sync(device):
    """Wait until the device has done all it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def seconds_of(work, device):
    """Seconds from an idle device to an idle device, with work() in between."""
    sync(device)
    began = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - began


def measure(parts, device, repeats=20, most=10.0, warm=WARM):
    """Times parts {name: function}, called in turn `repeats` times, or once or more in `most` seconds:
    {name: dict of seconds, low, high (the 10th and 90th percentile) and repeats}."""
    times, began = [], time.perf_counter()
    for i in range(warm + repeats):
        began = time.perf_counter() if i == warm else began
        times.append([seconds_of(part, device) for part in parts.values()])
        if i >= warm and time.perf_counter() - began > most:
            break
    spread = np.percentile(times[warm:], (50, 10, 90), axis=0).T.tolist()
    return {name: dict(zip(('seconds', 'low', 'high'), own), repeats=len(times) - warm)
            for name, own in zip(parts, spread)}


def facts(device, dtype):
    """What a time depends on beside the config: a dict."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}
        name = known.get('cpu_name') or platform.processor() or platform.machine()
    return dict(device=str(device), name=name, threads=torch.get_num_threads(), torch=torch.__version__,
                dtype=str(dtype).removeprefix('torch.'))


def peak_memory(device):
    """MB: the most that CUDA had allocated, elsewhere the most that this process had; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def products(shapes, device, dtype, **how):
    """Speed of products (m, k) x (k, n): of `shapes`, a list of (m, k, n), and of squares up to the first
    that takes 50 ms. how: of `measure`. -> {shape: GFLOP/s}."""
    found = {}
    for m, k, n in [*shapes, *((side,) * 3 for side in SQUARES)]:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (k, n)))
        seconds = measure({'': partial(torch.mm, a, b)}, device, **how)['']['seconds']
        found[f'{m} x {k} x {n}'] = 2e-9 * m * k * n / seconds
        if m == k == n and seconds > 0.05:
            break
    return found


@torch.no_grad()
def flops(model, batch):
    """FLOPs of forward and backward on a batch: 6 for each weight of a matrix and row that it multiplies (4
    if it is frozen), and in each layer 12 C for a query and key, also where a mask hides it. Products that
    are not of the network's matrices are left out (score.py has some with its embeddings). The rows are those
    of a forward: block.py reads a text twice, but predicts it once."""
    found, net = [], model.gpt

    def linear(module, args, out):
        found.append((6 if module.weight.requires_grad else 4) * out.numel() * module.in_features)

    def attention(module, args, out):  # of args[0] (B, T, C)
        found.append(12 * args[0].numel() * args[0].size(1))
    hooks = [m.register_forward_hook(linear if isinstance(m, nn.Linear) else attention)
             for m in model.modules() if isinstance(m, (nn.Linear, transformer.Attention))]
    model(**batch)
    for hook in hooks:
        hook.remove()
    if net.embed is not None and net.head is None:  # the embedding is the head
        found.append(6 * batch['x'].numel() * net.outputs * net.config.n_embd)
    return sum(found)


IN_MS = dict(seconds='ms', low='10%', high='90%')  # columns of a table, of times


def show(title, found):
    """Print a dict: its values, then its rows, if it has any, as a table."""
    def words(value, factor=1):
        if value is None or isinstance(value, str):
            return value or '-'
        return f'{factor * value:,.4g}' if value * factor < 1000 else f'{factor * value:,.0f}'
    print(title)
    for name, value in found.items():
        if name != 'rows':
            print(f"  {name.replace('_', ' '):<32}{words(value)}")
    if rows := found.get('rows'):
        for name in (table := {name: [] for row in rows for name in row}):
            cells = [words(row.get(name), 1000 if name in IN_MS else 1) for row in rows]
            cells.insert(0, IN_MS.get(name, name.replace('_', ' ')))
            table[name] = [f'{cell:>{2 + max(map(len, cells))}}' for cell in cells]
        print('\n'.join(map(''.join, zip(*table.values()))))
    print(flush=True)
