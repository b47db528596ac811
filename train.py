"""
Train any objective of this repository: one training loop, each objective is one file.

    python train.py config/train_mdlm.py                       # CUDA, MPS or CPU, whatever is there
    python train.py config/train_mdlm.py --max_iters=100 --n_layer=2
    python train.py --init_from=resume --out_dir=out-mdlm      # go on where it stopped, bit for bit on a CPU
    python train.py config/adapt_gpt2.py --init_from=gpt2      # a language model becomes a denoiser
    torchrun --nproc_per_node=8 train.py config/train_mdlm.py  # several GPUs

Writes out_dir/last.pt (everything a resume needs) and out_dir/best.pt (the weights with the lowest validation
figure). The checkpoints of an earlier run in out_dir are moved to out_dir/old-1. On Ctrl-C, SIGTERM or a
closed terminal it saves and exits.

From top to bottom: knobs, data, model and optimizer, a step, the loop. hub/start.py finds what a run begins
with, tools/machine.py has signals and the compiler, tools/parallel.py what several processes share.
"""
import copy
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # before torch: threads that spin are slow beside others
import torch
from tqdm import tqdm

import common
from configurator import Count, Filename, Natural, NonNegative, Share, ShareBelow1, fail, script
from hub import start
from parts.clock import set_clocks
from parts.muon import optimizers
from text import files
from text.rows import load_tokens, open_rows
from text.vocabulary import Tokenizer
from tools import machine, parallel
from tools.glimpse import glimpse, indented
from tools.machine import say


# ---- knobs ------------------------------------------------------------------------------------------------

@dataclass
class Config:
    # what to train, on what
    objective: Literal[common.OBJECTIVES] = 'masked'  # a file of that name
    dataset: str = 'shakespeare_char'   # a folder of data/
    out_dir: Filename = 'out'           # where the checkpoints go
    init_from: Filename = 'scratch'     # scratch | resume | a model to start from: folder, gpt2, owner/name
    # the machine
    device: str = 'auto'                # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of the networks
    compile: bool = True                # torch.compile of the loss
    seed: Natural = 1337                # of the weights, the batches and the noise
    shard: bool = False                 # several processes: each keeps a part of the model only (FSDP2)
    # the optimizer
    batch_size: Count = 64              # sequences of one forward in one process
    grad_accum: Count = 1               # forwards of one process for one iteration
    max_iters: Count = 5000             # optimizer steps
    minutes: NonNegative = 0.0          # in place of max_iters: as many steps as fit into this time; 0: off
    lr: NonNegative = 3e-3              # of AdamW: embedding, head, norms, biases
    muon_lr: NonNegative = 0.02         # of Muon: the matrices of the blocks; 0: AdamW for all
    weight_decay: NonNegative = 0.0     # decoupled, on matrices
    warmup_iters: Natural = 30          # linear, from 0
    lr_schedule: Literal['linear', 'cosine'] = 'linear'  # after warm-up: flat, then straight to 0 | cosine
    cooldown: Share = 0.5               # linear: the share of max_iters spent going to 0
    grad_clip: NonNegative = 1.0        # norm of the gradient; 0: off
    ema_decay: ShareBelow1 = 0.999      # of the averaged weights, float32, that are evaluated and sampled
    ema_power: NonNegative = 0.0        # EMA warm-up; 0: decay (1+n)/(10+n) at step n; p > 0: 1-(1+n)^-p
    # evaluation
    eval_interval: Natural = 500        # iterations between evaluations, texts and checkpoints; 0: a tenth
    eval_windows: Natural = 200         # validation windows (or lines), the same every time; 0: all


DRAWS = 4  # of the noise for a validation window

# ---- data -------------------------------------------------------------------------------------------------

