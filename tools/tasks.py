"""
Zero-shot tasks, the same for a language model and for the denoiser it became.

Two kinds of items. A `Choice` has a context and several continuations, one of them right; a model takes the
one that costs it least:
    exact model   sum of -log p of the continuation's tokens, and the same per token
    denoiser      its upper bound on that, given the context: k of the continuation's tokens masked, k
                  uniform (masked.py); and the S that DiffuGPT publishes (arXiv 2410.17891): the mean loss of
                  a masked token at 32 noise levels, one draw each, no weights. All choices of an item get
                  the same noise.
A `Blank` has a text before, a text behind, and what may stand between. A denoiser fills as many masks as the
(longest) right answer has tokens, which is told to it; a language model continues the text before and does
not see the text behind.

A context and a choice are cut into tokens together: the choice begins where the ids of the whole differ from
those of the context. The text before and the text behind a blank are cut each by itself, so that all that is
given is given, and nothing of it has to be written again; the blank has as many tokens as the answer has
behind the text before. Each item is read from the official file of its task.
"""
import contextlib
import csv
import io
import json
import os
import re
import secrets
import signal
import string
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import common
from text import files
from configurator import fail
from hub import web

LEVELS = 32  # of the published score


@dataclass
class Choice:
    context: str
    choices: list  # of str
    gold: int      # number of the right one


@dataclass
class Blank:
    before: str
    answers: list  # of str, right ones
    after: str = ''
    test: dict = field(default_factory=dict)  # what runs a program


# ---- files -> items ---------------------------------------------------------------------------------------

class TooLong(ValueError):
    """An item does not fit into the model's context."""


def lines(text):
    return [line for line in text.split('\n') if line.strip()]  # splitlines() would cut inside of JSON, too


def json_lines(text):
    return list(map(json.loads, lines(text)))


def hellaswag(text, labels):
    """arXiv 1905.07830. The context's second half begins a sentence; [header] and its like are left out."""
    clean = lambda s: ' '.join(re.sub(r'\[.*?\]', '', s.replace(' [title]', '. ')).split())
    items = []
    for item in json_lines(text):
        second = item['ctx_b'][:1].upper() + item['ctx_b'][1:]
        context = clean(f"{item['activity_label']}: {item['ctx_a']} {second}")
        items.append(Choice(context, [' ' + clean(e) for e in item['endings']], int(item['label'])))
    return items


def winogrande(text, labels):
    """arXiv 1907.10641. A choice is a name and the rest of the sentence."""
    items = []
    for item in json_lines(text):
        before, after = item['sentence'].split('_')
        names = (item['option1'], item['option2'])
        space = ' ' * before.endswith(' ')  # it belongs to the token of the name
        choices = [space + name + after for name in names]
        items.append(Choice(before.rstrip(' '), choices, int(item['answer']) - 1))
    return items


def piqa(text, labels):
    """arXiv 1911.11641."""
    return [Choice(f"Question: {item['goal']}\nAnswer:", [' ' + item['sol1'], ' ' + item['sol2']], int(gold))
            for item, gold in zip(json_lines(text), labels.split(), strict=True)]


def siqa(text, labels):
    """arXiv 1904.09728."""
    return [Choice(f"Question: {item['context']} {item['question']}\nAnswer:",
                   [' ' + item['answer' + c] for c in 'ABC'], int(gold) - 1)
            for item, gold in zip(json_lines(text), labels.split(), strict=True)]


def stories(text):
    """ROCStories (arXiv 1604.01696): [(four sentences, two endings, number of the right one)]."""
    return [([row[f'InputSentence{i}'] for i in range(1, 5)],
             [row[f'RandomFifthSentenceQuiz{i}'] for i in (1, 2)], int(row['AnswerRightEnding']) - 1)
            for row in csv.DictReader(io.StringIO(text))]


def rocstories(text, labels):
    """Which ending?"""
    return [Choice(' '.join(s), [' ' + end for end in ends], gold) for s, ends, gold in stories(text)]


