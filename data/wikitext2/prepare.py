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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename
from data import tools
from hub import web
from text import files

NAME = 'wikitext-2-raw-v1.zip'
SHA256 = 'ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11'


def prepare(out, *,
            train: Filename = '',  # text files instead of the download; a split that is not given is left out
            valid: Filename = '',  # becomes val.bin
            test: Filename = '',  # becomes test.bin
            tokenizer: Filename = 'gpt2'):  # gpt2 | byte | char | a model, see hub/find.py
    paths = dict(train=train, val=valid, test=test)
    source = ', '.join(Path(path).name for path in paths.values() if path) or NAME
    if any(paths.values()):
        data = {split: files.read_bytes(path, split) for split, path in paths.items() if path}
    else:
        there = Path(out, NAME)
        web.fetch(web.address('ggml-org/ci', NAME), there, SHA256,
                  otherwise="give files with --train= --valid= --test=")
        data = {split: web.unzip(there, f'wikitext-2-raw/wiki.{dict(val="valid").get(split, split)}.raw')
                for split in paths}
    texts = {split: tools.decode(part, f'{source} ({split})') for split, part in data.items()}
    tools.prepare_text(texts, tokenizer, out, source, *data.values())


main = tools.script_of(prepare, __doc__, __name__)
