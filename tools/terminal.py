"""
A canvas in the terminal while it is written, for `sample.py --watch`.
"""
import sys
import time

PAUSE = 0.05  # seconds between two pictures


def show(old, new, tokenizer):
    """Draw a canvas (L,) over the last one in the terminal: masks dim, tokens new since `old` bright. Where
    there is no terminal: a line."""
    if not sys.stdout.isatty():
        return print(tokenizer.decode(new).replace('\n', ' '), flush=True)
    text = ''
    for before, after in zip(old, new):
        char = tokenizer.decode([after])
        text += f'\033[2m{char}\033[0m' if after == tokenizer.vocab_size else \
            f'\033[1;32m{char}\033[0m' if before != after else char
    print('\033[H\033[J' + text, flush=True)
    time.sleep(PAUSE)