def rocstories_infill(text, labels):
    """The third sentence, between the others."""
    return [Blank(f"{s[0]} {s[1]}", [' ' + s[2]], f" {s[3]} {ends[gold]}")
            for s, ends, gold in stories(text)]


def lambada(text, labels):
    """arXiv 1606.06031: the last word of every line, or of the `text` of every line of JSON."""
    texts = [json.loads(line)['text'] if line.startswith('{') else line for line in lines(text)]
    cut = [line.strip().rsplit(' ', 1) for line in texts]
    return [Blank(before, [' ' + word]) for before, word in cut]


def triviaqa(text, labels):
    """arXiv 1705.03551, the file unfiltered-web-dev.json or one like it."""
    items = [(item['Question'], item['Answer']) for item in json.loads(text)['Data']]
    return [Blank(f"Question: {question}\nAnswer:",
                  [' ' + a for a in dict.fromkeys([gold['Value'], *gold['Aliases']])], '\n')
            for question, gold in items]


def squad(text, labels):
    """arXiv 1606.05250, version 1.1."""
    return [Blank(f"{p['context']}\nQuestion: {qa['question']}\nAnswer:",
                  [' ' + a for a in dict.fromkeys(answer['text'] for answer in qa['answers'])], '\n')
            for page in json.loads(text)['data'] for p in page['paragraphs'] for qa in p['qas']]


def humaneval_infill(text, labels):
    """A line of a program (arXiv 2207.14255)."""
    return [Blank(item['prompt'], [item['canonical_solution']], item['suffix'],
                  dict(code=item['test'], entry=item['entry_point'])) for item in json_lines(text)]


def gsm8k(text, labels):
    """arXiv 2110.14168, for a model fine-tuned on pairs (data/gsm8k/prepare.py): what stands behind ####."""
    return [Blank(item['question'].strip(), [' ' + item['answer']]) for item in json_lines(text)]


# ---- a text in tokens -------------------------------------------------------------------------------------

def locate(tokenizer, context, choice):
    """(ids of the whole text, where the choice begins): at the first id that is not one of the context, so a
    token across the border belongs to the choice."""
    ids, left, start = tokenizer.encode(context + choice), tokenizer.encode(context), 0
    while start < min(len(left), len(ids) - 1) and left[start] == ids[start]:
        start += 1
    return ids, start


def count_behind(tokenizer, context, text):
    """How many tokens a text has behind a context whose own tokens are given."""
    ids, left = tokenizer.encode(context + text), tokenizer.encode(context)
    return len(ids) - len(left) if ids[:len(left)] == left else len(tokenizer.encode_rest(text))


def fit(ids, start, end, T):
    """The same with at most T ids: what is far from [start, end) is cut, first before it, then behind it.
    Raises TooLong if that alone is longer."""
    if end - start > T:
        raise TooLong(f"{end - start} tokens are longer than the model's context, {T}")
    cut = min(start, max(0, len(ids) - T))
    return ids[cut:cut + T], start - cut, end - cut


# ---- what a continuation costs ----------------------------------------------------------------------------

def exact_cost(model, x, given):
    """-log p of the tokens of x (1, T) that are not given, in nats."""
    return model.nats(x, 1, None, given).item()


def in_parts(cost, model, x, *rows):
    """The mean of cost(*rows) over the draws, as many at once as memory has room for."""
    at_once = common.rows_at_once(x.size(1), model.config.vocab_size)
    return torch.cat([cost(*part) for part in zip(*(t.split(at_once) for t in rows))]).mean().item()


def bound_cost(model, x, given, noise, v):
    """The denoiser's bound on it, from one draw a row: noise (n, T), v (n,) in [0, 1), stratified."""
    def cost(noise, v):
        n = len(v)
        return model.count_nats(x.expand(n, -1), v, None, given.expand(n, -1), noise)
    return in_parts(cost, model, x, noise, v)


