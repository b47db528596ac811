"""
tiny-shakespeare in the byte pairs of GPT-2:
writes train.bin, val.bin (uint16, 90/10 of the characters) and meta.json beside this file.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=my.txt

The text comes from where data/shakespeare_char/prepare.py finds it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename
from data import tools
from data.shakespeare_char import prepare as characters


def prepare(out, *,
            input: Filename = '',  # a UTF-8 text file to use instead
            tokenizer: Filename = 'gpt2'):  # gpt2 | byte | char
    tools.prepare_bytes(*characters.find_text(input), tokenizer, out)


main = tools.script_of(prepare, __doc__, __name__)
