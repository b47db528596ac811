"""
Train any objective of this repository: one loop, the objective is a file.

    python train.py config/train_mdlm.py                       # CUDA, MPS or CPU, whatever is there
    python train.py config/train_mdlm.py --max_iters=100 --n_layer=2
    python train.py --init_from=resume --out_dir=out-mdlm      # go on where it stopped, bit for bit on a CPU
    python train.py config/adapt_gpt2.py --init_from=gpt2      # a language model becomes a denoiser
    torchrun --nproc_per_node=8 train.py config/train_mdlm.py  # several GPUs

Writes out_dir/last.pt (everything a resume needs) and out_dir/best.pt (the weights with
the lowest validation figure). The checkpoints of an earlier run in out_dir are moved to out_dir/old-1.
Ctrl-C, SIGTERM or a terminal that hangs up: saves, then ends.
"""
import contextlib
import copy
import itertools
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from hub import adapt
import common
from text import files
from parts import lora
from text import packing
from hub.find import GPT2, find
from text import vocabulary
from configurator import Filename, build, check_names, fail, help_text, peek, read, script
from model import optimizers
from text.pairs import Pairs


@dataclass
class Config:
    objective: str = 'masked'           # the concept file: ar | masked | block | score | vae | latent
    dataset: str = 'shakespeare_char'   # a folder of data/
    out_dir: Filename = 'out'           # where the checkpoints go
    init_from: Filename = 'scratch'     # scratch | resume | whose weights to take: see hub/find.py
    base: Filename = ''                 # vae, latent: what it is built on, a folder or file (an ar; a vae)
    seed: int = 1337                    # of the weights, the batches and the noise
    device: str = 'auto'                # auto | cpu | cuda | cuda:1 | mps
    dtype: str = 'auto'                 # of the networks: auto | float32 | bfloat16
    compile: bool = True                # torch.compile of the loss
    batch_size: int = 64                # sequences of one forward in one process
    grad_accum: int = 1                 # forwards of one process for one iteration
    max_iters: int = 5000               # optimizer steps
    lr: float = 3e-3                    # of AdamW: embedding, head, norms, biases
    muon_lr: float = 0.02               # of Muon: the matrices of the blocks; 0: AdamW for all
    weight_decay: float = 0.0           # decoupled, on matrices
    warmup_iters: int = 30              # linear, from 0
    lr_schedule: str = 'linear'         # after warm-up: linear (flat, then straight to 0) | cosine (to 0)
    cooldown: float = 0.5               # linear: the share of max_iters spent going to 0
    grad_clip: float = 1.0              # norm of the gradient; 0: off
    ema_decay: float = 0.999            # of the averaged weights, float32, that are evaluated and sampled
    ema_power: float = 0.0              # its warm-up over steps n: 0: (1 + n) / (10 + n) | p: 1 - (1 + n)^-p
    slow_decay: float = 0.0             # of a second average (--weights=slow of sample.py, eval.py); 0: none
    eval_interval: int = 500            # iterations between evaluations, each followed by a checkpoint
    eval_windows: int = 200             # validation windows (or lines), the same every time; 0: all
    eval_draws: int = 4                 # noise draws a window for bounds
    log_interval: int = 50              # iterations between log lines
    packed: bool = True                 # datasets of lines: several to a row; False: one, padded
    inserted: float = 0.0               # lines: pads put in at random places, as a share of the tokens
    expanded: bool = False              # lines: a random number of pads behind each, as part of the text

    def __post_init__(self):
        for name in ('batch_size', 'grad_accum', 'max_iters', 'eval_interval', 'eval_draws', 'log_interval'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('seed', 'lr', 'muon_lr', 'weight_decay', 'warmup_iters', 'grad_clip', 'eval_windows',
                     'inserted', 'ema_power'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.cooldown <= 1 or not 0 <= self.ema_decay < 1 or not 0 <= self.slow_decay < 1:
            raise ValueError(f"cooldown={self.cooldown} must be in [0, 1], ema_decay={self.ema_decay} "
                             f"and slow_decay={self.slow_decay} in [0, 1)")
        if self.lr_schedule not in ('linear', 'cosine'):
            raise ValueError(f"lr_schedule={self.lr_schedule!r} is not one of: linear, cosine")


def lr_share(it, run):
    """The learning rate of iteration `it` (from 0) as a share of its peak."""
    warm = min(1.0, (it + 1) / (run.warmup_iters + 1))
    if run.lr_schedule == 'cosine':
        return warm * 0.5 * (1 + math.cos(math.pi * it / run.max_iters))
    return warm * min(1.0, (run.max_iters - it) / max(1, run.cooldown * run.max_iters))


def settings(argv):
    """argv -> (run Config, concept Config, tokenizer meta, checkpoint to start from or None, that of the
    base or None)."""
    given, cpu, flags = read(argv)
    if 'help' in flags:
        objective, = peek({**given, **flags}, Config, 'objective')
        print(help_text(__doc__, Config, common.concept(objective).Config))
        sys.exit(0)
    device = common.pick_device(*peek({**given, **flags}, Config, 'device'))
    knobs = {**given, **(cpu if device.type == 'cpu' else {})}
    source, out_dir = peek({**knobs, **flags}, Config, 'init_from', 'out_dir')
    checkpoint = None
    if not out_dir:
        fail("where to? --out_dir=FOLDER")
    if Path(out_dir, 'config.json').exists():
        fail(f"out_dir={out_dir} holds a model in Hugging Face's layout: take another folder")
    if source == 'resume':
        checkpoint = common.load(Path(out_dir, 'last.pt'))
        kept = {**checkpoint['config'], **checkpoint['run']}
        knobs |= {k: v for k, v in kept.items() if k not in ('init_from', 'device', 'out_dir')}
    elif source != 'scratch':
        _, checkpoint = find(source)
        knobs = adapt.inherited(checkpoint, knobs | flags, source)
    knobs = {**knobs, **flags}
    objective, dataset, base = peek(knobs, Config, 'objective', 'dataset', 'base')
    if source == 'resume' and objective != checkpoint['objective']:
        fail(f"objective={objective}: the run to resume is of {checkpoint['objective']}, "
             f"that cannot change")
    concept = common.concept(objective)
    check_names(knobs, Config, concept.Config)
    if checkpoint and 'base' in flags:
        fail(f"base is for a new run: init_from={source} holds all it needs")
    base = built_on(concept, base) if not checkpoint else None
    if base:
        own = concept.inherited(base['config'])
        for name in own.keys() & knobs.keys():
            fail(f"{name} is that of the base: leave it out")
        knobs |= own
    meta = common.load_meta(dataset)
    vocab_size = vocabulary.Tokenizer(meta).vocab_size
    run, config, _ = build({**knobs, 'vocab_size': vocab_size}, Config, concept.Config)
    check(run, config, meta, checkpoint, base)
    return run, config, meta, checkpoint, base


def check(run, config, meta, checkpoint, base):
    """Does what a run starts from fit its config and its dataset? Or the script ends."""
    tokenizer = vocabulary.Tokenizer(meta)
    same_tokens = lambda other: vocabulary.Tokenizer(other).pieces == tokenizer.pieces
    if tokenizer.sep is None and tokenizer.bos is None:  # windows of a text
        for split in ('train', 'val'):
            n = common.count_tokens(run.dataset, split, tokenizer.vocab_size)
            if 0 < n < config.block_size:
                fail(f"data/{run.dataset}/{split}.bin has {n} tokens, fewer than "
                     f"block_size={config.block_size}")
    if base and not same_tokens(base['tokenizer']):
        fail(f"dataset={run.dataset} has another vocabulary than base={run.base}")
    if not checkpoint:
        if run.objective in adapt.BECOMES and getattr(config, 'lora_rank', 0):
            fail(f"lora_rank={config.lora_rank} is for a run with init_from=: adapters change a model that "
                 f"has been trained")
        return
    theirs = checkpoint['config']
    if run.init_from == 'resume':
        for name, value in asdict(config).items():
            if theirs.get(name, value) != value:
                fail(f"{name}={value} but the run to resume has {theirs[name]}: it cannot change")
        muon = checkpoint['run'].get('muon_lr', run.muon_lr)
        if bool(muon) != bool(run.muon_lr):
            fail(f"muon_lr={run.muon_lr} but the run to resume has {muon}: which optimizers there are cannot "
                 f"change")
        if checkpoint['tokenizer'] != meta:
            fail(f"dataset={run.dataset} has another vocabulary or source than the run to resume")
        return
    if not same_tokens(checkpoint['tokenizer']):
        fail(f"dataset={run.dataset} has another vocabulary than init_from={run.init_from}: prepare it with "
             f"that model's, as by data/text/prepare.py --tokenizer={run.init_from}")
    adapt.check_shape(config, checkpoint, run.init_from)


def built_on(concept, path):
    """The checkpoint that --base names (a file, or a folder: its best), if the concept is built on one."""
    kind = getattr(concept.Model, 'built_on', None)
    if kind is None:
        return fail("base is for objective=vae and objective=latent") if path else None
    make = f"`python train.py config/train_{kind}.py` makes one, --base=FOLDER names it"
    if not path:
        fail(f"objective={concept.__name__} is built on a checkpoint of {kind}: {make}")
    if '/' not in path and path not in GPT2 and not Path(path).exists():
        fail(f"base={path} does not exist; {make}")
    path, checkpoint = find(path)
    if checkpoint['objective'] != kind:
        fail(f"base={path} is of {checkpoint['objective']}, it must be of {kind}: {make}")
    return checkpoint


def compiled(model, inputs, amp):
    """torch.compile(model), tried on the tensors `inputs` under autocast;
    the model itself, with a line of warning, where there is no compiler."""
    try:
        loss_fn = torch.compile(model)
        with amp:
            loss, _ = loss_fn(*inputs)
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


def average_gradients(params, world):
    """Replace every gradient by its mean over the processes."""
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, (flat / world).split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


@torch.no_grad()
def update_ema(ema, params, decay, it, power=0.0):
    """ema <- decay * ema + (1 - decay) * params;
    the decay warms up, so that the first weights are soon forgotten."""
    warm = 1 - (1 + it) ** -power if power else (1 + it) / (10 + it)
    torch._foreach_lerp_(ema, params, 1 - min(decay, warm))


class State:
    """All that changes while training: weights, averaged weights, optimizers, iteration, best figure."""

    def __init__(self, run, config, meta, checkpoint, device, base=None):
        common.seed_everything(run.seed)
        self.run, self.config, self.meta, self.device = run, config, meta, device
        try:
            self.model = common.concept(run.objective).Model(config).to(device)
            if base:
                plain = base['objective'] in adapt.BECOMES  # its adapters, if any, are merged
                weights = lora.folded(base['ema'], base['config']) if plain else base['ema']
                self.model.inherit(weights, vocabulary.Tokenizer(meta).pieces)
        except ValueError as e:
            fail(e)
        self.iter, self.tokens, self.best, self.val = 0, 0, float('inf'), None
        if checkpoint:
            try:
                if run.init_from == 'resume':
                    self.model.load_state_dict(checkpoint['model'])
                else:
                    adapt.take_over(self.model, run.objective, asdict(config), checkpoint)
            except (RuntimeError, ValueError) as e:
                fail(f"the weights of init_from={run.init_from} do not fit this model: {e}"[:300])
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.slow = copy.deepcopy(self.ema) if run.slow_decay else None
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        trained = [p.requires_grad for p in self.model.parameters()]
        self.averages = [(list(itertools.compress(net.parameters(), trained)), decay) for net, decay in
                         ((self.ema, run.ema_decay), (self.slow, run.slow_decay)) if net]
        try:
            self.optimizers = optimizers(self.model, run.lr, run.muon_lr, run.weight_decay,
                                         common.fast_dtype(device))
        except ValueError as e:
            fail(e)
        if checkpoint and run.init_from == 'resume':
            self.ema.load_state_dict(checkpoint['ema'])
            if self.slow and 'slow' in checkpoint:
                self.slow.load_state_dict(checkpoint['slow'])
            self.load_optimizers(checkpoint.get('optimizers', []))
            self.iter, self.tokens = checkpoint['iter'], checkpoint['tokens']
            if all(checkpoint['run'][name] == getattr(run, name) for name in ('eval_windows', 'eval_draws')):
                self.best = checkpoint['best']  # else it is the figure of another text
        self.peak = [optimizer.defaults['lr'] for optimizer in self.optimizers]
        self.gauge = None      # training windows by which a VAE measures its scale
        self.evaluated = None  # iteration of self.val

    def load_optimizers(self, states):
        """Go on with the momenta of another run's optimizers; their weight decay is this run's."""
        if len(states) != len(self.optimizers):
            fail(f"the run to resume has {len(states)} optimizers instead of {len(self.optimizers)}: a "
                 f"best.pt has none (--init_from={self.run.out_dir} starts a new run from its weights), and "
                 f"which parameters are trained cannot change")
        for optimizer, state in zip(self.optimizers, states):
            decay = [group['weight_decay'] for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(state)
            except ValueError as e:
                fail(f"the optimizers of the run to resume are others: {e}")
            for group, own in zip(optimizer.param_groups, decay):
                group['weight_decay'] = own

    def step(self, loss_fn, batch, rank, world, amp):
        """One optimizer step over world * grad_accum micro-batches; returns the loss and the metrics (of the
        last micro-batch), on the device."""
        run, total, count = self.run, 0.0, 0
        if hasattr(self.model, 'steps'):  # for weights of the loss that change with them
            self.model.steps.fill_(self.iter)
        # micro-batch rank * grad_accum + i: the same noise, however they are spread
        for i in range(run.grad_accum):
            common.seed_everything(run.seed, self.iter, rank * run.grad_accum + i)
            inputs, n = batch()
            with amp:
                loss, metrics = loss_fn(*inputs)
            (loss / run.grad_accum).backward()
            count += n
            total = total + loss.detach() / run.grad_accum
        if world > 1:
            average_gradients(self.params, world)
        if run.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.params, run.grad_clip)
        for optimizer, peak in zip(self.optimizers, self.peak):
            for group in optimizer.param_groups:
                group['lr'] = peak * lr_share(self.iter, run)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for average, decay in self.averages:
            update_ema(average, self.params, decay, self.iter, run.ema_power)
        self.iter += 1
        self.tokens += count * world
        return dict(loss=total, **metrics)

    def evaluate(self, inputs, text, amp):
        """Validation figure of the averaged weights in nats per token, and its standard error; arguments as
        for common.evaluate."""
        rows = common.rows_at_once(self.config.block_size, self.config.vocab_size)
        nats = lambda x, *others: self.ema.nats(x, self.run.eval_draws, *others)
        with amp:
            self.val, self.evaluated = common.evaluate(nats, inputs, text, rows), self.iter
        return self.val

    def check_room(self, there):
        """Is there room on the disk of the folder `there` for what `save` will write: best.pt, last.pt and,
        while it is replaced, another last.pt? Or the script ends."""
        size = lambda *nets: sum(t.nbytes for net in nets if net for t in net.state_dict().values())
        best = size(self.model, self.ema, self.slow)
        last = best + sum(p.nbytes * (2 if isinstance(o, torch.optim.AdamW) else 1)
                          for o in self.optimizers for g in o.param_groups for p in g['params'])
        room = shutil.disk_usage(there).free
        if self.run.init_from == 'resume':  # its own will be replaced
            room += sum(p.stat().st_size for p in Path(self.run.out_dir).glob('*.pt'))
        if best + 2 * last > room:
            fail(f"no room for the checkpoints in {self.run.out_dir}/: they take "
                 f"{(best + 2 * last) / 1e6:,.1f} MB at most, {room / 1e6:,.1f} MB are free")

    def save(self):
        """last.pt with everything, and best.pt when this is the best so far (of a VAE: always)."""
        for net in filter(None, (self.model, self.ema, self.slow)):
            if hasattr(net, 'measure'):
                net.measure(self.gauge)
        state = dict(objective=self.run.objective, config=asdict(self.config), run=asdict(self.run),
                     tokenizer=self.meta, iter=self.iter, tokens=self.tokens, val=self.val,
                     ema=self.ema.state_dict())
        if self.slow:
            state |= dict(slow=self.slow.state_dict())
        always = not getattr(self.model, 'selects', True) and self.evaluated == self.iter
        improved = self.val is not None and (always or self.val[0] < self.best)
        self.best = min(self.best, self.val[0]) if self.val else self.best
        state |= dict(best=self.best, model=self.model.state_dict())
        if improved:
            common.save(state, Path(self.run.out_dir, 'best.pt'))
        state |= dict(optimizers=[o.state_dict() for o in self.optimizers])
        common.save(state, Path(self.run.out_dir, 'last.pt'))


def examples(run, config, meta, device, rank, model):
    """(a function that draws a batch: (the tensors `model` takes, how many tokens they hold); what `nats`
    takes of the validation split; which of its tokens (N, T) are text, see common.evaluate). Datasets of
    lines come packed, with segments; all others as windows, for vae and latent with what is before them."""
    B, T = run.batch_size, config.block_size
    tokens = [common.load_tokens(run.dataset, split, config.vocab_size, device)
              for split in ('train', 'val')]
    tokenizer = vocabulary.Tokenizer(meta)
    bos = tokenizer.bos
    if tokenizer.sep is not None:
        return prompts(run, tokens, tokenizer, T, device, rank)
    if bos is None:
        if run.inserted or run.expanded or not run.packed:
            fail(f"packed, inserted, expanded are for datasets of lines (data/lines), not for {run.dataset}")
        if hasattr(model, 'cut'):
            source = model.source(tokens[0], tokenizer.end, run.out_dir)
            cut = model.cut(tokens[1], tokenizer.end)
            val = cut.inputs(cut.spread(run.eval_windows), getattr(config, 'n_prev', 0))
            return lambda: (source.batch(B), B * T), val, val[0] != model.mask_id
        val = common.windows(tokens[1], T, run.eval_windows)
        return lambda: ((common.batch(tokens[0], B, T),), B * T), (val,), torch.ones_like(val)
    if not model.packs:
        fail(f"objective={run.objective}{', shift=True' * getattr(config, 'shift', False)} takes no lines: "
             f"prepare the text with data/text/prepare.py")
    lines, val = (packing.Lines(t, bos, vocabulary.PAD, run.packed, run.inserted, run.expanded)
                  for t in tokens)
    if rank == 0:
        say(packing.report(tokens[0], bos, vocabulary.PAD, B, T))

    def batch():
        x, segment = lines.batch(B, T)
        return (x.to(device), segment.to(device)), int((segment >= 0).sum())
    val = tuple(t.to(device) for t in val.rows(T, run.eval_windows))
    return batch, val, val[1] >= 0


def prompts(run, tokens, tokenizer, T, device, rank):
    """`examples` of a dataset of prompts and answers: x, no segment, and which of x are given."""
    if run.objective not in ('ar', 'masked'):
        fail(f"objective={run.objective} takes no pairs of prompt and answer: ar and masked do")
    if run.inserted or run.expanded or not run.packed:
        fail(f"packed, inserted, expanded are for datasets of lines (data/lines), not for {run.dataset}")
    pairs, val = (Pairs(vocabulary.as_ids(t), tokenizer.sep, tokenizer.end) for t in tokens)
    if rank == 0:
        say(f"{len(pairs):,} pairs, {pairs.longer(T):,} longer than {T} tokens and cut")

    def batch():
        x, given = pairs.batch(run.batch_size, T)
        return (x.to(device), None, given.to(device)), int((~given).sum())
    x, given = (t.to(device) for t in val.rows(val.spread(run.eval_windows), T))
    return batch, (x, None, given), ~given


def say(line, bar=None):
    """Print a line (above the bar, if there is one). A reader that has left, or a full disk behind the
    output, do not stop the training."""
    with contextlib.suppress(OSError):
        bar.write(line, file=sys.stdout) if bar else print(line)
        sys.stdout.flush()


def train(state, batch, val, text, rank, world, amp, stop):
    """The loop, from state.iter to max_iters or until stop() says so."""
    run, device = state.run, state.device
    loss_fn = compiled(state.model, batch()[0], amp) if run.compile else state.model
    never = torch.tensor(2 ** 62, device=device)
    first_bad, figures, tick, tick_iter = never, [], time.time(), state.iter
    bar = tqdm(total=run.max_iters, initial=state.iter, unit='it',
               disable=rank > 0 or not sys.stderr.isatty())

    while state.iter < run.max_iters:
        figures.append(state.step(loss_fn, batch, rank, world, amp))
        first_bad = torch.minimum(first_bad, torch.where(figures[-1]['loss'].isfinite(), never, state.iter))
        bar.update()
        evaluating = state.iter % run.eval_interval == 0 or state.iter == run.max_iters
        stopping = stop(state.iter)
        if not (evaluating or stopping or state.iter % run.log_interval == 0):
            continue
        if int(first_bad) < int(never):  # looked at only here: on a GPU every look waits for the device
            sys.exit(f"error: the loss of iteration {int(first_bad)} is not finite; {run.out_dir}/last.pt, "
                     f"if there is one, is from before; a smaller --lr or --muon_lr may help")
        if (evaluating or stopping) and not all(p.isfinite().all() for p in state.params):
            sys.exit(f"error: iteration {state.iter - 1} made weights that are not finite; "
                     f"{run.out_dir}/last.pt, if there is one, is from before; a smaller --lr may help")
        seconds = (time.time() - tick) / (state.iter - tick_iter)
        rate = run.batch_size * run.grad_accum * world * state.config.block_size / seconds
        means = {name: torch.stack([f[name] for f in figures]).mean() for name in figures[0]}
        line = ', '.join(f"{name} {mean:.4f}" for name, mean in means.items()) + f", {rate:,.0f} tokens/s"
        bar.set_postfix_str(line)
        if rank == 0 and bar.disable:
            say(f"iter {state.iter}: {line}, {seconds * (run.max_iters - state.iter):.0f} s left")
        if rank == 0 and evaluating:
            state.evaluate(val, text, amp)
        if rank == 0 and (evaluating or stopping):
            state.save()
        if rank == 0 and evaluating:
            kind = {'exact': 'exact', 'upper': 'upper bound'}[state.model.bound]
            value, error = state.val
            say(f"iter {state.iter}: validation {value:.4f} ± {error:.4f} nats/token, {kind}", bar)
        figures, tick, tick_iter = [], time.time(), state.iter
        if stopping:
            break
    bar.close()


def start(state, rank, world, dtype):
    """Get the data, and train until it is done or a signal comes."""
    run, config, device = state.run, state.config, state.device
    batch, val, text = examples(run, config, state.meta, device, rank, state.model)
    if hasattr(state.model, 'measure'):
        state.gauge = torch.cat([batch()[0][0] for _ in range(-(-1024 // run.batch_size))])
    if rank == 0:
        if run.init_from != 'resume' and (old := common.set_aside(run.out_dir)):
            say(f"{run.out_dir}/ holds the checkpoints of an earlier run: they are in {old}/ from now on")
        n = sum(p.numel() for p in state.params)
        say(f"{run.objective}: {n / 1e6:.2f}M parameters, "
            f"{config.block_size * run.batch_size * run.grad_accum * world} tokens an iteration, "
            f"{run.max_iters} iterations, {device} in {dtype}, to {run.out_dir}/")

    caught = []
    stops = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        stops.append(signal.SIGHUP)
    for number in stops:
        signal.signal(number, lambda number, frame: caught.append(number))

    def stop(it):
        """Has a signal come?
        Processes agree on the iteration, so that none waits for another that has left."""
        if world == 1:
            return bool(caught)
        if it % 10:
            return False
        flag = torch.tensor(float(bool(caught)), device=device)
        dist.all_reduce(flag)
        return flag.item() > 0

    train(state, batch, val, text, rank, world, common.autocast(device, dtype), stop)
    if caught and rank == 0:
        say(f"stopped by a signal at iteration {state.iter}: saved; "
            f"go on with --init_from=resume --out_dir={run.out_dir}")


def main(argv):
    run, config, meta, checkpoint, base = settings(argv)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = common.pick_device(run.device)
    if world > 1:
        if device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    dtype = common.pick_dtype(run.dtype, device)
    state = State(run, config, meta, checkpoint, device, base)
    if state.iter >= run.max_iters:
        say(f"{run.out_dir}/ holds a run that is finished: it has done {state.iter:,} iterations, max_iters "
            f"is {run.max_iters:,}; with a larger --max_iters= it goes on")
    elif rank == 0:
        state.check_room(files.folder(run.out_dir, 'out_dir'))
        with files.occupied(run.out_dir):
            start(state, rank, world, dtype)
    else:
        start(state, rank, world, dtype)
    if world > 1:
        dist.barrier()  # rank 0 may still be writing the last checkpoint
        dist.destroy_process_group()


if __name__ == '__main__':
    script(main)
