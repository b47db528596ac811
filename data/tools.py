"""
What the preparers share: flags, and text into tokens.
"""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import configurator  # noqa: E402
from configurator import fail  # noqa: E402
from hub import pretrained  # noqa: E402
from text import files  # noqa: E402
from text.vocabulary import Tokenizer, file_type  # noqa: E402


def settings(argv, doc, Config):
    """The Config that the flags ask for, whose folder `out` can be written to; --help prints what there is
    and ends the script."""
    config, _ = configurator.settings(argv, doc, Config)
    files.folder(config.out, 'out')
    return config


# ---- text into tokens -------------------------------------------------------------------------------------

def decode(data, source):
    """Bytes -> text, see files.text_of; text that is very short ends the script."""
    text = files.text_of(data, source)
    if len(text) < 100:
        fail(f"{source} has {len(text)} characters: too few to train on")
    return text


def cut(text):
    """{'train': the first 90% of the characters, 'val': the rest}"""
    n = int(0.9 * len(text))
    return dict(train=text[:n], val=text[n:])


def meta_of(kind, text=''):
    """What `Tokenizer` takes: kind char (of the characters of `text`) | byte | gpt2, or the name of a model
    that lies in a folder or on the hub: its tokenizer."""
    if kind in ('byte', 'gpt2'):
        return dict(kind=kind)
    if kind == 'char':
        return dict(kind=kind, chars=sorted(set(text)))
    return pretrained.tokenizer(kind)


def as_json(meta):
    """What meta.json holds: the name of the tokenizer and the origin of the text."""
    return json.dumps(meta, ensure_ascii=False, indent=1).encode()


def write_meta(out, meta):
    """meta.json is written last: it says that the dataset is there."""
    files.write(Path(out, 'meta.json'), as_json(meta))


def write_splits(out, tokens, meta):
    """tokens {'train': ids, 'val': ids, ...} -> out/<split>.bin (uint16, or uint32 for a vocabulary beyond)
    for each, out/meta.json. What an earlier run has left stays until all of it is written."""
    dtype, splits = file_type(Tokenizer(meta).vocab_size), ('train', 'val', 'test')
    data = {f'{split}.bin': np.asarray(tokens[split], dtype).tobytes() for split in splits if split in tokens}
    stale = [f'{split}.bin' for split in splits if split not in tokens]
    files.write_all(out, data | {'meta.json': as_json(meta)}, ['meta.json', *stale])


def prepare_bytes(data, kind, out, source):
    """A text of one piece as UTF-8 bytes -> train.bin, val.bin (90/10 of its characters) and meta.json."""
    prepare_text(cut(decode(data, source)), kind, out, source, hashlib.sha256(data).hexdigest())


def prepare_text(texts, kind, out, source, sha256):
    """texts {'train': str, 'val': str, ...} -> out/<split>.bin for each, out/meta.json. kind: char (the
    vocabulary is that of all splits) | byte | gpt2 | the tokenizer of a model, see pretrained.py."""
    meta = meta_of(kind, ''.join(texts.values())) | dict(source=source, sha256=sha256)
    tokenizer = Tokenizer(meta)
    tokens = {split: tokenizer.encode(text) for split, text in texts.items()}
    write_splits(out, tokens, meta)
    print(f"{source}: {sum(map(len, texts.values())):,} characters, "
          f"a vocabulary of {tokenizer.vocab_size:,}; "
          + ', '.join(f"{split} {len(ids):,} tokens" for split, ids in tokens.items()))
