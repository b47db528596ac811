"""
tiny-shakespeare in the byte pairs of GPT-2:
writes train.bin, val.bin (uint16, 90/10 of the characters) and meta.json beside this file.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=my.txt

The text comes from where data/shakespeare_char/prepare.py finds it.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, script
from data import tools
from data.shakespeare_char import prepare as characters


@dataclass
class Config(characters.Config):
    tokenizer: Filename = 'gpt2'  # gpt2 | byte | char


def main(argv):
    config = tools.settings(argv, __doc__, Config)
    data, source = characters.find_text(config.input)
    tools.prepare_bytes(data, config.tokenizer, config.out, source)


if __name__ == '__main__':
    script(main)