def open_data(state):
    """(rows of training, validation rows as one batch, which of its tokens are scored, windows of training on
    which the model measures something, or None). A model may cut the text itself, so it comes first."""
    run, V, tokenizer = state.run, state.config.vocab_size, Tokenizer(state.meta)
    tokens = [load_tokens(run.dataset, split, V, state.device) for split in ('train', 'val')]
    rows = open_rows(tokens[0], tokenizer, state.model, state.row_knobs, run.out_dir)
    val = open_rows(tokens[1], tokenizer, state.model, state.row_knobs).all(run.eval_windows)
    calibration = None
    if state.model.measures:
        batches = range(-(-1024 // run.batch_size))
        calibration = torch.cat([rows.batch(run.batch_size)[0]['x'] for _ in batches])
    return rows, val, common.scored_tokens(val, state.model.mask_id), calibration


# ---- model and optimizer ----------------------------------------------------------------------------------

class State:
    """A run and all that changes in it: weights, averaged weights, optimizers, iteration, best figure."""

    def __init__(self, run, config, row_knobs, origin, device):
        common.seed_everything(run.seed)
        self.run, self.config, self.row_knobs, self.meta = run, config, row_knobs, origin.meta
        self.device, self.dtype = device, common.pick_dtype(run.dtype, device)
        try:
            self.model = common.concept(run.objective).Model(config)
        except ValueError as e:
            fail(e)
        start.weights(self.model, run, config, origin)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if origin.resumed:
            self.ema.load_state_dict(origin.checkpoint['ema'])
        parallel.place(self.model, self.ema, device, run.shard)
        trained = [(p, e) for p, e in zip(self.model.parameters(), self.ema.parameters()) if p.requires_grad]
        self.params, self.averages = [p for p, _ in trained], [e for _, e in trained]
        try:
            self.optimizers = optimizers(self.model, run.lr, run.muon_lr, run.weight_decay,
                                         common.fast_dtype(device))
        except ValueError as e:
            fail(e)
        self.peak = [optimizer.defaults['lr'] for optimizer in self.optimizers]
        self.iter, self.tokens, self.best, self.val = 0, 0, float('inf'), None
        if origin.resumed:
            old = origin.checkpoint
            parallel.take_whole_states(self.optimizers)
            start.resume_optimizers(self.optimizers, run, origin)
            self.iter, self.tokens = old['iter'], old['tokens']
            if old['run']['eval_windows'] == run.eval_windows:
                self.best = old['best']  # only comparable on the same windows

    def evaluate(self, batch, scored, amp):
        """Set `val`, the validation figure of the averaged weights in nats per token, and its standard error;
        arguments as of common.evaluate."""
        at_once = common.rows_at_once(self.config.block_size, self.config.vocab_size)
        nats = lambda **part: self.ema.nats(n=DRAWS, **part)
        with amp:
            self.val = parallel.of_first(common.evaluate(nats, batch, scored, at_once))

    def save(self, just_evaluated, calibration):
        """Write last.pt with everything, and best.pt when `val` is the best so far (vae: at every
        evaluation). calibration: training windows for models that measure something on them, or None."""
        if self.model.measures:
            self.model.measure(calibration)
            self.ema.measure(calibration)
        always = just_evaluated and not self.model.selects
        improved = self.val is not None and (self.val[0] < self.best or always)
        self.best = min(self.best, self.val[0]) if self.val else self.best
        state = dict(objective=self.run.objective, config=asdict(self.config), run=asdict(self.run),
                     rows=asdict(self.row_knobs), tokenizer=self.meta, iter=self.iter, tokens=self.tokens,
                     val=self.val, best=self.best, ema=self.ema.state_dict(), model=self.model.state_dict())
        if improved:
            parallel.save(state, Path(self.run.out_dir, 'best.pt'))
        state |= dict(optimizers=[o.state_dict() for o in self.optimizers])
        parallel.save(state, Path(self.run.out_dir, 'last.pt'))


# ---- a step -----------------------------------------------------------------------------------------------

def lr_share(it, run):
    """The learning rate of iteration `it` (from 0) as a share of its peak."""
    warm = min(1.0, (it + 1) / (run.warmup_iters + 1))
    if run.lr_schedule == 'cosine':
        return warm * 0.5 * (1 + math.cos(math.pi * it / run.max_iters))
    return warm * min(1.0, (run.max_iters - it) / max(1, run.cooldown * run.max_iters))


@torch.no_grad()
def update_ema(ema, params, decay, it, power=0.0):
    """ema <- decay * ema + (1 - decay) * params;
    the decay warms up, so that the first weights are soon forgotten."""
    warm = 1 - (1 + it) ** -power if power else (1 + it) / (10 + it)
    torch._foreach_lerp_(ema, params, 1 - min(decay, warm))


def step(state, loss_fn, rows, rank, world, amp):
    """One optimizer step over world * grad_accum micro-batches; returns the loss and the metrics (of the last
    micro-batch), on the device."""
    run, total, count = state.run, 0.0, 0
    set_clocks(state.model, state.iter)
    for i in range(run.grad_accum):
        # micro-batch rank * grad_accum + i: the same noise, however they are spread over processes
        common.seed_everything(run.seed, state.iter, rank * run.grad_accum + i)
        batch, n = rows.batch(run.batch_size)
        with parallel.micro_batch(loss_fn, last=i + 1 == run.grad_accum):
            with amp:
                loss, metrics = loss_fn(**batch)
            (loss / run.grad_accum).backward()
        count, total = count + n, total + loss.detach() / run.grad_accum
    if run.grad_clip:
        torch.nn.utils.clip_grad_norm_(state.params, run.grad_clip)
    for optimizer, peak in zip(state.optimizers, state.peak):
        for group in optimizer.param_groups:
            group['lr'] = peak * lr_share(state.iter, run)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    update_ema(state.averages, state.params, run.ema_decay, state.iter, run.ema_power)
    state.iter, state.tokens = state.iter + 1, state.tokens + count * world
    kept = {name: value.clone() for name, value in metrics.items()}  # a CUDA graph writes over its own
    return dict(loss=total, **kept)


# ---- the loop ---------------------------------------------------------------------------------------------

def announce(state, rows, origin, tokens):
    """Say what is about to be trained, on how many tokens an iteration; set older checkpoints aside."""
    run = state.run
    if report := rows.report(run.batch_size):
        say(report)
    if not origin.resumed and (old := machine.set_aside(run.out_dir)):
        say(f"{run.out_dir}/ holds the checkpoints of an earlier run: they are in {old}/ from now on")
    say(f"{run.objective}: {sum(p.numel() for p in state.params) / 1e6:.2f}M parameters, {tokens} tokens an "
        f"iteration, {machine.length(run)}, {state.device} in {state.dtype}, to {run.out_dir}/")


def described(state, val, amp):
    """The validation figure and a text by the averaged weights, in words."""
    (value, error), kind = state.val, dict(exact='exact', upper='upper bound')[state.model.bound]
    with amp:
        text = glimpse(state.ema, val, Tokenizer(state.meta))
    return (f"iter {state.iter}: validation {value:.4f} ± {error:.4f} nats/token, {kind}; a text:\n"
            f"{indented(text)}")


def what_next(out_dir, it, stopped):
    """Say what to type after a training."""
    if stopped:
        say(f"stopped by a signal at iteration {it}: saved; "
            f"go on with --init_from=resume --out_dir={out_dir}")
    say(f"what it has learned: python sample.py --out_dir={out_dir}; "
        f"how well: python eval.py --out_dir={out_dir}")


def train(state, origin, rank, world):
    """From state.iter to max_iters, or until a signal comes."""
    run, config, device = state.run, state.config, state.device
    amp = common.autocast(device, state.dtype)
    rows, val, scored, calibration = open_data(state)
    if run.minutes and not origin.resumed:
        run.max_iters = machine.UNPLANNED
    tokens = config.block_size * run.batch_size * run.grad_accum * world  # of an iteration
    if rank == 0:
        announce(state, rows, origin, tokens)
    stop, stopping = machine.stop_signals(world, device), False
    pace, loss_fn = machine.Pace(run, state.iter), parallel.averaging(state.model)
    if run.compile:
        machine.compile_loss(loss_fn, rows.batch(run.batch_size)[0], amp, run.grad_accum > 1)

    bad_iter = never = torch.tensor(2 ** 62, device=device)  # the first iteration whose loss is not finite
    bar = tqdm(total=machine.planned(run), initial=state.iter, disable=rank > 0 or not sys.stderr.isatty())
    log = machine.Log(state.iter)
    while state.iter < run.max_iters and not stopping:
        log.metrics.append(metrics := step(state, loss_fn, rows, rank, world, amp))
        bad_iter = torch.minimum(bad_iter, torch.where(metrics['loss'].isfinite(), never, state.iter))
        bar.update()
        if words := pace.words(state.iter, metrics['loss']):
            bar.total = run.max_iters
            if rank == 0:
                say(words, bar)
        interval = run.eval_interval or max(1, run.max_iters // 10)
        evaluating = state.iter % interval == 0 or state.iter == run.max_iters
        stopping = stop(state.iter)
        if not (evaluating or stopping or log.due()):
            continue
        machine.check_finite(state, bad_iter, never, evaluating or stopping)
        line, left = log.line(state.iter, tokens, machine.planned(run))
        bar.set_postfix_str(line)
        if rank == 0 and bar.disable:
            say(f"iter {state.iter}: {line}{left}")
        if evaluating:
            state.evaluate(val, scored, amp)
        if evaluating or stopping:
            state.save(evaluating, calibration)
        if evaluating:  # by all: a sharded model needs them
            words = described(state, val, amp)
            if rank == 0:
                say(words, bar)
        log.begin(state.iter)
    bar.close()
    if rank == 0:
        what_next(run.out_dir, state.iter, stopping)


def main(argv):
    run, config, row_knobs, origin = start.begin(argv, __doc__, Config)
    rank, world, device = machine.join(run.device)
    state = State(run, config, row_knobs, origin, device)
    if state.iter >= run.max_iters:
        say(f"{run.out_dir}/ holds a run that is finished: it has done {state.iter:,} iterations, max_iters "
            f"is {run.max_iters:,}; with a larger --max_iters= it goes on")
    elif rank == 0:
        there = files.folder(run.out_dir, 'out_dir')
        machine.check_room(run.out_dir, (state.model, state.ema), state.optimizers, there, origin.resumed)
        with files.occupied(run.out_dir):
            train(state, origin, rank, world)
    else:
        train(state, origin, rank, world)
    machine.leave(world)


if __name__ == '__main__':
    script(main)
