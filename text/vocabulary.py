"""
Text <-> token ids: characters, bytes, byte pairs.

The meta.json of a dataset says what its ids mean, a checkpoint carries that along, and `Tokenizer` reads it.
Byte pairs run in tiktoken: of all neighbours that make a known piece it joins those of the lowest id first. A
list of merges (arXiv 1508.07909) says the same if the merges stand in the order of their ids, as in the
tokenizer.json of GPT-2, SmolLM2 and LLaMA-3. Others are refused.
"""
import base64
import importlib
import itertools
import unicodedata

import numpy as np
import torch

from configurator import fail

MARKS = BOS, EOS, PAD, UNK = range(4)  # of kind 'bpe': begin and end of a text, padding, unknown character
WORDS = r"[ ']?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # no byte pair of kind 'bpe' crosses a word
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the same where every digit is cut out first: the space before one stays alone
GPT2_WORDS_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """Text <-> token ids, as a `meta.json` says:
    {'kind': 'char', 'chars': [...]}, one id a character; {'kind': 'byte'}, the 256 bytes of UTF-8;
    {'kind': 'gpt2'}, the 50,257 byte pairs of GPT-2;
    {'kind': 'bpe', 'pieces': [...]}, MARKS, then byte pairs of the dataset itself;
    {'kind': 'json', 'json': {...}, 'vocab_size': V, 'end': id}, byte pairs of a tokenizer.json;
    {'kind': 'sentencepiece', 'model': base64, 'vocab_size': V, 'end': id}, a tokenizer.model.

    encode       text -> list of ids; the name of a special token is text like any other
    encode_rest  the same for a text that continues another one
    vocab_size   how many ids there are
    end          id of <|endoftext|>, which preparers write between documents, or of <eos>; or None
    bos          id of <bos> if every line of the dataset is a text of its own, [bos] ... [end]; or None
    first        id that every text begins with when one is written: <bos>, or <|endoftext|> where a model of
                 others has seen every text begin so; or None
    sep          ids between prompt and answer if the dataset is made of pairs (pairs.py); or None
    """

    def __init__(self, meta):
        self.meta, kind = meta, meta.get('kind')
        kinds = dict(char=char_tokens, byte=byte_tokens, gpt2=gpt2_tokens, bpe=bpe_tokens, json=json_tokens,
                     sentencepiece=sentencepiece_tokens)
        if kind not in kinds:
            fail(f"tokenizer kind {kind!r} is not one of: {', '.join(kinds)}")
        try:
            self.pieces, self.encode, self.end = kinds[kind](meta)  # pieces: the bytes of every id
            self.bos, self.lead, self.encode_rest = BOS if kind == 'bpe' else None, '', self.encode
            if kind == 'sentencepiece':
                self.lead, self.encode_rest = without_lead(self.encode, self.pieces)
            self.first = self.end if meta.get('first') else self.bos
            self.sep = self.encode_rest(meta['sep']) if 'sep' in meta else None
            self.vocab_size = len(self.pieces)
            self.lengths = np.array([len(piece) for piece in self.pieces])
            if kind == 'bpe':
                self.lengths[UNK] = 1
            elif self.end is not None and is_mark(meta, self.end):
                self.lengths[self.end] = 0
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            fail(f"the description of the tokens, of kind {kind}, is damaged ({type(e).__name__}: {e}): "
                 f"prepare the dataset again, or get the model again")
        if self.sep == []:
            fail(f"sep={meta['sep']!r} is nothing in the tokens of this model")

    def stream(self, text):
        """The ids of a text as a dataset holds them: where every line is a text of its own, those of its
        lines that are not empty, each between bos and end."""
        if self.bos is None:
            return self.encode(text)
        lines = [line for line in text.split('\n') if line.strip()]
        return [i for line in lines for i in (self.bos, *self.encode(line), self.end)]

    def decode(self, ids, blank='░'):
        """Ids -> text. An id beyond the vocabulary, a masked or unwritten position, becomes `blank`; bytes
        that are no UTF-8, such as half a character, become U+FFFD."""
        blank = blank.encode()  # joined as bytes: a broken character before it does not swallow it
        pieces = (self.pieces[i] if i < self.vocab_size else blank for i in ids)
        return b''.join(pieces).decode(errors='replace')

    def text(self, ids):
        """The same for the ids of a whole text: without the space that some tokenizers put before it."""
        return self.decode(ids).removeprefix(self.lead)

    def piece(self, i):
        """The text of the single id i, for display."""
        return self.decode([i])

    def n_bytes(self, ids):
        """How many bytes of UTF-8 the ids (any shape, all below vocab_size) stand for: <|endoftext|> 0, since
        it is no text; <eos> 1, the end of a line; an unknown character 1, the fewest it can have."""
        return int(self.lengths[np.asarray(ids, np.int64)].sum())


