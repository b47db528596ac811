"""
Turns: a message -> the ids that ask a model, by the chat template that was published with it.

A template is a program in Jinja, run in a sandbox. Names of special tokens in what it writes are tokens,
names in a message are text: the template runs with a character in place of the message, its text is cut at
the names, and only then the message is put in. (A template that looks into the message sees the character.)
"""
import base64
import json
import re
import time
from pathlib import Path

from configurator import fail
from text import files
from text.vocabulary import library

ASKED, ANSWER = '\ufdd0', '\ufdd1'  # in place of a message and an answer; no text holds them, says Unicode
INSTEAD = "give the prompt with --start="


def config_in(folder):
    """tokenizer_config.json as a dict, {} if there is none."""
    return files.read_json(path) if (path := Path(folder, 'tokenizer_config.json')).is_file() else {}


def template_in(folder):
    """The chat template of the model in a folder, '' if it has none."""
    if (path := Path(folder, 'chat_template.jinja')).is_file():
        return files.read_text(path)
    found = config_in(folder).get('chat_template')
    if isinstance(found, list):  # several, each with a name
        found = {t.get('name'): t.get('template') for t in found if isinstance(t, dict)}.get('default')
    return found if isinstance(found, str) else ''


def marks_in(folder):
    """The special tokens that templates know by a name, dict(bos_token=..., eos_token=...); '': not said."""
    config = config_in(folder)
    name = lambda mark: name(mark.get('content')) if isinstance(mark, dict) else mark or ''
    return {key: name(config.get(key)) for key in ('bos_token', 'eos_token')}


def turn(tokenizer, message):
    """A message -> (ids of the prompt, up to where the model writes; list of the ids that end its answer),
    or the script ends. tokenizer: one whose meta holds, under `chat`, dict(template=..., **marks_in(folder)).

    SentencePiece puts its space before every text between special tokens, as transformers does with
    legacy=True; with legacy=False only a first text has it."""
    chat, tokens = tokenizer.meta.get('chat') or {}, special_tokens(tokenizer.meta, tokenizer.end)
    if not chat.get('template'):
        fail(f"this model has no chat template, so it was probably not trained on turns: {INSTEAD}")
    asked = lambda content: written(chat, [dict(role='user', content=content)], True)
    if (probe := f'"{ASKED}\n"') not in asked(probe):
        fail(f"the chat template of this model leaves the message out, or changes it: {INSTEAD}")
    ids, core = [], message.strip()  # templates trim, and some tokens swallow, the white space around it
    for text, i in cut(asked(message.replace(core, ASKED, 1) if core else message), tokens):
        ids += tokenizer.encode(text.replace(ASKED, core)) + ([] if i is None else [i])
    if max(ids, default=0) >= tokenizer.vocab_size:
        fail(f"the chat template of this model names token {max(ids)}, which is [MASK] or none: {INSTEAD}")
    whole = written(chat, [dict(role='user', content=ASKED), dict(role='assistant', content=ANSWER)], False)
    ends = [cut(whole.partition(ANSWER)[2], tokens)[0][1], tokenizer.end]
    return ids, [i for i in dict.fromkeys(ends) if i is not None and i < tokenizer.vocab_size]


def special_tokens(meta, end):
    """Special tokens as a tokenizer.json lists them, [dict(id=..., content=name)]. Of SentencePiece these
    are control pieces: user-defined ones, as Gemma's <start_of_turn>, come out of a message, too."""
    if meta['kind'] == 'json':
        return meta['json'].get('added_tokens', [])
    if meta['kind'] == 'sentencepiece':
        library_of = library('sentencepiece', "a tokenizer.model")
        model = library_of.SentencePieceProcessor(model_proto=base64.b64decode(meta['model']))
        return [dict(id=i, content=model.id_to_piece(i)) for i in range(len(model)) if model.is_control(i)]
    return [dict(id=end, content='<|endoftext|>')] if meta['kind'] == 'gpt2' else []


def cut(text, tokens):
    """What a template wrote -> [(text, id of the special token behind it)], the last id None."""
    tokens = sorted(tokens, key=lambda token: -len(token['content']))  # the longest of those at a place
    space = lambda token, side: r'\s*' if token.get(side) else ''  # which some swallow
    names = [f"{space(t, 'lstrip')}({re.escape(t['content'])}){space(t, 'rstrip')}" for t in tokens]
    parts, at = [], 0
    for found in re.finditer('|'.join(names) or '(?!)', text):
        parts.append((text[at:found.start()], tokens[found.lastindex - 1]['id']))
        at = found.end()
    return [*parts, (text[at:], None)]


def written(chat, messages, prompt):
    """What a template writes for messages, [dict(role=..., content=text)], and if `prompt` before an answer,
    given what transformers gives to it; or the script ends."""
    def refuse(message):
        raise ValueError(message)
    world = library('jinja2.sandbox', "a chat template").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    world.filters['tojson'] = lambda x, **form: json.dumps(x, **dict(ensure_ascii=False) | form)
    world.globals |= dict(raise_exception=refuse, strftime_now=lambda form: time.strftime(form))
    names = {name: mark for name, mark in chat.items() if name != 'template' and mark} | dict(
        messages=messages, tools=None, documents=None, add_generation_prompt=prompt, enable_thinking=False)
    template = re.sub(r'({%[-+]?\s*)(end)?generation\b',  # a block that matters in training only
                      lambda m: m[1] + ('endif' if m[2] else 'if true'), chat['template'])
    try:
        return world.from_string(template).render(names)
    except Exception as e:  # a program of others: anything may go wrong
        fail(f"the chat template of this model does not work ({type(e).__name__}: {e}): {INSTEAD}")
