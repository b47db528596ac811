"""
GSM8K (arXiv 2110.14168), or any prompts and answers in a JSONL file:
writes train.bin, val.bin, test.bin (ids) and meta.json beside this file.

    python data/gsm8k/prepare.py --tokenizer=FOLDER               # downloads 5 MB; GPT-2's byte pairs: gpt2
    python data/gsm8k/prepare.py --train=train.jsonl --test=test.jsonl
    python data/gsm8k/prepare.py --train=mine.jsonl --prompt=input --answer=output --before="" --sep=" ->"

    python train.py config/sft_gsm8k.py

A split is prompt <end> answer <end> prompt <end> ... (pairs.py); <end> is the tokenizer's. val.bin is the
end of the training file. The tokenizer is that of the model that is to be fine-tuned.

Source: github.com/openai/grade-school-math.
"""
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from text import files  # noqa: E402
from configurator import Filename, fail, script  # noqa: E402
from data import tools  # noqa: E402
from hub import web  # noqa: E402
from text.vocabulary import Tokenizer  # noqa: E402

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/'


@dataclass
class Config:
    train: Filename = ''  # a JSONL file instead of the download; its end becomes val.bin
    test: Filename = ''  # becomes test.bin; without it and with --train= there is none
    prompt: str = 'question'  # the field that holds a prompt
    answer: str = 'answer'  # the field that holds its answer
    before: str = 'Q: '  # what stands before every prompt
    sep: str = '\nA:'  # what stands between prompt and answer
    calculator: bool = False  # keep the <<48/2=24>> of GSM8K's answers
    val_share: float = 0.05  # of the training pairs, the last ones, for validation
    tokenizer: Filename = 'gpt2'  # gpt2 | byte | a model (pretrained.py), whose tokenizer it is
    out: Filename = str(HERE)  # where the files go

    def __post_init__(self):
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share={self.val_share} must lie between 0 and 1")
        if not self.sep:
            raise ValueError("sep must not be empty: it is where an answer begins")


def read_pairs(data, source, config):
    """JSONL bytes -> [(prompt, answer)], or the script ends and names the line."""
    pairs = []
    for number, line in enumerate(tools.decode(data, source).split('\n'), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            prompt, answer = item[config.prompt], item[config.answer]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            why = f"has no field {e}" if type(e) is KeyError else "is no JSON object"
            fail(f"{source}, line {number} {why}: --prompt= and --answer= name the fields")
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
            fail(f"{source}, line {number}: {config.prompt} and {config.answer} must be texts that are not "
                 f"empty")
        if not config.calculator:
            answer = re.sub(r'<<[^<>=]*=[^<>]*>>', '', answer)
        pairs.append((config.before + prompt.strip(), ' ' + answer.strip()))
    if len(pairs) < 2:
        fail(f"{source} holds {len(pairs)} pairs: too few, one to train on and one to validate are needed")
    return pairs


def stream(pairs, tokenizer):
    """Pairs of texts -> prompt <end> answer <end> ... (pairs.py), or the script ends."""
    out = []
    for prompt, answer in pairs:
        for ids in (tokenizer.encode(prompt), tokenizer.encode_rest(answer)):
            if tokenizer.end in ids:
                fail(f"the token that ends an answer, {tokenizer.piece(tokenizer.end)!r}, is also one of "
                     f"{prompt[:40]!r}: this tokenizer has no mark of its own")
            out += [*ids, tokenizer.end]
    return out


def main(argv):
    config = tools.settings(argv, __doc__, Config)
    paths = {split: path for split, path in (('train', config.train), ('test', config.test)) if path}
    for split in () if config.train else {'train', 'test'} - paths.keys():
        paths[split] = Path(config.out, f'{split}.jsonl')
        web.fetch(f'{URL}{split}.jsonl', paths[split], otherwise="give files with --train= --test=")
    paths = dict(sorted(paths.items(), reverse=True))
    meta = tools.meta_of(config.tokenizer) | dict(before=config.before, sep=config.sep)
    tokenizer = Tokenizer(meta)
    if tokenizer.end is None:
        fail(f"tokenizer={config.tokenizer} has no mark for the end of an answer: gpt2 has one, and those "
             f"of models")
    data = {split: files.read_bytes(path, split) for split, path in paths.items()}
    texts = {split: read_pairs(data[split], Path(path).name, config) for split, path in paths.items()}
    n = len(texts['train']) - max(1, int(config.val_share * len(texts['train'])))
    texts = texts | dict(train=texts['train'][:n], val=texts['train'][n:])
    meta |= dict(source=', '.join(Path(path).name for path in paths.values()),
                 sha256=hashlib.sha256(b''.join(data.values())).hexdigest())
    tokens = {split: stream(pairs, tokenizer) for split, pairs in texts.items()}
    tools.write_splits(config.out, tokens, meta)
    lengths = sorted(len(stream([pair], tokenizer)) for pair in texts['train'])
    counts = ', '.join(f"{split} {len(pairs):,} pairs" for split, pairs in texts.items())
    print(f"{meta['source']}: {counts}; a vocabulary of {tokenizer.vocab_size:,}; a pair has "
          f"{sum(lengths) / n:.0f} tokens in the mean, {lengths[int(0.99 * n)]} the longest but one in a "
          f"hundred, {lengths[-1]} the longest")


if __name__ == '__main__':
    script(main)
