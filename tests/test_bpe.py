"""Byte pairs learned from a text, and the dataset whose every line is an example."""
import collections
import json
import random
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import regex

from conftest import TEXT
from data.lines import prepare
from text.vocabulary import BOS, EOS, MARKS, PAD, UNK, WORDS, Tokenizer

AWKWARD = ['naïve café, déjà vu — naïve café', '🤷🏽 👩\u200d👧 🤷🏽 🇩🇪', '漢字かな 漢字',
           'e\u0301 e\u0301 ' + 'ab' * 400, '\ttabs\t\tand  two   three spaces  ',
           'room 101, 2024-05-20, +49 30 1234567',
           'She isn\'t "here"; she\'s gone.']
LINES = AWKWARD + TEXT.splitlines()[:40]


def tokenizer_of(pieces):
    return Tokenizer(dict(kind='bpe', pieces=[piece.decode('latin-1') for piece in pieces]))


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizer_of(prepare.train_bpe([*LINES, '\n'], 400))


def slow_encode(tokenizer, text):
    """One merge at a time: of all neighbours that form a piece, the pair of the lowest id, the leftmost."""
    ids, index = [], {piece: i for i, piece in enumerate(tokenizer.pieces) if i not in MARKS}
    for word in regex.findall(WORDS, text):
        parts = [bytes([b]) for b in word.encode()]
        while found := [(index[a + b], at) for at, (a, b) in enumerate(pairwise(parts))
                        if a + b in index]:
            _, at = min(found)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids += [index[part] for part in parts]
    return ids


def slow_train(lines, vocab_size):
    """The trainer that spells and counts every word of every line anew for every merge."""
    words = [[bytes([b]) for b in word.encode()]
             for line in lines for word in regex.findall(WORDS, line)]
    pieces = sorted({b for word in words for b in word})
    while len(pieces) < vocab_size - 4:
        pairs = collections.Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], *map(pieces.index, pair)), default=None)
        if pairs[best] < 2:
            break
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
        pieces.append(best[0] + best[1])
    return pieces