def is_mark(meta, end):
    """Is the end of a text a token of its own? In a tokenizer.json it may be an ordinary piece."""
    return meta['kind'] != 'json' or any(t.get('id') == end for t in meta['json'].get('added_tokens', []))


def file_type(vocab_size):
    """The type of ids in the files of a dataset: uint16, or uint32 for a large vocabulary."""
    return np.uint16 if vocab_size <= 2 ** 16 else np.uint32


def as_ids(tokens):
    """Tokens as `load_tokens` holds them -> int64 ids. In int16 the large ones are negative."""
    return tokens.long() & 0xFFFF if tokens.dtype == torch.int16 else tokens.long()


# ---- every kind: meta -> (bytes of every id, function text -> ids, id of the end of a text) -------------

def unknown_characters(characters):
    fail(f"not in the vocabulary of this model: {' '.join(map(repr, sorted(characters)[:10]))}")


def char_tokens(meta):
    """One id a character. A character outside the vocabulary ends the script, which names it."""
    ids = {c: i for i, c in enumerate(meta['chars'])}

    def encode(text):
        unknown = set(text) - ids.keys()
        return unknown_characters(unknown) if unknown else [ids[c] for c in text]
    return [c.encode() for c in meta['chars']], encode, None


def byte_tokens(meta):
    """One id a byte of UTF-8."""
    return [bytes([i]) for i in range(256)], lambda text: list(text.encode(errors='replace')), None


def library(name, what):
    """A library that is needed for `what`, or the script ends."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        fail(f"{what} needs {name} ({e}): pip install {name.split('.')[0]}")


def gpt2_tokens(meta):
    """GPT-2's byte pairs. tiktoken downloads them once, or reads them from TIKTOKEN_CACHE_DIR."""
    tiktoken = library('tiktoken', "the vocabulary of GPT-2")
    try:
        encoding = tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as e:  # no connection, or a file with another checksum
        fail(f"tiktoken cannot get the vocabulary of GPT-2 ({type(e).__name__}): go online once, "
             f"or set TIKTOKEN_CACHE_DIR to a folder where it has been before")
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    pieces += [b''] * (meta.get('vocab_size', 0) - len(pieces))  # padding of others
    return pieces, encoding.encode_ordinary, encoding.eot_token


def bpe_tokens(meta):
    """MARKS, then meta['pieces'] in the order of their merges (bytes, as latin-1 strings in JSON). A
    character with a byte that is no piece becomes UNK."""
    marks = [b'', b'\n', b'', '\ufffd'.encode()]
    pieces = [piece.encode('latin-1') for piece in meta['pieces']]
    ranks = {piece: i for i, piece in enumerate(pieces, len(MARKS))}
    return marks + pieces, byte_pairs(WORDS, ranks, [UNK]), EOS


def byte_pairs(words, ranks, unknown):
    """The function text -> ids for byte pairs {piece: id}, none of which crosses a word. unknown: the ids
    for a character with a byte that is no piece."""
    tiktoken = library('tiktoken', "a vocabulary of byte pairs")
    encoding = tiktoken.Encoding('pairs', pat_str=words, mergeable_ranks=ranks, special_tokens={})
    able = {b for b in range(256) if bytes([b]) in ranks}

    def encode(text):
        text, ids = text.encode(errors='replace').decode(), []
        if able.issuperset(text.encode()):
            return encoding.encode_ordinary(text)
        for known, run in itertools.groupby(text, lambda c: able.issuperset(c.encode())):
            run = ''.join(run)
            ids += encoding.encode_ordinary(run) if known else unknown * len(run)
        return ids
    return encode


# ---- the tokenizers of other models -----------------------------------------------------------------------

def refuse(what):
    fail(f"the tokenizer.json {what}: byte-level byte pairs (GPT-2, SmolLM2, LLaMA-3) are what can be read")


