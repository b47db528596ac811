"""
What the preparers share: flags, downloads that go on where they were cut, text into tokens.
"""
import hashlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import files  # noqa: E402
from configurator import build, fail, help_text, read  # noqa: E402
from vocabulary import Tokenizer, file_type  # noqa: E402

TRIES, PAUSE = 5, 1.0  # of a download that was cut; seconds before the second, doubled for each after it


def settings(argv, doc, Config):
    """The Config that the flags ask for, whose folder `out` can be written to; --help prints what there is
    and ends the script."""
    given, _, flags = read(argv)
    if 'help' in flags:
        print(help_text(doc, Config))
        sys.exit(0)
    config, = build({**given, **flags}, Config)
    files.folder(config.out, 'out')
    return config


# ---- files ------------------------------------------------------------------------------------------------

def unzip(path, member):
    """The bytes of one member of a zip file, which carries a checksum of its own; or the script ends."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as e:
        fail(f"{path} is damaged or another file than expected ({e}): replace it")


# ---- downloads --------------------------------------------------------------------------------------------

def append(url, part, headers):
    """One connection: ask for what `part` lacks and put it behind what it has.
    Raises requests.RequestException; what has come by then stays in `part`."""
    have = part.stat().st_size if part.exists() else 0
    asked = {**headers, 'Accept-Encoding': 'identity'}  # else lengths would count compressed bytes
    if have:
        asked['Range'] = f'bytes={have}-'
    with requests.get(url, headers=asked, stream=True, timeout=20) as response:
        size = response.headers.get('content-range', '').rpartition('/')[2]
        if response.status_code == 416 and have:  # nothing lies beyond `have`
            if size == str(have):
                return
            part.unlink()  # of another file, or of another version of this one
            return append(url, part, headers)
        response.raise_for_status()
        if response.status_code != 206:  # the server knows no ranges and sends all of it
            have, size = 0, response.headers.get('content-length', '')
        total = int(size) if size.isdigit() else None
        with files.disk(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            f = open(part, 'ab' if have else 'wb')
        with f, tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=part.stem,
                     disable=not sys.stderr.isatty()) as bar:
            for chunk in response.iter_content(1 << 16):
                with files.disk(part):
                    f.write(chunk)
                    f.flush()  # a full disk says so here
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes came")


def download(url, path, sha256='', headers=()):
    """url -> path, whole and with the right checksum, or not at all; a file that exists is left alone.

    What has come lies in path.part, where the next call goes on. A connection that is cut is tried again,
    one that never gave a byte is not. Raises requests.RequestException, or ValueError (another checksum).
    """
    path = Path(path)
    if path.exists():
        return
    part = path.with_name(path.name + '.part')
    for attempt in range(TRIES):
        try:
            append(url, part, dict(headers))
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if attempt == TRIES - 1 or not part.exists():
                raise
            time.sleep(PAUSE * 2 ** attempt)
    if sha256:
        with open(part, 'rb') as f:
            found = hashlib.file_digest(f, 'sha256').hexdigest()
        if found != sha256:
            part.unlink()
            raise ValueError(f"sha256 {found[:12]}… instead of {sha256[:12]}…")
    os.replace(part, path)


def fetch(url, path, sha256='', otherwise=''):
    """download(), or the script ends and names the way out; `otherwise` is another one."""
    try:
        download(url, path, sha256)
    except (requests.RequestException, ValueError) as e:
        why = type(e).__name__ if isinstance(e, requests.ConnectionError) else str(e)[:150]
        fail(f"{url} could not be downloaded ({why}): "
             f"run the same command again, it goes on where it stopped{otherwise and '; or ' + otherwise}")


def hub(repository, name, kind='datasets/'):
    """The address of a file in a dataset of the Hugging Face hub (kind='': a model), or of its mirror
    HF_ENDPOINT."""
    host = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    return f'{host}/{kind}{repository}/resolve/main/{name}'


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
    import pretrained  # which downloads with what is in this file
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
