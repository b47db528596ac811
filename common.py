"""
What the scripts share: device and precision, evaluation, checkpoints.

A checkpoint is self-contained: objective, config, tokenizer, weights, their average, iteration, seed, data
source; last.pt has the optimizers, too. Random numbers need no saving: the noise of iteration i is a function
of (seed, i) alone (`seed_everything`).
"""
import contextlib
import importlib
import warnings
from pathlib import Path

import numpy as np
import torch

from configurator import fail
from parts.filled import filled
from text import files
from text.packing import counted
from text.vocabulary import Tokenizer

OBJECTIVES = ('ar', 'masked', 'sedd', 'd3pm', 'block', 'score', 'vae', 'latent')  # the concept files


# ---- device -----------------------------------------------------------------------------------------------

def pick_device(name='auto'):
    """'auto' is cuda, else mps, else cpu -> torch.device, usable, or the script ends."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # `meta` holds nothing
    except (RuntimeError, AssertionError) as e:  # AssertionError: a torch that was built without CUDA
        fail(f"device={name} cannot be used here ({str(e).splitlines()[0][:150]}); try --device=cpu")
    return device


def pick_dtype(name, device):
    """'auto' is bfloat16 where the processor multiplies matrices in it:
    most CUDA GPUs, CPUs with AVX512-BF16 or AMX."""
    return fast_dtype(device) if name == 'auto' else getattr(torch, name)


def fast_dtype(device):
    """bfloat16 where the processor multiplies matrices in it, else float32."""
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    known = device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities')
    able = torch.cpu.get_capabilities() if known else {}
    return torch.bfloat16 if able.get('avx512_bf16') or able.get('amx_bf16') else torch.float32


def autocast(device, dtype):
    """The precision of the networks; weights, losses and the mathematics around stay float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def precision(model, name, device):
    """The same for a model that is there. name: as of pick_dtype, or '': as its weights are stored."""
    if not name and next(model.parameters()).dtype == torch.float32:
        return autocast(device, torch.float32)
    return autocast(device, pick_dtype(name or 'auto', device))


def seed_everything(*numbers):
    """Seed torch on all devices with a hash of the numbers:
    equal numbers, equal noise, whatever came before."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# ---- evaluation -------------------------------------------------------------------------------------------

def rows_at_once(T, V):
    """How many sequences of T tokens to score in one forward: 64, or fewer for a gigabyte of logits."""
    return max(1, min(64, 2 ** 28 // (T * V)))


def scored_tokens(batch, mask_id):
    """The tokens of a batch that are scored: no padding and no prompt, (N, T) bool. Places without a token
    hold mask_id in the windows of vae.py."""
    return counted(batch['x'], batch.get('segment'), batch.get('given')) & (batch['x'] != mask_id)


@torch.no_grad()
def evaluate(nats, batch, scored, at_once, seed=0):
    """Mean of nats(**batch) per token, and its standard error over windows; a function of the seed and of
    at_once, the number of windows of one forward.

    batch: named tensors of N rows each, see text/rows.py; scored (N, T) bool: which tokens count. nats: the
    same of B rows -> (B,), a likelihood or a bound in nats, called under the caller's autocast.
    """
    with torch.random.fork_rng():
        seed_everything(seed)
        parts = zip(*(tensor.split(at_once) for tensor in batch.values()))
        values = torch.cat([nats(**dict(zip(batch, part))) for part in parts]).cpu().double()
    count = scored.sum(-1).cpu()
    mean = values.sum() / count.sum()
    if len(count) < 2:
        return mean.item(), float('nan')
    spread = (values - mean * count).std() / count.double().mean()  # of a ratio
    return mean.item(), (spread / len(count) ** 0.5).item()


# ---- texts ------------------------------------------------------------------------------------------------

def generate(model, canvas, block_size, overlap, **knobs):
    """Generator of canvases (B, L), one per network call, for any L: in pieces of block_size, each with the
    last `overlap` tokens of the one before as given context; the last ends at L."""
    last = max(0, canvas.size(1) - block_size)
    for start in [*range(0, last, block_size - overlap), last]:
        for window in model.sample(canvas[:, start:start + block_size], **knobs):
            canvas = torch.cat([canvas[:, :start], window, canvas[:, start + block_size:]], dim=1)
            yield canvas


# ---- checkpoints ------------------------------------------------------------------------------------------

def save(checkpoint, path):
    """Write a checkpoint as a whole file or not at all; a full disk ends the script."""
    whole = Path(path).with_name('last.pt')
    then = "and start again"
    if whole.exists():
        then = f"{whole} is from before, --init_from=resume goes on there"
    with files.writing(path, then) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # torch hides what the disk said in the chain
            while not isinstance(e, OSError) and e.__context__:
                e = e.__context__
            raise e if isinstance(e, OSError) else OSError(str(e).splitlines()[0])


KINDS = dict(objective=str, config=dict, run=dict, tokenizer=dict, model=dict, ema=dict, iter=int, tokens=int)


def load(path, device='cpu'):
    """The checkpoint at `path` (a dict of plain values and tensors; no code is unpickled),
    or the script ends."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of torch, about files of another kind
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        old = sorted(Path(path).parent.glob('old-*/last.pt'), key=lambda p: p.stat().st_mtime)
        if old:
            fail(f"there is no checkpoint {path} yet; that of the run before is {old[-1]}")
        own = Path('config', f"train_{Path(path).parent.name.removeprefix('out-').replace('-', '_')}.py")
        fail(f"there is no checkpoint {path}: `python train.py "
             f"{own if own.exists() else 'config/train_mdlm.py'}` makes one")
    except Exception as e:  # whatever the bytes of another kind of file lead torch to
        why = e.strerror if isinstance(e, OSError) and e.strerror else type(e).__name__
        fail(f"{path} is not a checkpoint of this repository, or is damaged ({why})")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), kind)
                                                   for name, kind in KINDS.items()):
        fail(f"{path} is not a checkpoint of this repository")
    return checkpoint


def concept(objective):
    """The module of an objective: objective = 'masked' is masked.py."""
    if objective not in OBJECTIVES:
        fail(f"objective={objective!r} is not one of: {', '.join(OBJECTIVES)}")
    return importlib.import_module(objective)


def load_model(checkpoint, device, weights='ema', dtype='', **changes):
    """(model in eval mode, tokenizer) of a checkpoint dict; changes: config values to override.
    weights: ema | model, not averaged. dtype: 'float32' converts those of others (hub/), which otherwise keep
    their own type; ours are float32."""
    module, found = concept(checkpoint['objective']), checkpoint[weights]
    make = lambda: module.Model(module.Config(**{**checkpoint['config'], **changes}))
    own_type = getattr(found, 'dtype', torch.float32)  # of others' weights
    try:
        model = filled(make, found, device, torch.float32 if dtype == 'float32' else own_type)
    except ValueError as e:
        fail(e)
    except (TypeError, RuntimeError) as e:
        fail(f"the checkpoint does not fit this version of {checkpoint['objective']}.py: {str(e)[:200]}")
    tokenizer = Tokenizer(checkpoint['tokenizer'])
    if tokenizer.vocab_size != model.config.vocab_size:
        fail(f"the checkpoint's tokenizer knows {tokenizer.vocab_size:,} tokens, its model "
             f"{model.config.vocab_size:,}")
    return model.requires_grad_(False), tokenizer
