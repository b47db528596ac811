"""
GSM8K (arXiv 2110.14168), or any prompts and answers in a JSONL file:
writes train.bin, val.bin, test.bin (ids) and meta.json beside this file.

    python data/gsm8k/prepare.py --tokenizer=FOLDER               # downloads 5 MB; GPT-2's byte pairs: gpt2
    python data/gsm8k/prepare.py --train=train.jsonl --test=test.jsonl
    python data/gsm8k/prepare.py --train=mine.jsonl --prompt=input --answer=output --before="" --sep=" ->"

    python train.py config/sft_gsm8k.py

A split is prompt <end> answer <end> prompt <end> ... (pairs.py); <end> is the tokenizer's. val.bin is the
end of the training file. Take the tokenizer of the model that is to be fine-tuned.

Source: github.com/openai/grade-school-math.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, Range, fail, script
from data import tools
from hub import web
from text import files
from text.vocabulary import Tokenizer

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/'
Separator = Annotated[str, Range(bool, "must not be empty: it is where an answer begins")]


@dataclass
class Config:
    train: Filename = ''  # a JSONL file instead of the download; its end becomes val.bin
    test: Filename = ''  # becomes test.bin; without it and with --train= there is none
    prompt: str = 'question'  # the field that holds a prompt
    answer: str = 'answer'  # the field that holds its answer
    before: str = 'Q: '  # what stands before every prompt
    sep: Separator = '\nA:'  # what stands between prompt and answer
    calculator: bool = False  # keep the <<48/2=24>> of GSM8K's answers
    val_share: tools.Part = 0.05  # of the training pairs, the last ones, for validation
    tokenizer: Filename = 'gpt2'  # gpt2 | byte | a model (hub/find.py), whose tokenizer it is
    out: Filename = ''  # where the files go; '': beside this file


def find_files(config):
    """{'train': path, 'test': path}, as they are given or downloaded; or the script ends."""
    paths = dict(train=config.train, test=config.test)
    for split in () if config.train else paths:
        if not paths[split]:
            paths[split] = Path(config.out, f'{split}.jsonl')
            web.fetch(f'{URL}{split}.jsonl', paths[split], otherwise="give files with --train= --test=")
    return {split: path for split, path in paths.items() if path}


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
    """Pairs of texts -> prompt <end> answer <end> ..., or the script ends."""
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
    paths = find_files(config)
    meta = tools.meta_of(config.tokenizer) | dict(before=config.before, sep=config.sep)
    tokenizer = Tokenizer(meta)
    if tokenizer.end is None:
        fail(f"tokenizer={config.tokenizer} has no mark for the end of an answer: gpt2 has one, and those "
             f"of models")
    data = {split: files.read_bytes(path, split) for split, path in paths.items()}
    pairs = {split: read_pairs(data[split], Path(path).name, config) for split, path in paths.items()}
    n = len(pairs['train']) - max(1, int(config.val_share * len(pairs['train'])))
    pairs |= dict(train=pairs['train'][:n], val=pairs['train'][n:])
    tokens = {split: stream(part, tokenizer) for split, part in pairs.items()}
    source = ', '.join(Path(path).name for path in paths.values())
    tools.write_splits(config.out, tokens, meta, source, *data.values())
    lengths = sorted(len(stream([pair], tokenizer)) for pair in pairs['train'])
    print(f"{source}: {tools.sizes(pairs, 'pairs')}; a vocabulary of {tokenizer.vocab_size:,}; a pair "
          f"has {sum(lengths) / n:.0f} tokens in the mean, {lengths[int(0.99 * n)]} the longest but one in "
          f"a hundred, {lengths[-1]} the longest")


if __name__ == '__main__':
    script(main)
