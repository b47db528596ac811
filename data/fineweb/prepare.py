"""
FineWeb, 10 billion tokens of web text, already in the byte pairs of GPT-2, with <|endoftext|> (50256) before
every document: writes val_000000.bin, train_000001.bin ... (uint16) and meta.json beside this file.

    python data/fineweb/prepare.py                 # 1 validation and 10 training shards, 2.2 GB
    python data/fineweb/prepare.py --shards=103    # all, 20.7 GB

Each shard holds 100 million tokens (the last 55 million), 200 MB. Run it again after a stop, or with more
shards: what is there stays.

Source: huggingface.co/datasets/kjj0/fineweb10B-gpt2, the files of modded-nanogpt in the format of llm.c
(HF_ENDPOINT is honoured).
"""
import sys
from pathlib import Path
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Range, fail
from data import tools
from hub import web
from text import files

REPOSITORY = 'kjj0/fineweb10B-gpt2'
MAGIC, VERSION = 20240520, 1  # llm.c, dev/data/data_common.py
Shards = Annotated[int, Range(range(104).__contains__, "must be in 0 to 103")]


def shard_tokens(path):
    """The tokens of a shard, (n,) uint16, behind its header of 256 int32: magic, version, n, 0 ..."""
    header = np.fromfile(path, '<i4', 256)
    tokens = np.fromfile(path, '<u2', offset=1024) if len(header) == 256 else []
    if len(tokens) == 0 or header[:3].tolist() != [MAGIC, VERSION, len(tokens)]:
        fail(f"{path} is not a whole shard of GPT-2 tokens (its header: {header[:3].tolist()}, "
             f"its tokens: {len(tokens)}): delete it and run the same command again")
    return tokens


def prepare(out, *,
            shards: Shards = 10):  # training shards, 0 to 103; 0: only to evaluate
    out = Path(out)
    for name in ['val_000000.bin'] + [f'train_{i:06d}.bin' for i in range(1, shards + 1)]:
        if not (out / name).exists():
            raw = out / f'fineweb_{name}'
            web.fetch(web.address(REPOSITORY, raw.name), raw)
            tokens = shard_tokens(raw)
            files.write(out / name, tokens.tobytes())
            raw.unlink()
            print(f"{name}: {len(tokens):,} tokens", flush=True)
        if not (out / 'meta.json').exists():  # early: one can train on the shards that have come
            files.write(out / 'meta.json', tools.as_json(dict(kind='gpt2', source=REPOSITORY, sha256='')))


main = tools.script_of(prepare, __doc__, __name__)