# ---- the tokenizer ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('text', [*AWKWARD, '', '   ', '\n\t', '1 2  3', TEXT[:500]])
def test_text_comes_back_its_bytes_are_counted_and_ids_are_those_of_the_slow_encoder(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.n_bytes(ids) == len(text.encode())
    assert ids == slow_encode(tokenizer, text) and not set(ids) & set(MARKS)
    assert all(type(i) is int and i < tokenizer.vocab_size for i in ids)


def test_the_marks_come_first_and_only_eos_is_text_the_end_of_a_line(tokenizer):
    assert (BOS, EOS, PAD, UNK) == (0, 1, 2, 3) and tokenizer.pieces[:3] == [b'', b'\n', b'']
    assert (tokenizer.bos, tokenizer.end) == (BOS, EOS)
    ids = tokenizer.encode('the question')
    framed = [BOS, *ids, EOS, PAD, PAD, tokenizer.vocab_size]
    assert tokenizer.decode(framed) == 'the question\n░' and tokenizer.n_bytes(framed[:-1]) == 13
    assert Tokenizer({'kind': 'byte'}).bos is None
    assert Tokenizer({'kind': 'char', 'chars': ['a']}).bos is None


def test_an_unknown_character_is_one_unk_and_counts_one_byte(tokenizer):
    assert tokenizer.encode('~€~') == [UNK] * 3
    ids = tokenizer.encode('to~ 漢Ω字 be')
    assert ids.count(UNK) == 2 and tokenizer.decode(ids) == 'to\ufffd 漢\ufffd字 be'
    assert tokenizer.n_bytes(ids) == len('to 漢字 be'.encode()) + 2
    assert tokenizer.piece(UNK) == '\ufffd' and tokenizer.encode('\ud800') == [UNK]


def test_a_character_that_never_occurred_is_spelled_where_its_bytes_are_known(tokenizer):
    seen = {b for line in LINES for b in line.encode()}
    new, = [c for c in map(chr, range(0x4e00, 0x9fff)) if c not in '漢字' and seen >= set(c.encode())][:1]
    ids = tokenizer.encode(new)
    assert len(ids) > 1 and UNK not in ids and tokenizer.decode(ids) == new


def test_every_digit_is_a_token_of_its_own():
    tokenizer = tokenizer_of(prepare.train_bpe(['room 101 101, a1b 11 ¼ ¼ 10 10'] * 20, 500))
    assert not [piece for piece in tokenizer.pieces if re.search(rb'\d', piece) and len(piece) > 1]
    assert [tokenizer.piece(i) for i in tokenizer.encode('room  101')] == ['room', ' ', ' ', '1', '0', '1']
    assert '¼' in map(tokenizer.piece, tokenizer.encode('a ¼')), "a space is glued to no number"


def test_a_word_keeps_one_space_before_it_and_a_contraction_its_apostrophe():
    tokenizer = tokenizer_of(prepare.train_bpe(["she isn't,  she isn't; _ 'she"] * 20, 500))
    assert [tokenizer.piece(i) for i in tokenizer.encode("she isn't;  she")] == \
        ['she', ' isn', "'t", ';', ' ', ' she']


def test_meta_survives_json(tokenizer):
    meta = json.loads(json.dumps(tokenizer.meta, ensure_ascii=False).encode())
    again = Tokenizer(meta)
    assert again.pieces == tokenizer.pieces and max(b''.join(again.pieces)) >= 0xf0
    for line in LINES:
        assert again.encode(line) == tokenizer.encode(line)


def test_without_tiktoken_it_is_one_line(tokenizer, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert 'pip install tiktoken' in mistake(lambda argv: Tokenizer(tokenizer.meta))


# ---- the trainer ------------------------------------------------------------------------------------------

def test_the_first_merge_is_the_most_frequent_pair_and_of_equals_the_smaller_bytes():
    assert prepare.train_bpe(['abcbc', 'bcab'], 8) == [b'a', b'b', b'c', b'bc']
    assert prepare.train_bpe(['cd ab', 'ab cd', 'cd cd'], 10)[-1] == b'cd'
    assert prepare.train_bpe(['cdcd', 'abab'], 9)[-1] == b'ab'


def test_merges_are_those_of_the_slow_trainer():
    assert prepare.train_bpe(LINES[:9], 150) == slow_train(LINES[:9], 150)


@pytest.mark.parametrize('seed', range(8))
def test_with_repeated_letters_too_and_every_piece_is_one_token_of_its_own_text(seed):
    draw = random.Random(seed)
    lines = [''.join(draw.choices('aab ', k=30)) for _ in range(20)]
    pieces = prepare.train_bpe(lines, 60)
    assert pieces == slow_train(lines, 60) and len(set(pieces)) == len(pieces)
    tokenizer = tokenizer_of(pieces)
    assert [tokenizer.encode(piece.decode()) for piece in pieces] == [[i + 4] for i in range(len(pieces))]
    assert all(tokenizer.encode(line) == slow_encode(tokenizer, line) for line in lines)


def test_the_vocabulary_is_never_larger_than_asked_for_and_ends_where_nothing_occurs_twice(mistake):
    for size in (7, 8, 9, 1000):
        assert len(prepare.train_bpe(['abab'] * 3 + ['c'], size)) + len(MARKS) == min(size, 9)
    assert prepare.train_bpe(['ab', 'cd'], 100) == [b'a', b'b', b'c', b'd']
    assert 'at least 7' in mistake(lambda argv: prepare.train_bpe(['abab', 'c'], 6))


# ---- the dataset ------------------------------------------------------------------------------------------

@pytest.fixture
def dataset(tmp_path):
    """bytes of a text, flags -> (the examples of every split as lists of ids, the tokenizer, the folder)."""
    def make(data, *flags):
        (tmp_path / 'my.txt').write_bytes(data)
        prepare.main([f'--input={tmp_path}/my.txt', f'--out={tmp_path}/a', *flags])
        splits = {}
        for split in ('train', 'val'):
            ids = np.fromfile(tmp_path / f'a/{split}.bin', np.uint16).tolist()
            starts = [i for i, token in enumerate(ids) if token == BOS]
            splits[split] = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)])]
            assert sum(map(len, splits[split])) == len(ids), "a split begins with <bos>"
        meta = json.loads((tmp_path / 'a/meta.json').read_text(encoding='utf-8'))
        return splits, Tokenizer(meta), tmp_path / 'a'
    return make