def published_cost(model, x, given, noise):
    """S(choice) of arXiv 2410.17891: the mean over len(noise) noise levels of the mean loss of a masked
    token, 0 where none is masked."""
    n = len(noise)
    level = (1 + torch.arange(n, device=x.device)) / n
    masked = (noise < level[:, None]) & ~given

    def cost(masked, level):
        loss = model.masked_nats(x.expand(len(masked), -1), masked, m=level, m_before=level)
        return loss / masked.sum(-1).clamp(min=1)
    return in_parts(cost, model, x, masked, level)


@torch.no_grad()
def costs(model, tokenizer, item, draws, seed, device):
    """{rule: cost of every choice}; the choices of an item get the same noise, a function of the seed."""
    T, rows = model.config.block_size, []
    cut = [locate(tokenizer, item.context, choice) for choice in item.choices]
    start = min(start for _, start in cut)  # the same context for all
    generator = torch.Generator().manual_seed(seed)
    width = max(len(ids) for ids, _ in cut) - start
    noise = torch.rand(max(draws, LEVELS), width, generator=generator)
    v = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
    for ids, _ in cut:
        ids, begin, end = fit(ids, start, len(ids), T)
        x, n = torch.tensor([ids], device=device), end - begin
        given = torch.arange(len(ids), device=device)[None] < begin
        if model.bound == 'exact':
            figures = {'nats': exact_cost(model, x, given)}
        else:
            u = torch.nn.functional.pad(noise[:, :n], (begin, 0)).to(device)
            figures = {'nats': bound_cost(model, x, given, u[:draws], v.to(device)),
                       'S': published_cost(model, x, given, u[:LEVELS])}
        rows.append(figures | {'nats/token': figures['nats'] / n})
    return {rule: [row[rule] for row in rows] for rule in rows[0]}


# ---- what stands in a blank -------------------------------------------------------------------------------

@torch.no_grad()
def fill(model, tokenizer, item, device, **how):
    """The text that the model puts into a blank."""
    before, after = tokenizer.encode(item.before), tokenizer.encode_rest(item.after)
    n = max(count_behind(tokenizer, item.before, answer) for answer in item.answers)
    if n == 0:  # the answer is nothing in these tokens
        return ''
    ids = before + [model.mask_id] * n + (after if model.bound != 'exact' else [])
    ids, start, end = fit(ids, len(before), len(before) + n, model.config.block_size)
    row = torch.tensor(ids, device=device)[None]
    for canvas in model.sample(row, **{**how, 'steps': min(how['steps'], end - start)}):
        pass
    return until(tokenizer, canvas[0, start:end].tolist())


