"""
Given texts: from the command line, or FILE:path, what that file holds.
"""
import os

from configurator import fail
from text import files
from text.vocabulary import UNK, unknown_characters


def prompt_of(text):
    """A given text."""
    if not text.startswith('FILE:'):
        return text
    return files.read_text(os.path.expanduser(text[5:])).removesuffix('\n')


def starts(text):
    """The given starts: of FILE:path the lines that are not empty, else the text itself."""
    if not text.startswith('FILE:'):
        return [text]
    lines = [line for line in prompt_of(text).split('\n') if line.strip()]
    return lines or fail(f"{text[5:]} holds no start")


def ids_of(tokenizer, text, rest=False):
    """The ids of a given text (rest: of one that goes on where another ended); characters that a model of
    lines does not know end the script."""
    ids = tokenizer.encode_rest(text) if rest else tokenizer.encode(text)
    if tokenizer.bos is not None and UNK in ids:
        unknown_characters({c for c in text if UNK in tokenizer.encode(c)})
    return ids
