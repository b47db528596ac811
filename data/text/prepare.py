"""
Any UTF-8 text:
writes train.bin, val.bin (90/10 of the characters) and meta.json beside this file.

    python data/text/prepare.py --input=my.txt                     # one token a byte: knows every text
    python data/text/prepare.py --input=my.txt --tokenizer=char    # one a character of this text
    python data/text/prepare.py --input=my.txt --tokenizer=gpt2    # GPT-2's byte pairs, for megabytes
    python data/text/prepare.py --input=my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M   # or FOLDER, out-ar

    python train.py config/train_mdlm.py --dataset=text

Text and tokens pass through memory, about 40 bytes for every byte of text; for a larger text there is
data/openwebtext/prepare.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename
from data import tools


def prepare(out, *,
            input: Filename = '',  # the text
            tokenizer: Filename = 'byte'):  # byte | char | gpt2 | a model, see hub/find.py
    tools.prepare_bytes(*tools.read_input(input), tokenizer, out)


main = tools.script_of(prepare, __doc__, __name__)
