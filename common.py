"""
What the scripts share: device and precision, batches, evaluation, checkpoints.

A checkpoint is self-contained: objective, config, tokenizer, weights, EMA, optimizers,
iteration, seed, data source. Random numbers need no saving: the noise of iteration i is a
function of (seed, i) alone (`seed_everything`).
"""
import contextlib
import importlib
import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from text import files
from configurator import fail
from text.vocabulary import Tokenizer, as_ids, file_type

OBJECTIVES = ('ar', 'masked', 'block', 'score', 'vae', 'latent')  # the concept files


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
    if name not in ('auto', 'float32', 'bfloat16'):
        fail(f"dtype={name!r} is not one of: auto, float32, bfloat16")
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


def seed_everything(*numbers):
    """Seed torch on all devices with a hash of the numbers:
    equal numbers, equal noise, whatever came before."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


# ---- data -------------------------------------------------------------------------------------------------

def load_meta(dataset):
    path = Path('data', dataset, 'meta.json')
    if not path.is_file():
        known = sorted(p.parent.name for p in Path('data').glob('*/prepare.py'))
        if dataset in known:
            fail(f"{path} is missing: run `python data/{dataset}/prepare.py` first")
        fail(f"dataset={dataset!r} is not a folder of data/ that holds a prepare.py "
             f"({', '.join(known) or 'there is none here'})")
    return files.read_json(path)


def token_files(dataset, split):
    """Where the tokens of a split are: data/<dataset>/<split>.bin, or shards <split>_<number>.bin in the
    order of their names; or the script ends."""
    folder, prepare = Path('data', dataset), f"`python data/{dataset}/prepare.py`"
    whole, shards = folder / f'{split}.bin', sorted(folder.glob(f'{split}_*.bin'))
    shards = [path for path in shards if re.fullmatch(rf'{split}_\d+\.bin', path.name)]
    if whole.is_file() and shards:
        fail(f"{folder} holds {whole.name} and shards such as {shards[0].name}, two texts: remove one of "
             f"them")
    if not shards and not whole.is_file():
        there = {re.split(r'[._]', path.name)[0] for path in folder.glob('*.bin')} & {'train', 'val', 'test'}
        only = f"this dataset has {' and '.join(sorted(there))} alone" if there else ""
        again = f"run {prepare} first" if split != 'test' or not there else ""
        fail(f"{whole} is missing: {only}{only and again and '; '}{again}")
    return shards or [whole]


def count_tokens(dataset, split, vocab_size):
    """How many tokens a split has, by the sizes of its files."""
    item = np.dtype(file_type(vocab_size)).itemsize
    return sum(path.stat().st_size // item for path in token_files(dataset, split))


def load_tokens(dataset, split, vocab_size, device):
    """All tokens of a split (see `token_files`) as one stream on the device, int16 if ids are uint16, else
    int32; `windows` and `batch` undo the sign."""
    paths, dtype = token_files(dataset, split), np.dtype(file_type(vocab_size))
    lengths = [path.stat().st_size // dtype.itemsize for path in paths]
    tokens = np.empty(sum(lengths), dtype)  # filled shard by shard, so that memory holds them once
    for path, length, shard in zip(paths, lengths, np.split(tokens, np.cumsum(lengths)[:-1])):
        shard[:] = np.fromfile(path, dtype, length)
        if length == 0 or shard.max() >= vocab_size or path.stat().st_size % dtype.itemsize:
            what = ("is empty" if length == 0 else "is cut short" if shard.max() < vocab_size else
                    f"holds token {shard.max()}, beyond the vocabulary of {vocab_size}")
            fail(f"{path} {what}: run `python data/{dataset}/prepare.py` again")
    return torch.from_numpy(tokens.view(f'i{dtype.itemsize}')).to(device)


def batch(tokens, B, T):
    """B random windows of T tokens, (B, T) int64, gathered on the device without waiting for it."""
    start = torch.randint(len(tokens) - T + 1, (B, 1), device=tokens.device)
    return as_ids(tokens[start + torch.arange(T, device=tokens.device)])


def windows(tokens, T, most=0):
    """Consecutive windows (N, T) int64 of all tokens (the last, incomplete one is left out);
    `most` of them, evenly spread."""
    N = len(tokens) // T
    rows = torch.arange(N, device=tokens.device)
    if 0 < most < N:
        rows = torch.linspace(0, N - 1, most, device=tokens.device).long()
    return as_ids(tokens[:N * T].view(N, T)[rows])


# ---- evaluation -------------------------------------------------------------------------------------------

def rows_at_once(T, V):
    """How many sequences of T tokens to score in one forward: 64, or fewer for a gigabyte of logits."""
    return max(1, min(64, 2 ** 28 // (T * V)))


@torch.no_grad()
def evaluate(nats, inputs, text, rows, seed=0):
    """Mean of nats(*inputs) per token, and its standard error over windows; a function of the seed and of
    rows, the number of windows scored at once.

    inputs: windows x (N, T) and what else nats takes, N rows each or None; text (N, T): which of x are
    scored, no padding and no prompt. nats: the same of B windows -> (B,), a likelihood or a bound in nats,
    called under the caller's autocast.
    """
    with torch.random.fork_rng():
        seed_everything(seed)
        parts = zip(*(itertools.repeat(None) if t is None else t.split(rows) for t in inputs))
        values = torch.cat([nats(*part) for part in parts]).cpu().double()
    count = text.bool().sum(-1).cpu()
    mean = values.sum() / count.sum()
    if len(count) < 2:
        return mean.item(), float('nan')
    spread = (values - mean * count).std() / count.double().mean()  # of a ratio
    return mean.item(), (spread / len(count) ** 0.5).item()


# ---- checkpoints ------------------------------------------------------------------------------------------

def save(checkpoint, path):
    """Write a checkpoint; whenever we are killed, `path` is whole. Or the script ends: there is no room."""
    whole = Path(path).with_name('last.pt')
    then = "and start again"
    if whole.exists():
        then = f"{whole} is from before, --init_from=resume goes on there"
    with files.writing(path, then) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as e:  # so torch puts what the disk said, which stands in the chain
            while not isinstance(e, OSError) and e.__context__:
                e = e.__context__
            raise e if isinstance(e, OSError) else OSError(str(e).splitlines()[0])


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
    if Path(out_dir).suffix == '.pt' and not Path(out_dir).is_dir():
        fail(f"there is no checkpoint {out_dir}")
    return path if path.exists() else Path(out_dir, 'last.pt')


def concept(objective):
    """The module of an objective: objective = 'masked' is masked.py."""
    if objective not in OBJECTIVES:
        fail(f"objective={objective!r} is not one of: {', '.join(OBJECTIVES)}")
    return importlib.import_module(objective)


def load_model(checkpoint, device, weights='ema', **changes):
    """(model in eval mode, tokenizer) of a checkpoint dict; changes: of its config, where weights allow.
    weights: ema | slow, the second average | model, not averaged."""
    module = concept(checkpoint['objective'])
    if weights not in ('ema', 'slow', 'model'):
        fail(f"weights={weights!r} is not one of: ema, slow, model")
    if weights not in checkpoint:
        fail("the checkpoint holds no second average: `python train.py ... --slow_decay=0.9999` keeps one")
    try:
        model = module.Model(module.Config(**{**checkpoint['config'], **changes}))
        model.load_state_dict(checkpoint[weights])
    except ValueError as e:
        fail(e)
    except (TypeError, RuntimeError) as e:
        fail(f"the checkpoint does not fit this version of {checkpoint['objective']}.py: {str(e)[:200]}")
    tokenizer = Tokenizer(checkpoint['tokenizer'])
    if tokenizer.vocab_size != model.config.vocab_size:
        fail(f"the checkpoint's tokenizer knows {tokenizer.vocab_size:,} tokens, its model "
             f"{model.config.vocab_size:,}")
    return model.to(device).eval().requires_grad_(False), tokenizer
