"""
How fast is a config on this machine? Training, sampling, and how a step's time grows with the sizes.

    python -m tools.bench config/train_mdlm.py
    python -m tools.bench config/train_mdlm.py --sampling=False --growth=False --n_layer=2
    python -m tools.bench config/train_block.py --batches=1,16 --steps=256

It needs no checkpoint and no dataset: weights and tokens are random. Of the config file it takes the model's
knobs and those below; the rest is train.py's alone. A step is one forward of batch_size sequences, whatever
grad_accum says. Where a new model has zeros, in its projections into the residual stream and its head, the
weights are random, too, or all confidences would be equal. How often rule `eb` calls the network depends on
what a model has learned, though: a random one is hardly ever sure of two tokens at once.

The yardstick is the fastest matrix product of the same run, in the precision of the training. Tables go to
stdout, all numbers behind them as one line of JSON; its times are in seconds.
"""
import itertools
import json
import os
import sys
from collections import deque
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch, as in train.py
import torch
import torch.nn as nn

import ar
import common
from configurator import Count, NonNegative, Positive, build, check_names, fail, help_text, peek, read, script
from parts.graphs import quick
from parts.muon import optimizers
from text import windows
from tools import machine
from tools.yardstick import facts, flops, measure, peak_memory, products, seconds_of, show
from unmask import noise_levels, sample_tokens


@dataclass
class Config:
    # what is measured
    objective: Literal[common.OBJECTIVES] = 'masked'  # a file of that name
    vocab_size: Count = 65        # of the random tokens
    batch_size: Count = 64        # sequences of a training step
    muon_lr: NonNegative = 0.02   # 0: AdamW for all
    training: bool = True         # measure training steps
    sampling: bool = True         # measure sampling
    growth: bool = True           # measure steps at half and double the length, width and batch
    steps: Count = 64             # of the sampling rules, but for those that take one for each token
    batches: str = '1,16,64'      # texts written at once
    # how it is measured
    device: str = 'auto'          # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the networks
    compile: bool = True          # torch.compile of the loss
    compile_sampling: bool = False  # of the network of a sampler
    compile_growth: bool = False  # for growth, too, at each of its sizes
    repeats: Count = 20           # of a measurement, at most
    seconds: Positive = 10.0      # a measurement stops repeating after so long

    def __post_init__(self):
        if not all(part.strip().isdecimal() and int(part) for part in self.batches.split(',')):
            raise ValueError(f"batches={self.batches!r} is not a list of numbers: 1,16,64")


def knobs(argv):
    """argv -> (Config, Config of the model, device), or the script ends."""
    files, devices, flags = read(argv)
    objective, name = peek({**files, **flags}, Config, 'objective', 'device')
    concept = common.concept(objective)
    if 'help' in flags:
        print(help_text(__doc__, Config, concept.Config))
        sys.exit(0)
    if concept.Model.base:
        fail(f"objective={objective} is built on a checkpoint of {concept.Model.base}, bench on none")
    known = check_names(flags, Config, concept.Config)
    _, _, device = machine.join(name)
    files |= devices.get(device.type, {})
    if files.get('init_from', 'scratch') != 'scratch':
        say(f"init_from={files['init_from']} is left out: sizes are those of the config file and the flags")
    given = {name: value for name, value in files.items() if name in known} | flags
    return *build(given, Config, concept.Config)[:2], device


def say(line):
    print(line, file=sys.stderr, flush=True)


# ---- training ---------------------------------------------------------------------------------------------