def test_every_line_is_an_example_between_bos_and_eos_and_the_last_tenth_is_for_validation(dataset, capsys):
    splits, tokenizer, _ = dataset('\n'.join(LINES).encode(), '--vocab_size=130')
    examples = splits['train'] + splits['val']
    assert len(splits['val']) == len(LINES) // 10 and len(examples) == len(LINES)
    assert all(e[0] == BOS and e[-1] == EOS and e[1:-1] == tokenizer.encode(line)
               for e, line in zip(examples, LINES))
    assert tokenizer.vocab_size == 130 and tokenizer.meta['source'] == 'my.txt'
    out, sizes = capsys.readouterr().out, list(map(len, examples))
    assert out.count('\n') == 1 and f'{len(LINES)} lines' in out and 'a vocabulary of 130;' in out
    assert f'{len("".join(LINES)) / (sum(sizes) - 2 * len(sizes)):.2f} characters per token' in out
    assert f"train {sum(sizes[:-4]):,} tokens, val {sum(sizes[-4:]):,} tokens" in out
    assert f"longest line has {max(sizes)}, the mean {sum(sizes) / len(sizes):.1f}" in out


def test_empty_lines_and_the_end_of_the_file_are_no_examples(dataset):
    lines = [f'a line of text {i}' for i in range(20)]
    plain = dataset('\n'.join(lines).encode())[0]
    assert len(plain['train']) == 18 and len(plain['val']) == 2
    for text in ('\n'.join(lines) + '\n', '\r\n'.join(lines), '\r\n'.join(lines) + '\r\n',
                 '\n\n' + '\n\n'.join(lines) + '\n\n\n', '\r\n \r\n\t\n'.join(lines) + '\n  '):
        assert dataset(text.encode())[0] == plain


def test_a_separator_inside_a_line_does_not_end_it(dataset):
    lines = ['one\x0btwo\u2028three\x85four' for _ in range(10)]
    splits, tokenizer, _ = dataset('\n'.join(lines).encode())
    assert [tokenizer.decode(e) for e in splits['train'] + splits['val']] == [line + '\n' for line in lines]


def test_the_vocabulary_knows_nothing_of_validation(dataset):
    lines = ['to be or not'] * 18 + ['to be € 5'] * 2
    splits, tokenizer, _ = dataset('\n'.join(lines).encode(), '--vocab_size=30')
    assert tokenizer.meta['pieces'] == [p.decode() for p in prepare.train_bpe(lines[:18], 30)]
    assert [tokenizer.decode(e) for e in splits['val']] == ['to be \ufffd \ufffd\n'] * 2
    assert [e.count(UNK) for e in splits['val']] == [2] * 2


def test_an_earlier_test_split_goes(dataset):
    text = b'be or not to be\n' * 10
    _, tokenizer, folder = dataset(text)
    (folder / 'test.bin').touch()
    assert tokenizer.vocab_size < 512
    splits, _, _ = dataset(text)
    assert len(splits['val']) == 1
    assert sorted(path.name for path in folder.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('data, flags, words', [
    (TEXT.encode(), ['--vocab_size=65537'], 'uint16'),
    (TEXT.encode(), ['--vocab_size=20'], f'at least {3 + len(set(TEXT))}'),  # 4 marks, no newline
    (TEXT.encode(), ['--vocab_size=-1'], 'at least'),
    (TEXT.encode(), ['--vocab_size=many'], 'vocab_size'),
    (TEXT.encode(), ['--input='], '--input'),
    (TEXT.encode(), ['--input=none.txt'], 'none.txt'),
    (b'\xe4\n' * 200, [], 'UTF-8'),
    (b'a line of text, and a long one\n\n' * 9, [], '9 lines'),
    (b'\n' * 200, [], '0 lines'),
])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, mistake, data, flags, words):
    (tmp_path / 'my.txt').write_bytes(data)
    assert words in mistake(prepare.main, f'--input={tmp_path}/my.txt', f'--out={tmp_path}/a', *flags)
    assert not (tmp_path / 'a').exists()
