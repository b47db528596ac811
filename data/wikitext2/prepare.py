"""
WikiText-2 (arXiv 1609.07843), raw:
writes train.bin, val.bin, test.bin and meta.json beside this file.

    python data/wikitext2/prepare.py                                      # downloads 5 MB
    python data/wikitext2/prepare.py --tokenizer=byte
    python data/wikitext2/prepare.py --valid=valid.txt --test=test.txt    # only these, to evaluate on

The text stays as it is, with its spaces around punctuation and its ' @-@ '. Papers often undo these before
they score a model that never saw them (zero-shot); figures of the two kinds do not compare.

Source: the copy that llama.cpp measures with, huggingface.co/datasets/ggml-org/ci (HF_ENDPOINT is honoured).
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, script
from data import tools
from hub import web
from text import files

NAME = 'wikitext-2-raw-v1.zip'
SHA256 = 'ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11'


@dataclass
class Config:
    train: Filename = ''  # text files instead of the download; a split that is not given is left out
    valid: Filename = ''  # becomes val.bin
    test: Filename = ''  # becomes test.bin
    tokenizer: Filename = 'gpt2'  # gpt2 | byte | char | a model (hub/find.py), whose tokenizer it is
    sha256: str = SHA256  # what the download must hash to; '': anything
    out: Filename = ''  # where the files go; '': beside this file


def find_texts(config):
    """({split: bytes}, where they came from)"""
    given = dict(train=config.train, valid=config.valid, test=config.test)
    if any(given.values()):
        texts = {split: files.read_bytes(path, split) for split, path in given.items() if path}
        return texts, ', '.join(Path(path).name for path in given.values() if path)
    path = Path(config.out, NAME)
    web.fetch(web.address('ggml-org/ci', NAME), path, config.sha256,
              "give files with --train= --valid= --test=")
    return {split: web.unzip(path, f'wikitext-2-raw/wiki.{split}.raw') for split in given}, NAME


def main(argv):
    config = tools.settings(argv, __doc__, Config)
    found, source = find_texts(config)
    texts = {dict(valid='val').get(split, split): tools.decode(data, f'{source} ({split})')
             for split, data in found.items()}
    tools.prepare_text(texts, config.tokenizer, config.out, source, *found.values())


if __name__ == '__main__':
    script(main)
