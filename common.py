"""
What the scripts share: device and precision, tokenizer, batches, evaluation, checkpoints.

A checkpoint is self-contained: objective, config, tokenizer, weights, EMA, optimizers,
iteration, seed, data source. Random numbers need no saving: the noise of iteration i is a
function of (seed, i) alone (`seed_everything`).
"""
import contextlib
import importlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch

from configurator import fail

OBJECTIVES = ('ar', 'masked')  # the concept files


# ---- device -----------------------------------------------------------------------------------------------

def pick_device(name='auto'):
    """'auto' is cuda, else mps, else cpu -> torch.device, usable, or the script ends."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"device={name} cannot be used here ({str(e).splitlines()[0]}); try --device=cpu")
    return device


def pick_dtype(name, device):
    """'auto' is bfloat16 where the processor multiplies matrices in it:
    most CUDA GPUs, CPUs with AVX512-BF16 or AMX."""
    if name not in ('auto', 'float32', 'bfloat16'):
        fail(f"dtype={name!r} is not one of: auto, float32, bfloat16")
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    known = device.type == 'cpu' and hasattr(torch.cpu, 'get_capabilities')
    able = torch.cpu.get_capabilities() if known else {}
    return torch.bfloat16 if able.get('avx512_bf16') or able.get('amx_bf16') else torch.float32


def autocast(device, dtype):
    """The precision of the networks; weights, losses and the mathematics around stay float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def seed_everything(*numbers):
    """Seed torch on all devices with a hash of the numbers:
    equal numbers, equal noise, whatever came before."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# ---- text -------------------------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> token ids by the `meta.json` of a dataset: {'kind': 'char', 'chars': [...]}."""

    def __init__(self, meta):
        if meta.get('kind') != 'char':
            fail(f"tokenizer kind {meta.get('kind')!r} is not known here")
        self.meta, self.chars = meta, meta['chars']
        self.ids = {c: i for i, c in enumerate(self.chars)}
        self.vocab_size = len(self.chars)

    def encode(self, text):
        """Text -> list of ids; characters outside the vocabulary end the script, by name."""
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            fail(f"not in the vocabulary of this model: {' '.join(map(repr, unknown[:10]))}")
        return [self.ids[c] for c in text]

    def decode(self, ids, blank='░'):
        """Ids -> text; id V, a masked or unwritten position, becomes `blank`."""
        return ''.join(self.chars[i] if i < self.vocab_size else blank for i in ids)


def load_meta(dataset):
    path = Path('data', dataset, 'meta.json')
    if not path.is_file():
        known = sorted(p.parent.name for p in Path('data').glob('*/prepare.py'))
        if dataset in known:
            fail(f"{path} is missing: run `python data/{dataset}/prepare.py` first")
        fail(f"dataset={dataset!r} is not a folder of data/ that holds a prepare.py "
             f"({', '.join(known) or 'there is none here'})")
    return json.loads(path.read_text())


def load_tokens(dataset, split, vocab_size, device):
    """data/<dataset>/<split>.bin (uint16) as an int16 tensor on the device;
    `windows` and `batch` undo the sign."""
    path = Path('data', dataset, f'{split}.bin')
    if not path.is_file():
        fail(f"{path} is missing: run `python data/{dataset}/prepare.py` first")
    tokens = np.fromfile(path, np.uint16)
    if len(tokens) == 0 or tokens.max() >= vocab_size:
        what = (f"holds token {tokens.max()}, beyond the vocabulary of {vocab_size}" if len(tokens)
                else "is empty")
        fail(f"{path} {what}: run `python data/{dataset}/prepare.py` again")
    return torch.from_numpy(tokens.view(np.int16)).to(device)


def batch(tokens, B, T):
    """B random windows of T tokens, (B, T) int64, gathered on the device without waiting for it."""
    start = torch.randint(len(tokens) - T + 1, (B, 1), device=tokens.device)
    return tokens[start + torch.arange(T, device=tokens.device)].long() & 0xFFFF


def windows(tokens, T, most=0):
    """Consecutive windows (N, T) int64 of all tokens (the last, incomplete one is left out);
    `most` of them, evenly spread."""
    N = len(tokens) // T
    rows = torch.arange(N, device=tokens.device)
    if 0 < most < N:
        rows = torch.linspace(0, N - 1, most, device=tokens.device).long()
    return tokens[:N * T].view(N, T)[rows].long() & 0xFFFF


# ---- evaluation -------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(nats, x, seed=0, rows=64):
    """Mean of nats(x) per token over windows x (N, T), and its standard error over windows;
    a function of the seed.

    nats: (B, T) -> (B,), a likelihood or a bound in nats, called under the caller's autocast.
    """
    with torch.random.fork_rng():
        seed_everything(seed)
        values = torch.cat([nats(part) for part in x.split(rows)]).double() / x.size(1)
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float('nan')
    return values.mean().item(), error


# ---- checkpoints ------------------------------------------------------------------------------------------

def save(checkpoint, path):
    """Write a checkpoint to a temporary file, then rename it: whenever we are killed, `path` is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    with open(temporary, 'wb') as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load(path, device='cpu'):
    """The checkpoint at `path` (a dict of plain values and tensors; no code is unpickled),
    or the script ends."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no checkpoint {path}: `python train.py config/train_mdlm.py` makes one")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError) as e:
        fail(f"{path} is not a checkpoint of this repository, or is damaged ({type(e).__name__})")
    needed = {'objective', 'config', 'run', 'tokenizer', 'model', 'ema', 'iter', 'tokens'}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        fail(f"{path} is not a checkpoint of this repository")
    return checkpoint


def find_checkpoint(out_dir='', which='best'):
    """out_dir/best.pt or last.pt; without out_dir, of the out*/ that was written last."""
    if which not in ('best', 'last'):
        fail(f"which={which!r} is not one of: best, last")
    if not out_dir:
        found = sorted(Path('.').glob('out*/last.pt'), key=lambda p: p.stat().st_mtime)
        if not found:
            fail("there is no out*/last.pt here: `python train.py config/train_mdlm.py` makes one")
        out_dir = found[-1].parent
    path = Path(out_dir, f'{which}.pt')
    return path if path.exists() else Path(out_dir, 'last.pt')


def concept(objective):
    """The module of an objective: objective = 'masked' is masked.py."""
    if objective not in OBJECTIVES:
        fail(f"objective={objective!r} is not one of: {', '.join(OBJECTIVES)}")
    return importlib.import_module(objective)


def load_model(checkpoint, device, ema=True):
    """(model in eval mode, tokenizer) of a checkpoint dict."""
    module = concept(checkpoint['objective'])
    try:
        model = module.Model(module.Config(**checkpoint['config']))
        model.load_state_dict(checkpoint['ema' if ema else 'model'])
    except (TypeError, ValueError, RuntimeError) as e:
        fail(f"the checkpoint does not fit this version of {checkpoint['objective']}.py: {str(e)[:200]}")
    return model.to(device).eval().requires_grad_(False), Tokenizer(checkpoint['tokenizer'])
