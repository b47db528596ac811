"""
OpenWebText, or documents of your own, in the byte pairs of GPT-2 with <|endoftext|> (50256) behind each:
writes train.bin, val.bin (uint16) and meta.json beside this file.

    python data/openwebtext/prepare.py                     # 8 million documents, 9 billion tokens, 18 GB
    python data/openwebtext/prepare.py --input=docs.jsonl  # or .txt, or a folder of such files

A line of a .jsonl is a document, its "text"; a .txt is one document, or several with a line <|endoftext|>
between them. Every 2,000th document goes to val.bin. Documents stream from source to disk: memory holds
1,024 of them. A run that is stopped starts anew.

Source: huggingface.co/datasets/Skylion007/openwebtext, through the library datasets, which has to be
installed for it.
"""
import hashlib
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, Range, fail
from data import tools
from text import files
from text.vocabulary import Tokenizer

NAME = 'Skylion007/openwebtext'
Every = Annotated[int, Range(lambda n: n >= 2, "must be at least 2")]
BATCH = 1024      # documents in memory at a time


def hub_documents(revision):
    """The texts of OpenWebText, as they stream in."""
    try:
        import datasets
        for row in datasets.load_dataset(NAME, split='train', streaming=True, revision=revision or None):
            yield row['text']
    except (ImportError, RuntimeError, OSError, ValueError, KeyError) as e:
        fail(f"the stream of {NAME} broke ({type(e).__name__}: {str(e)[:200]}): it needs the library "
             f"datasets (pip install datasets), and where that refuses its script "
             f"--revision=refs/convert/parquet; or give documents of your own with --input=FILE")


def file_documents(path):
    """The documents of a .txt or .jsonl, one at a time."""
    lines, number = [], 1
    try:
        with open(path, 'rb') as f:
            encoding = files.encoding_of(f.read(4))
        with open(path, encoding=encoding) as f:
            for number, line in enumerate(f, 1):
                if path.suffix == '.jsonl':
                    if line.strip():
                        yield str(json.loads(line)['text'])
                elif line.strip() == '<|endoftext|>':
                    yield ''.join(lines)
                    lines = []
                else:
                    lines.append(line)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:  # UnicodeError is a ValueError
        fail(f'cannot read {path}, line {number}, as UTF-8 text, or as an object with a "text" in a .jsonl '
             f'({type(e).__name__}: {e})')
    yield ''.join(lines)


def documents(path):
    """(iterator over the documents of a file or folder, its name)"""
    root = Path(path)
    paths = sorted(p for p in root.rglob('*') if p.suffix in ('.txt', '.jsonl')) if root.is_dir() else [root]
    if not all(p.is_file() for p in paths) or not paths:
        fail(f"--input={path} is no file, and no folder with .txt or .jsonl in it")
    return itertools.chain.from_iterable(map(file_documents, paths)), root.name


def write_tokens(texts, tokenizer, train, val, val_every):
    """Write the tokens of the texts into the open files train and val, of which val gets one text in
    val_every, batch by batch. Returns ({'train': tokens, 'val': tokens}, sha256 of the texts)."""
    counts, digest, number = dict(train=0, val=0), hashlib.sha256(), 0
    with ThreadPoolExecutor() as pool, tqdm(unit=' documents', disable=not sys.stderr.isatty()) as bar:
        while batch := list(itertools.islice(texts, BATCH)):
            for text, ids in zip(batch, pool.map(tokenizer.encode, batch)):
                split, file = ('val', val) if number % val_every == 0 else ('train', train)
                file.write(np.array([*ids, tokenizer.end], np.uint16).tobytes())
                digest.update(text.encode(errors='replace'))
                counts[split] += len(ids) + 1
                number += 1
            bar.update(len(batch))
    return counts, digest.hexdigest()


def prepare(out, *,
            input: Filename = '',  # .txt, .jsonl or a folder of them, instead of OpenWebText
            val_every: Every = 2000,  # one document in so many is for validation
            revision: str = ''):  # of the dataset, e.g. refs/convert/parquet; '': the main one
    texts, source = documents(input) if input else (hub_documents(revision), NAME)
    first = next(texts, '')  # a source that does not open ends the script here, before anything is written
    texts = filter(str.strip, itertools.chain([first], texts))
    tokenizer, out = Tokenizer(dict(kind='gpt2')), Path(out)
    with files.writing(out / 'train.bin') as train, files.writing(out / 'val.bin') as val:
        counts, sha256 = write_tokens(texts, tokenizer, train, val, val_every)
        if not all(counts.values()):
            fail(f"{source} holds fewer than two documents; a single text: data/text/prepare.py")
        for file in (train, val):
            file.flush()  # a disk that is full says so before the files of an earlier run go
        for name in ('meta.json', 'test.bin'):
            (out / name).unlink(missing_ok=True)
    files.write(out / 'meta.json', tools.as_json(dict(kind='gpt2', source=source, sha256=sha256)))
    print(f"{source}: train {counts['train']:,} tokens, val {counts['val']:,} tokens")


main = tools.script_of(prepare, __doc__, __name__)
