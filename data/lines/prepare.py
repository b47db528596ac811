"""
A text whose every line is an example, in byte pairs learned from the text itself:
writes train.bin, val.bin (uint16, the last tenth of the lines) and meta.json beside this file.

    python data/lines/prepare.py --input=stories.txt --vocab_size=512

    python train.py config/train_mdlm.py --dataset=lines

A line becomes the ids <bos> tokens <eos>, and a split is its lines one behind the other. Empty lines and
lines of spaces are left out. The vocabulary (four marks, the bytes that occur, byte pairs) is learned from
the training lines alone, so validation may contain <unk>. A digit is always a token of its own.
"""
import collections
import heapq
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import Filename, Range, fail
from data import tools
from text.vocabulary import MARKS, WORDS, Tokenizer, library

Size = Annotated[int, Range(lambda n: n <= 2 ** 16, f"is more than uint16 can tell apart, {2 ** 16}")]


def join(word, pair, new):
    """word, a list of ids, with `new` for every pair (left, right) in it, from the left."""
    out = []
    for i in word:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def train_bpe(lines, vocab_size):
    """Texts -> at most vocab_size - len(MARKS) pieces (bytes): the single bytes that occur, then, again and
    again, the two neighbours that occur together most often (of equals, the older ones) joined to one piece.
    It stops early when no pair occurs twice. The script ends if not even the bytes find room.

    Neighbours are counted within WORDS, and a merge recounts only the words that hold its pair.
    """
    library('tiktoken', "a vocabulary of byte pairs")
    import regex  # tiktoken depends on it
    counts = collections.Counter(word for line in lines for word in regex.findall(WORDS, line))
    pieces = [bytes([b]) for b in sorted({b for word in counts for b in word.encode()})]
    room = vocab_size - len(MARKS)
    if room < len(pieces):
        fail(f"vocab_size={vocab_size} is too small: this text takes at least {len(MARKS) + len(pieces)}, "
             f"{len(MARKS)} marks and {len(pieces)} bytes")
    index = {piece[0]: i for i, piece in enumerate(pieces)}
    words = [([index[b] for b in word.encode()], n) for word, n in counts.items()]
    pairs, where = collections.Counter(), collections.defaultdict(set)
    changed, heap = set(), []

    def count(w, sign):
        word, n = words[w]
        for pair in pairwise(word):
            pairs[pair] += sign * n
            where[pair].add(w)
            changed.add(pair)

    for w in range(len(words)):
        count(w, 1)
    while len(pieces) < room:
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
        changed.clear()
        while heap and -heap[0][0] != pairs[heap[0][1]]:  # counted anew since
            heapq.heappop(heap)
        if not heap or heap[0][0] > -2:
            break
        _, (left, right) = heapq.heappop(heap)
        for w in where.pop((left, right)):
            count(w, -1)
            words[w] = join(words[w][0], (left, right), len(pieces)), words[w][1]
            count(w, 1)
        pieces.append(pieces[left] + pieces[right])
    return pieces


def prepare(out, *,
            input: Filename = '',  # the text
            vocab_size: Size = 512):  # marks, bytes and byte pairs together, at most
    data, source = tools.read_input(input)
    lines = [line for line in tools.decode(data, source).split('\n') if line.strip()]
    if len(lines) < 10:
        fail(f"{source} has {len(lines)} lines that are not empty: too few, 10 are the least")
    n = len(lines) - len(lines) // 10
    pieces = train_bpe(lines[:n], vocab_size)
    meta = dict(kind='bpe', pieces=[piece.decode('latin-1') for piece in pieces])
    tokenizer = Tokenizer(meta)
    examples = [tokenizer.stream(line) for line in lines]
    tokens = {split: [i for example in part for i in example]
              for split, part in (('train', examples[:n]), ('val', examples[n:]))}
    tools.write_splits(out, tokens, meta, source, data)
    mean = sum(map(len, examples)) / len(lines)
    print(f"{source}: {len(lines):,} lines, "
          f"{sum(map(len, lines)) / len(lines) / (mean - 2):.2f} characters per token, "
          f"a vocabulary of {tokenizer.vocab_size:,}; {tools.sizes(tokens, 'tokens')}; the longest line has "
          f"{max(map(len, examples)):,}, the mean {mean:.1f}, <bos> and <eos> included")


main = tools.script_of(prepare, __doc__, __name__)