@torch.no_grad()
def answer(model, tokenizer, item, device, **how):
    """What a model that was fine-tuned on pairs answers: the text up to its end. A quarter of its context is
    kept for that; a prompt that leaves less loses its head."""
    T, before = model.config.block_size, tokenizer.meta.get('before', '')
    given = (tokenizer.encode(before + item.before) + tokenizer.sep)[-(T * 3 // 4):]
    row = torch.tensor(given + [model.mask_id] * (T - len(given)), device=device)[None]
    for canvas in model.sample(row, **how):
        if tokenizer.end in canvas[0, len(given):].tolist() and model.bound == 'exact':
            break
    return until(tokenizer, canvas[0, len(given):].tolist())


def until(tokenizer, ids):
    """The text of ids up to the end token or the first blank."""
    stop = [i for i, t in enumerate(ids) if t == tokenizer.end or t >= tokenizer.vocab_size]
    return tokenizer.decode(ids[:stop[0]] if stop else ids)


# ---- is it right? (text, item) -> {name: figure} ----------------------------------------------------------

def same_word(text, item):
    return {'accuracy': float(text.strip() == item.answers[0].strip())}


def normalised(text):
    """As the graders of SQuAD and TriviaQA do: lower case, no punctuation, no articles, single spaces."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def f1(text, gold):
    """Harmonic mean of the shares of words that are in both."""
    a, b = normalised(text).split(), normalised(gold).split()
    both = sum((Counter(a) & Counter(b)).values())
    return 2 * both / (len(a) + len(b)) if both else float(a == b)


def em_f1(text, item):
    """The best over all right answers, of the first line."""
    text = text.strip().split('\n')[0]
    return {'EM': float(any(normalised(text) == normalised(gold) for gold in item.answers)),
            'F1': max(f1(text, gold) for gold in item.answers)}


def rouge(text, item):
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, by the library rouge_score, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        fail("task=rocstories_infill needs the library rouge_score: pip install rouge-score")
    kinds = dict(rouge1='ROUGE-1', rouge2='ROUGE-2', rougeL='ROUGE-L')
    scores = RougeScorer(list(kinds)).score(item.answers[0], text)
    return {name: scores[kind].fmeasure for kind, name in kinds.items()}


def same_line(text, item):
    return {'exact': float(text.strip() == item.answers[0].strip())}


def last_number(text):
    """What stands behind the last ####, without commas; None if there is none."""
    _, mark, number = text.rpartition('####')
    return number.strip().replace(',', '').rstrip('.') if mark else None


def same_number(text, item):
    number = last_number(text)
    return {'accuracy': float(number is not None and number == last_number(item.answers[0])),
            'has ####': float(number is not None)}


def limit(process, memory):
    """Bound the memory of a process, in bytes, where the system can (Linux)."""
    try:
        import resource
        resource.prlimit(process.pid, resource.RLIMIT_AS, (memory, memory))
    except (ImportError, AttributeError, ProcessLookupError):
        pass


def end(process):
    """Kill a process, and where the system has groups of them (not on Windows) all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, 'killpg'):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
    process.wait()


def passes(text, item, seconds=5, memory=2 ** 31):
    """Does the program with this line pass its tests? It runs in a process of its own, in an empty folder,
    without our environment, for so many seconds, in so many bytes, and must come to its end, where it says a
    word drawn for this run. That is no sandbox: the model's code runs with your rights, and on Windows what
    it has started may outlive it."""
    bare = {name: os.environ[name] for name in ('SYSTEMROOT',) if name in os.environ}  # Windows needs it
    word = secrets.token_hex(16)
    program = (f"{item.before}{text}{item.after}\n{item.test['code']}\ncheck({item.test['entry']})\n"
               f"print({word!r})\n")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, 'said'), 'w+b') as said:
        try:
            process = subprocess.Popen([sys.executable, '-I', '-c', program], cwd=folder, env=bare,
                                       start_new_session=True, stdin=subprocess.DEVNULL, stdout=said,
                                       stderr=subprocess.DEVNULL)
        except ValueError:  # a zero byte or half a character in the program
            return False
        limit(process, memory)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(process)
        said.seek(0)
        return said.read().decode(errors='replace').endswith(word + '\n')


# ---- the tasks --------------------------------------------------------------------------------------------

MOSAIC = 'https://storage.googleapis.com/ai2-mosaic/public'


@dataclass
class Task:
    read: object         # (text of the file, text of its labels) -> items
    grade: object = None  # of a Blank: (text, item) -> {name: figure}
    write: object = fill  # of a Blank: (model, tokenizer, item, device, how) -> text
    url: str = ''        # '': by hand only
    member: str = ''     # of a zip archive
    labels: str = ''     # '.jsonl' of the file becomes this, if labels are in a file of their own
    otherwise: str = ''  # where a person gets the file


TASKS = {
    'hellaswag': Task(hellaswag, url='https://raw.githubusercontent.com/rowanz/hellaswag/master/data/'
                                     'hellaswag_val.jsonl'),
    'winogrande': Task(winogrande, url=f'{MOSAIC}/winogrande/winogrande_1.1.zip',
                       member='winogrande_1.1/dev.jsonl'),
    'piqa': Task(piqa, url=f'{MOSAIC}/physicaliqa/physicaliqa-train-dev.zip',
                 member='physicaliqa-train-dev/dev.jsonl', labels='-labels.lst'),
    'siqa': Task(siqa, url=f'{MOSAIC}/socialiqa/socialiqa-train-dev.zip',
                 member='socialiqa-train-dev/dev.jsonl', labels='-labels.lst'),
    'rocstories': Task(rocstories, otherwise='cs.rochester.edu/nlp/rocstories, the cloze test of 2016'),
    'rocstories_infill': Task(rocstories_infill, rouge,
                              otherwise='cs.rochester.edu/nlp/rocstories, the cloze test of 2016'),
    'lambada': Task(lambada, same_word, url='https://openaipublic.blob.core.windows.net/gpt-2/data/'
                                             'lambada_test.jsonl'),
    'triviaqa': Task(triviaqa, em_f1, otherwise='nlp.cs.washington.edu/triviaqa, unfiltered-web-dev.json'),
    'squad': Task(squad, em_f1, url='https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json'),
    'humaneval_infill': Task(humaneval_infill, same_line,
                             otherwise='github.com/openai/human-eval-infilling, '
                                       'HumanEval-SingleLineInfilling.jsonl, unpacked'),
    'gsm8k': Task(gsm8k, same_number, answer, 'https://raw.githubusercontent.com/openai/grade-school-math/'
                                              'master/grade_school_math/data/test.jsonl'),
}


def load(name, path=''):
    """The items of a task, from the official file at `path` or downloaded into data/tasks, or the script
    ends."""
    task, folder = TASKS[name], Path('data', 'tasks')
    if path:
        text = files.read_bytes(path, 'data')
        labels = Path(path).with_suffix('').as_posix() + task.labels
        labels = files.read_bytes(labels, 'data') if task.labels else b''
    elif not task.url:
        fail(f"task={name}: get its file ({task.otherwise}) and name it with --data=")
    else:
        there = folder / f"{name}-{task.url.rpartition('/')[2]}"
        web.fetch(task.url, there, otherwise='name its file with --data=')
        text = web.unzip(there, task.member) if task.member else there.read_bytes()
        labels = Path(task.member).with_suffix('').as_posix() + task.labels
        labels = web.unzip(there, labels) if task.labels else b''
    try:
        items = task.read(*(files.text_of(data, path or task.url) for data in (text, labels)))
        for number, item in enumerate(items, 1):
            if isinstance(item, Choice) and not 0 <= item.gold < len(item.choices):
                raise ValueError(f"item {number} says that choice {item.gold + 1} is right")
            texts = item.choices if isinstance(item, Choice) else item.answers
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"item {number} has no answer, or an empty one")
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error,
            RecursionError) as e:
        fail(f"task={name}: {path or task.url} is not in the official format ({type(e).__name__}: {e})")
    return items or fail(f"task={name}: {path or task.url} is empty")


def measure(name, items, model, tokenizer, device, draws, seed, how, execute=False, show=0):
    """({figure: (mean over the items, standard error)}, how many items there were room for); a function of
    its arguments alone. how: what `Model.sample` takes. show: print so many of the texts."""
    figures = []
    for number, item in enumerate(tqdm(items, desc=name, disable=not sys.stderr.isatty())):
        try:
            if isinstance(item, Choice):
                cost = costs(model, tokenizer, item, draws, seed + number, device)
                figures.append({rule: float(min(range(len(c)), key=c.__getitem__) == item.gold)
                                for rule, c in cost.items()})
                continue
            common.seed_everything(seed, number)
            text = TASKS[name].write(model, tokenizer, item, device, **how)
        except TooLong as e:
            why = e
            continue
        figures.append(TASKS[name].grade(text, item))
        if execute and item.test:
            figures[-1]['passes'] = float(passes(text, item))
        if number < show:
            print(f"{item.before[-60:]!r} [{text!r}] {item.after[:60]!r}; right: {item.answers[0]!r}")
    if not figures:
        raise why
    table = {key: torch.tensor([f[key] for f in figures]).double() for key in figures[0]}
    return {key: (t.mean().item(), t.std(correction=min(1, len(t) - 1)).item() / len(t) ** 0.5)
            for key, t in table.items()}, len(figures)
