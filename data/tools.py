"""
What the preparers share: flags, and text into tokens.
"""
import hashlib
import inspect
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import Filename, fail, help_lines, script, settings
from hub import find
from text import files
from text.vocabulary import Tokenizer, file_type


def place(prepare, *,
          out: Filename = ''):  # where the files go; '': beside the preparer
    """The folder of a preparer, which can be written; or the script ends."""
    out = out or str(Path(inspect.getsourcefile(prepare)).parent)
    files.folder(out, 'out')
    return out


def script_of(prepare, doc, name):
    """The script main(argv) of a preparer, prepare(folder, **knobs): what stands behind its `*` are knobs. It
    runs if that is what Python was called with, as __name__ tells."""
    def main(argv):
        lines = [line for function in (prepare, place) for line in help_lines(function)]
        chosen, = settings(argv, doc, functions=(prepare, place), others='\n\nknobs:\n' + '\n'.join(lines))
        prepare(place(prepare, out=chosen.pop('out', '')), **chosen)
    if name == '__main__':
        script(main)
    return main


def read_input(path):
    """The file that --input= names -> (its bytes, its name), or the script ends."""
    if not path:
        fail("which text? --input=FILE")
    return files.read_bytes(path, 'input'), Path(path).name


def decode(data, source):
    """Bytes -> text; a very short one ends the script."""
    text = files.text_of(data, source)
    if len(text) < 100:
        fail(f"{source} has {len(text)} characters: too few to train on")
    return text


def meta_of(kind, text=''):
    """The meta of a `Tokenizer` of kind char (the characters of `text`) | byte | gpt2, or of the model of
    that name, in a folder or on the hub."""
    if kind in ('byte', 'gpt2'):
        return dict(kind=kind)
    return dict(kind=kind, chars=sorted(set(text))) if kind == 'char' else find.tokenizer(kind)


def as_json(meta):
    return json.dumps(meta, ensure_ascii=False, indent=1).encode()


def write_splits(out, tokens, meta, source='', *data):
    """tokens {'train': ids, 'val': ids, ...} -> out/<split>.bin for each (uint16, or uint32 for a large
    vocabulary) and out/meta.json, with the name and the sha256 of the source, whose bytes are `data`. The
    files of an earlier run stay until all of these are written."""
    meta = meta | dict(source=source, sha256=hashlib.sha256(b''.join(data)).hexdigest())
    dtype = file_type(Tokenizer(meta).vocab_size)
    bins = {f'{split}.bin': np.asarray(ids, dtype).tobytes() for split, ids in tokens.items()}
    stale = [f'{split}.bin' for split in ('train', 'val', 'test') if split not in tokens]
    files.write_all(out, bins | {'meta.json': as_json(meta)}, ['meta.json', *stale])


def sizes(splits, unit):
    """How large the splits are, in words."""
    return ', '.join(f"{split} {len(part):,} {unit}" for split, part in splits.items())


def prepare_bytes(data, source, kind, out):
    """A text as UTF-8 bytes -> train.bin, val.bin (90/10 of its characters) and meta.json."""
    text = decode(data, source)
    n = int(0.9 * len(text))
    prepare_text(dict(train=text[:n], val=text[n:]), kind, out, source, data)


def prepare_text(texts, kind, out, source, *data):
    """texts {'train': str, 'val': str, ...} -> out/<split>.bin for each, out/meta.json. kind: as of
    `meta_of`; the characters are those of all splits."""
    meta = meta_of(kind, ''.join(texts.values()))
    tokenizer = Tokenizer(meta)
    tokens = {split: tokenizer.encode(text) for split, text in texts.items()}
    write_splits(out, tokens, meta, source, *data)
    print(f"{source}: {sum(map(len, texts.values())):,} characters, "
          f"a vocabulary of {tokenizer.vocab_size:,}; {sizes(tokens, 'tokens')}")