def fresh(objective, config, device):
    """A new model with random weights where it would begin with zeros, too."""
    common.seed_everything(1)
    model = common.concept(objective).Model(config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
    return model.to(device)


class Step:
    """An optimizer step as in train.py, of B sequences: data, forward, backward, optimizer, averages."""

    def __init__(self, bench, config, B, device, amp):
        self.model, self.B, self.device, self.amp = fresh(bench.objective, config, device), B, device, amp
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.means = [p.detach().clone() for p in self.params]
        self.optimizers = optimizers(self.model, 1e-3, bench.muon_lr, dtype=common.fast_dtype(device))
        tokens = torch.randint(config.vocab_size, (2 ** 18 + config.block_size,), dtype=torch.int32)
        self.rows = windows.Rows(tokens.to(device), None, config.block_size)
        names = 'data', 'forward', 'backward', 'optimizer', 'averages'
        self.parts = {name: getattr(self, name) for name in names}
        self.data()

    def data(self):
        common.seed_everything(1)
        self.batch, _ = self.rows.batch(self.B)

    def forward(self):
        with self.amp:
            self.loss, _ = self.model(**self.batch)

    def backward(self):
        self.loss.backward()

    def optimizer(self):
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def averages(self):
        torch._foreach_lerp_(self.means, self.params, 1e-3)

    def compile(self):
        """Compile the loss -> seconds, with those of a first forward and backward, fewer where torch has kept
        an earlier compilation; None where there is no compiler."""
        torch._dynamo.reset()
        seconds = seconds_of(lambda: machine.compile_loss(self.model, self.batch, self.amp), self.device)
        return seconds if self.model._compiled_call_impl else None

    def times(self, timed, **parts):
        """Times of parts and, in turn with them, of an undivided step, 'whole step', see `measure`. Where the
        device works behind the host it is the mean of 5 without a pause."""
        n = 1 if self.device.type == 'cpu' else 5
        whole = lambda: [part() for _ in range(n) for part in self.parts.values()]
        found = timed(parts | {'whole step': whole})
        found['whole step'] |= {name: found['whole step'][name] / n for name in ('seconds', 'low', 'high')}
        return found


def training(bench, config, device, amp, timed, peak):
    """How fast training is, a dict, and where the time of a step goes, its rows. peak: GFLOP/s."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    say("training")
    step = Step(bench, config, bench.batch_size, device, amp)
    work, tokens = flops(step.model, step.batch) / 1e9, step.batch['x'].numel()
    compiling = step.compile() if bench.compile else None
    times = step.times(timed, **step.parts)
    seconds = {name: own['seconds'] for name, own in times.items()}
    whole, both = seconds['whole step'], seconds['forward'] + seconds['backward']
    between = whole - sum(seconds[name] for name in step.parts)
    return dict(parameters=sum(p.numel() for p in step.model.parameters()), compile_seconds=compiling,
                tokens_per_second=tokens / whole, gflop_per_step=work,
                share_of_peak_forward_backward=work / both / peak,
                share_of_peak_step=work / whole / peak, peak_memory_mb=peak_memory(device),
                rows=[dict(part=name, **own) for name, own in times.items()]
                + [dict(part='lost between', seconds=between)])


def growth(bench, config, device, amp, timed):
    """How long a step takes at half and double the length, width and batch, rows. Sizes that the model or the
    memory does not allow are left out."""
    rows, sizes = [], dict(length=config.block_size, width=config.n_embd, batch=bench.batch_size)
    for name, factor in [('', 1), *itertools.product(sizes, (0.5, 2))]:
        size = {key: max(1, int(value * factor)) if key == name else value for key, value in sizes.items()}
        say(f"growth: {', '.join(f'{key} {value}' for key, value in size.items())}")
        step = None  # frees the memory of the one before
        try:
            own = replace(config, block_size=size['length'], n_embd=size['width'])
            step = Step(bench, own, size['batch'], device, amp)
            compiling = step.compile() if bench.compile_growth else None
            rows.append(size | dict(compile_seconds=compiling) | step.times(timed)['whole step'])
        except (ValueError, torch.OutOfMemoryError) as e:
            say(f"left out: {str(e).splitlines()[0]}")
    return dict(rows=rows)


# ---- sampling ---------------------------------------------------------------------------------------------

@torch.no_grad()
def mdlm_cache(denoise, xt, mask_id, steps):
    """The sampler of MDLM's released code (arXiv 2406.07524): unmask.textbook, but the network is called only
    if the step before changed a token anywhere in the batch. For networks that are not told the time."""
    level, logp = noise_levels(steps, device=xt.device), None
    for t, s in itertools.pairwise(level):
        logp = denoise(xt, t.float().expand(len(xt))) if logp is None else logp
        reveal = (xt == mask_id) & (torch.rand(xt.shape, device=xt.device) < (t - s) / t)
        if reveal.any():
            xt, logp = torch.where(reveal, sample_tokens(logp), xt), None
        yield xt


def samplers(bench, config, device):
    """[(name, steps or None, model, function: canvas -> generator of canvases)] of all that is measured."""
    ready = lambda *of: fresh(*of, device).eval().requires_grad_(False)
    T, n, shared = config.block_size, bench.steps, {f.name for f in fields(ar.Config)}
    twin = ready('ar', ar.Config(**{k: v for k, v in vars(config).items() if k in shared}))
    found = [('autoregressive', None, twin, twin.sample)]
    if bench.objective == 'ar':
        return found
    model, rules = ready(bench.objective, config), [('', n), ('', T)]  # '': the model's own
    if bench.objective in ('masked', 'sedd', 'd3pm'):
        rules = [('ancestral', n), ('llada', n), ('confidence', T), ('eb', None), ('textbook', n)]
        if not config.time_input:
            cached = lambda canvas: mdlm_cache(model.denoise, canvas, model.mask_id, n)
            found.append(("MDLM's cache", n, model, cached))
    return [(rule or bench.objective, steps, model, partial(model.sample, steps=steps, rule=rule))
            for rule, steps in rules] + found[::-1]


def sampling(bench, config, device, amp, timed):
    """How fast texts of block_size tokens are written, rows, one a sampler and batch."""
    rows = []
    for name, steps, model, sampler in samplers(bench, config, device):
        for batch in map(int, bench.batches.split(',')):
            say(f"sampling: {name}, {batch} at once")
            canvas = torch.full((batch, config.block_size), model.mask_id, device=device)
            with amp:
                with quick(model, bench.compile_sampling) as calls:
                    deque(sampler(canvas), maxlen=0)  # to warm up
                    calls.clear()
                    found = timed({'': lambda: deque(sampler(canvas), maxlen=0)}, warm=0)['']
            rows.append(dict(rule=name, steps=steps, batch=batch, calls=len(calls) / found['repeats'],
                             tokens_per_second=canvas.numel() / found['seconds'],
                             seconds_per_text=found['seconds'] / batch, **found))
    return dict(rows=rows)


def main(argv):
    bench, config, device = knobs(argv)
    dtype, how = common.pick_dtype(bench.dtype, device), dict(repeats=bench.repeats, most=bench.seconds)
    say("matrix products")
    tokens = bench.batch_size * config.block_size
    speeds = products([(tokens, config.n_embd, 4 * config.n_embd)], device, dtype, **how)
    shape = max(speeds, key=speeds.get)
    about = facts(device, dtype) | dict(peak_gflops=speeds[shape], peak_shape=shape)
    show('machine', about)
    found = dict(machine=about, bench=vars(bench), model=vars(config), products=speeds)
    run = bench, config, device, common.autocast(device, dtype), partial(measure, device=device, **how)
    try:
        for part in (partial(training, peak=speeds[shape]), sampling, growth):
            name = getattr(part, 'func', part).__name__
            if getattr(bench, name):
                found[name] = part(*run)
                show(name, found[name])
    except ValueError as e:
        fail(e)
    print(json.dumps(found))


if __name__ == '__main__':
    script(main)
