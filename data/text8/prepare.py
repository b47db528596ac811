"""
text8: the first 100,000,000 characters of a cleaned Wikipedia, a-z and space, one token a character:
writes train.bin, val.bin, test.bin (uint16; 90, 5 and 5 million, the split that published figures use)
and meta.json beside this file.

    python data/text8/prepare.py                       # downloads 31 MB, kept as text8.zip
    python data/text8/prepare.py --input=text8.zip     # or the unpacked text8, or another text of its kind

Source: Matt Mahoney, mattmahoney.net/dc/textdata.html
"""
import string
import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, fail
from data import tools
from hub import web
from text import files

URL = 'http://mattmahoney.net/dc/text8.zip'
CHARS = ' ' + string.ascii_lowercase
LENGTH = 100_000_000


def prepare(out, *,
            input: Filename = ''):  # text8 or text8.zip at hand, of any length
    path, source = Path(input or Path(out, 'text8.zip')), Path(input).name or URL
    if not input:
        web.fetch(URL, path, otherwise="give the file with --input=text8.zip")
    zipped = not input or zipfile.is_zipfile(path)
    data = web.unzip(path, 'text8') if zipped else files.read_text(path, 'input').encode()
    table = np.full(256, len(CHARS), np.uint16)
    table[list(CHARS.encode())] = np.arange(len(CHARS))
    tokens = table[np.frombuffer(data, np.uint8)]
    if len(tokens) < 100 or not input and len(tokens) != LENGTH:
        fail(f"{source} has {len(tokens):,} characters, text8 has {LENGTH:,}")
    if tokens.max() == len(CHARS):
        odd = chr(data[int(tokens.argmax())])
        fail(f"{source} holds {odd!r}, text8 only a-z and space; other texts: data/text/prepare.py")
    a, b = int(0.9 * len(tokens)), int(0.95 * len(tokens))
    splits = dict(train=tokens[:a], val=tokens[a:b], test=tokens[b:])
    tools.write_splits(out, splits, dict(kind='char', chars=list(CHARS)), source, data)
    print(f"{source}: {tools.sizes(splits, 'characters')}")


main = tools.script_of(prepare, __doc__, __name__)