def byte_letters():
    """The letters that stand for the 256 bytes in tokenizer.json and vocab.json: {letter: byte}. Bytes that
    print stand for themselves, the others are the letters from U+0100 on (GPT-2)."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printing)
    return {chr(b): b for b in printing} | {chr(256 + i): b for i, b in enumerate(others)}


def words_of(pre):
    """The `pre_tokenizer` of a tokenizer.json -> the regular expression of its words, or the script ends."""
    steps = pre['pretokenizers'] if pre and pre['type'] == 'Sequence' else [pre or {'type': None}]
    kinds, first, last = [step['type'] for step in steps], steps[0], steps[-1]
    if last['type'] == 'ByteLevel' and not last.get('add_prefix_space'):
        by_regex = last.get('use_regex', True)
        if kinds == ['ByteLevel'] and by_regex:
            return GPT2_WORDS
        if kinds == ['Digits', 'ByteLevel'] and first.get('individual_digits') and by_regex:
            return GPT2_WORDS_DIGITS
        if kinds == ['Split', 'ByteLevel'] and not by_regex and first['behavior'] == 'Isolated' and \
                not first.get('invert') and (regex := first['pattern'].get('Regex')):
            return rf'{regex}|(?:(?!{regex})[\s\S])+'  # what it leaves out is a word, too
    refuse(f"cuts words in a way that is not known here ({', '.join(map(str, kinds))})")


def json_tokens(meta):
    """The byte pairs of a tokenizer.json; other kinds end the script. An id that it leaves out has no bytes.
    A character with a byte that is no piece (SmolLM2 lacks some control characters) is left out."""
    source, V = meta['json'], meta['vocab_size']
    try:
        model, letters = source['model'], byte_letters()
        odd = {name: model.get(name) for name in ('byte_fallback', 'dropout', 'continuing_subword_prefix',
                                                  'end_of_word_suffix')}
        normalizer = source.get('normalizer')
        composed = normalizer == dict(type='NFC')  # Qwen's
        odd |= dict(normalizer=None if composed else normalizer, type=model.get('type'))
        if any(value not in (None, False, '', 'BPE') for value in odd.values()):
            refuse(f"has {', '.join(f'{name}={value}' for name, value in odd.items() if value)}")
        added = {token['id']: token['content'].encode() for token in source.get('added_tokens', [])
                 if token['id'] < V}  # others have no row in the embedding
        ranks = {bytes(letters[c] for c in piece): i for piece, i in model['vocab'].items()
                 if i not in added}
        pieces = {i: piece for piece, i in ranks.items()}
        if not all(type(i) is int for i in pieces) or len(pieces) < len(ranks):
            refuse("gives an id to two pieces, or one that is no number")
        merges = (m.split(' ') if isinstance(m, str) else m for m in model['merges'])
        joined = [model['vocab'][left + right] for left, right in merges]
        encode = byte_pairs(words_of(source.get('pre_tokenizer')), ranks, [])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        refuse(f"is damaged ({e!r})")
    made = {i for i, piece in pieces.items() if len(piece) > 1}
    if joined != sorted(joined) or not (model.get('ignore_merges') or made <= set(joined)):
        refuse("has ids in another order than its merges, or pieces without one")
    if max(pieces, default=0) >= V:
        refuse(f"has id {max(pieces)}, the model a vocabulary of {V}")
    pieces |= added
    nfc = lambda text: encode(unicodedata.normalize('NFC', text))
    return [pieces.get(i, b'') for i in range(V)], nfc if composed else encode, meta['end']


def sentencepiece_tokens(meta):
    """A tokenizer.model of SentencePiece: it puts a space before every text and may replace characters."""
    sentencepiece = library('sentencepiece', "a tokenizer.model")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(meta['model']))
        processor.piece_size()
    except (RuntimeError, ValueError) as e:
        fail(f"the tokenizer.model is damaged: {e}")
    V = meta['vocab_size']

    def piece(i):
        if i >= len(processor) or processor.is_control(i):
            return b''
        text = processor.id_to_piece(i)
        return bytes([int(text[3:5], 16)]) if processor.is_byte(i) else text.replace('\u2581', ' ').encode()

    def encode(text):
        ids = processor.encode(text.encode(errors='replace').decode())
        if max(ids, default=0) >= V:
            fail(f"the tokenizer.model has id {max(ids)}, the model a vocabulary of {V}")
        return ids
    return [piece(i) for i in range(V)], encode, meta['end']


def without_lead(encode, pieces):
    """encode of SentencePiece -> (what it puts before every text, ' ' or nothing; how to encode a text that
    continues another one: without that space, but with the spaces that the text itself begins with)."""
    around = b''.join(pieces[i] for i in encode('a'))
    lead = ' ' if around.startswith(b' ') else ''
    if around.endswith(b' '):
        fail("the tokenizer.model puts spaces behind words, which is not known here")

    def encode_rest(text):
        if lead and text.startswith(lead) and text.strip():  # the space before the text is this one
            return encode(text[1:])
        for mark in ('\n', '.', '"'):  # encoded behind something that it does not join with
            ids, left = encode(mark + text), encode(mark)
            if left and ids[:len(left)] == left:
                return ids[len(left):]
        return encode(text)
    return lead, encode_rest
