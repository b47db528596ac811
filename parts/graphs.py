"""
Functions of tensors, faster: as a CUDA graph, whose kernels are all launched at once, or compiled.

The kernels of a small network are done before Python has launched the next ones. On an H100 a call of the
10M-parameter denoiser took 13 ms, its kernels 1.5 ms (NOTES.md). A graph costs one more call; a compiler
makes fewer and better kernels, but needs its time first.
"""
import contextlib
import sys

import torch


def recorded(f, args):
    """(graph, inputs, outputs): one call of f on args, recorded; a replay reads inputs and writes outputs."""
    inputs, aside = [x if x is None else x.clone() for x in args], torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what libraries set up in a first call is not to be recorded
        f(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = f(*inputs)
    return graph, inputs, outputs


def graphed(f):
    """f of tensors (or None) -> tensors. On CUDA it is recorded at its first call with such shapes, and then
    replayed: f must be a function of these tensors alone and not wait for the device, and what it returned is
    overwritten by its next call. Elsewhere it is f itself."""
    graphs = {}

    def call(*args):
        if args[0].device.type != 'cuda':
            return f(*args)
        like = tuple(x if x is None else (x.shape, x.dtype) for x in args)
        if like not in graphs:
            graphs[like] = recorded(f, args)
        graph, inputs, outputs = graphs[like]
        for mine, new in zip(inputs, args):
            if new is not None:
                mine.copy_(new)
        graph.replay()
        return outputs
    return call


def compiled(f):
    """f, compiled at its first call, on CUDA into a graph; with a warning f itself where that fails."""
    fast = torch.compile(f, mode='reduce-overhead' if torch.cuda.is_available() else None)

    def call(*args):
        nonlocal fast
        try:
            return fast(*args)
        except Exception as e:  # see `warn`
            if fast is f:
                raise
            warn(e)
            fast = f
            return f(*args)
    return call


@contextlib.contextmanager
def quick(model, compile=False):
    """In here a model's sampler is quick: what it calls again and again, the model's `verbs`, is recorded as
    graphs on CUDA, or compiled if asked for. Gives a list that has one more element after every call of the
    network."""
    calls, verbs = [], {name: getattr(model, name) for name in model.verbs}

    def counted_call(f):
        def call(*args):
            n, out = len(calls), f(*args)
            calls[n:] = [1]  # one, whatever the network inside has counted, or a graph has not
            return out
        return call

    def count(*_):
        if not torch.compiler.is_compiling():
            calls.append(1)
    for name, f in verbs.items():
        setattr(model, name, counted_call((compiled if compile else graphed)(f)))
    hook = model.gpt.norm.register_forward_pre_hook(count) if hasattr(model, 'gpt') else None
    model.calls = calls  # for parts/cached.py, whose graphs the hook does not see
    try:
        yield calls
    finally:
        for name in verbs:
            delattr(model, name)  # that of the class is there again
        del model.calls
        if hook:
            hook.remove()


def warn(e):
    """Say that the compiler failed: no C++ compiler, no Triton, an old GPU raise exceptions of many kinds."""
    first = next((line for line in str(e).splitlines() if line.strip()), 'no reason given')
    why = f"{type(e).__name__}: {first.strip()}"
    print(f"warning: torch.compile does not work here ({why}), going on without", file=sys.stderr)
