"""
GSM8K (arXiv 2110.14168), or any prompts and answers in a JSONL file:
writes train.bin, val.bin, test.bin (ids) and meta.json beside this file.

    python data/gsm8k/prepare.py --tokenizer=FOLDER               # downloads 5 MB; GPT-2's byte pairs: gpt2
    python data/gsm8k/prepare.py --train=train.jsonl --test=test.jsonl
    python data/gsm8k/prepare.py --train=mine.jsonl --prompt=input --answer=output --before="" --sep=" ->"

    python train.py config/sft_gsm8k.py

A split is prompt <end> answer <end> prompt <end> ... (pairs.py); <end> is the tokenizer's. val.bin is the
last twentieth of the training file. The <<48/2=24>> of GSM8K's answers are left out. Take the tokenizer of
the model that is to be fine-tuned.

Source: github.com/openai/grade-school-math.
"""
import json
import re
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, Range, fail
from data import tools
from hub import web
from text import files
from text.vocabulary import Tokenizer

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/'
Separator = Annotated[str, Range(bool, "must not be empty: it is where an answer begins")]


def read_pairs(data, source, prompt='question', answer='answer', before='Q: '):
    """JSONL bytes with these two fields -> [(prompt, answer)], or the script ends and names the line."""
    pairs = []
    for number, line in enumerate(tools.decode(data, source).split('\n'), 1):
        if not line.strip():
            continue
        try:
            pair = [json.loads(line)[field].strip() for field in (prompt, answer)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pair = ['', '']
        if not all(pair):
            fail(f"{source}, line {number} is no JSON object with texts in the fields {prompt!r} and "
                 f"{answer!r}, which --prompt= and --answer= name")
        pairs.append((before + pair[0], ' ' + re.sub(r'<<[^<>=]*=[^<>]*>>', '', pair[1]).strip()))
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


def prepare(out, *,
            train: Filename = '',  # a JSONL file instead of the download; its end becomes val.bin
            test: Filename = '',  # becomes test.bin; without it and with --train= there is none
            prompt: str = 'question',  # the field that holds a prompt
            answer: str = 'answer',  # the field that holds its answer
            before: str = 'Q: ',  # what stands before every prompt
            sep: Separator = '\nA:',  # what stands between prompt and answer
            tokenizer: Filename = 'gpt2'):  # gpt2 | byte | a model, see hub/find.py
    meta = tools.meta_of(tokenizer) | dict(before=before, sep=sep)
    tokens_of = Tokenizer(meta)
    if tokens_of.end is None:
        fail(f"tokenizer={tokenizer} has no mark for the end of an answer: gpt2 has one, and those of models")
    paths = dict(train=train, test=test)
    for split in paths:
        if not paths[split] and not train:
            paths[split] = Path(out, f'{split}.jsonl')
            web.fetch(f'{URL}{split}.jsonl', paths[split], otherwise="give files with --train= --test=")
    paths = {split: path for split, path in paths.items() if path}
    data = {split: files.read_bytes(path, split) for split, path in paths.items()}
    pairs = {split: read_pairs(data[split], Path(path).name, prompt, answer, before)
             for split, path in paths.items()}
    n = len(pairs['train']) - max(1, len(pairs['train']) // 20)
    pairs |= dict(train=pairs['train'][:n], val=pairs['train'][n:])
    tokens = {split: stream(part, tokens_of) for split, part in pairs.items()}
    source = ', '.join(Path(path).name for path in paths.values())
    tools.write_splits(out, tokens, meta, source, *data.values())
    lengths = sorted(len(stream([pair], tokens_of)) for pair in pairs['train'])
    print(f"{source}: {tools.sizes(pairs, 'pairs')}; a vocabulary of {tokens_of.vocab_size:,}; a pair "
          f"has {sum(lengths) / n:.0f} tokens in the mean, {lengths[-1]} the longest")


main = tools.script_of(prepare, __doc__, __name__)
