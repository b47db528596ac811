"""
Zero-shot tasks: their items, read from the official file of each, and whether a text is right.
"""
import contextlib
import csv
import functools
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

from configurator import fail
from hub import web
from text import files
from text.vocabulary import library


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


def lines(text, read=json.loads):
    """What stands in the lines of a text. (splitlines() would cut inside of JSON, too.)"""
    return [read(line) for line in text.split('\n') if line.strip()]


def hellaswag(text):
    """arXiv 1905.07830. The context's second half begins a sentence; [header] and its like are left out."""
    clean = lambda s: ' '.join(re.sub(r'\[.*?\]', '', s.replace(' [title]', '. ')).split())
    items = []
    for item in lines(text):
        second = item['ctx_b'][:1].upper() + item['ctx_b'][1:]
        context = clean(f"{item['activity_label']}: {item['ctx_a']} {second}")
        items.append(Choice(context, [' ' + clean(e) for e in item['endings']], int(item['label'])))
    return items


def winogrande(text):
    """arXiv 1907.10641. A choice is a name and the rest of the sentence."""
    items = []
    for item in lines(text):
        before, after = item['sentence'].split('_')
        space = ' ' * before.endswith(' ')  # it belongs to the token of the name
        choices = [space + item[name] + after for name in ('option1', 'option2')]
        items.append(Choice(before.rstrip(' '), choices, int(item['answer']) - 1))
    return items


def piqa(text, labels):
    """arXiv 1911.11641."""
    return [Choice(f"Question: {item['goal']}\nAnswer:", [' ' + item['sol1'], ' ' + item['sol2']], int(gold))
            for item, gold in zip(lines(text), labels.split(), strict=True)]


def siqa(text, labels):
    """arXiv 1904.09728."""
    return [Choice(f"Question: {item['context']} {item['question']}\nAnswer:",
                   [' ' + item['answer' + c] for c in 'ABC'], int(gold) - 1)
            for item, gold in zip(lines(text), labels.split(), strict=True)]


def stories(text):
    """ROCStories (arXiv 1604.01696): [(four sentences, two endings, number of the right one)]."""
    return [([row[f'InputSentence{i}'] for i in range(1, 5)],
             [row[f'RandomFifthSentenceQuiz{i}'] for i in (1, 2)], int(row['AnswerRightEnding']) - 1)
            for row in csv.DictReader(io.StringIO(text))]


def rocstories(text):
    """Which ending?"""
    return [Choice(' '.join(s), [' ' + end for end in ends], gold) for s, ends, gold in stories(text)]


def rocstories_infill(text):
    """The third sentence, between the others."""
    return [Blank(f"{s[0]} {s[1]}", [' ' + s[2]], f" {s[3]} {ends[gold]}")
            for s, ends, gold in stories(text)]


def lambada(text):
    """arXiv 1606.06031: the last word of every line, or of the `text` of every line of JSON."""
    texts = lines(text, lambda line: json.loads(line)['text'] if line.startswith('{') else line)
    return [Blank(before, [' ' + word]) for before, word in (line.strip().rsplit(' ', 1) for line in texts)]


def triviaqa(text):
    """arXiv 1705.03551, the file unfiltered-web-dev.json or one like it."""
    return [Blank(f"Question: {item['Question']}\nAnswer:", [' ' + a for a in dict.fromkeys(
        [item['Answer']['Value'], *item['Answer']['Aliases']])], '\n') for item in json.loads(text)['Data']]


def squad(text):
    """arXiv 1606.05250, version 1.1."""
    return [Blank(f"{p['context']}\nQuestion: {qa['question']}\nAnswer:",
                  [' ' + a for a in dict.fromkeys(answer['text'] for answer in qa['answers'])], '\n')
            for page in json.loads(text)['data'] for p in page['paragraphs'] for qa in p['qas']]


def humaneval_infill(text):
    """A line of a program (arXiv 2207.14255)."""
    return [Blank(item['prompt'], [item['canonical_solution']], item['suffix'],
                  dict(code=item['test'], entry=item['entry_point'])) for item in lines(text)]


def gsm8k(text):
    """arXiv 2110.14168, for a model fine-tuned on pairs (data/gsm8k/prepare.py): what stands behind ####."""
    return [Blank(item['question'].strip(), [' ' + item['answer']]) for item in lines(text)]


# ---- is a text right? (text, item) -> {name: figure} ------------------------------------------------------

def same(text, item):
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
    kinds = dict(rouge1='ROUGE-1', rouge2='ROUGE-2', rougeL='ROUGE-L')
    scorer = library('rouge_score.rouge_scorer', "task=rocstories_infill").RougeScorer(list(kinds))
    scores = scorer.score(item.answers[0], text)
    return {name: scores[kind].fmeasure for kind, name in kinds.items()}


def last_number(text):
    """What stands behind the last ####, without commas; None if there is none."""
    _, mark, number = text.rpartition('####')
    return number.strip().replace(',', '').rstrip('.') if mark else None


def same_number(text, item):
    number = last_number(text)
    return {'accuracy': float(number is not None and number == last_number(item.answers[0])),
            'has ####': float(number is not None)}


# ---- the tasks --------------------------------------------------------------------------------------------

@dataclass
class Task:
    read: object          # (text of the file, text of its labels if they are in another) -> items
    grade: object = None  # of a Blank: (text, item) -> {name: figure}
    url: str = ''         # '': by hand only
    member: str = ''      # of a zip archive
    labels: str = ''      # '.jsonl' of the file becomes this, if labels are in a file of their own
    otherwise: str = ''   # where a person gets the file
    pairs: bool = False   # for a model that was fine-tuned on prompts and answers?


GITHUB = 'https://raw.githubusercontent.com'
MOSAIC = 'https://storage.googleapis.com/ai2-mosaic/public'
CLOZE = 'cs.rochester.edu/nlp/rocstories, the cloze test of 2016'
TASKS = {
    'hellaswag': Task(hellaswag, url=f'{GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl'),
    'winogrande': Task(winogrande, url=f'{MOSAIC}/winogrande/winogrande_1.1.zip',
                       member='winogrande_1.1/dev.jsonl'),
    'piqa': Task(piqa, url=f'{MOSAIC}/physicaliqa/physicaliqa-train-dev.zip',
                 member='physicaliqa-train-dev/dev.jsonl', labels='-labels.lst'),
    'siqa': Task(siqa, url=f'{MOSAIC}/socialiqa/socialiqa-train-dev.zip',
                 member='socialiqa-train-dev/dev.jsonl', labels='-labels.lst'),
    'rocstories': Task(rocstories, otherwise=CLOZE),
    'rocstories_infill': Task(rocstories_infill, rouge, otherwise=CLOZE),
    'lambada': Task(lambada, same,
                    url='https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl'),
    'triviaqa': Task(triviaqa, em_f1,
                     otherwise='nlp.cs.washington.edu/triviaqa, unfiltered-web-dev.json'),
    'squad': Task(squad, em_f1,
                  url='https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json'),
    'humaneval_infill': Task(humaneval_infill, same,
                             otherwise='github.com/openai/human-eval-infilling, '
                                       'HumanEval-SingleLineInfilling.jsonl, unpacked'),
    'gsm8k': Task(gsm8k, same_number, pairs=True, url=f'{GITHUB}/openai/grade-school-math/master/'
                                                             'grade_school_math/data/test.jsonl'),
}


def load(name, path=''):
    """The items of a task, from the official file at `path` or downloaded into data/tasks, or the script
    ends."""
    task, read = TASKS[name], files.read_bytes
    if not path and not task.url:
        fail(f"task={name}: get its file ({task.otherwise}) and name it with --data=")
    there = path or Path('data', 'tasks', f"{name}-{task.url.rpartition('/')[2]}")
    parts = [there]
    if not path:
        web.fetch(task.url, there, otherwise='name its file with --data=')
        if task.member:
            parts, read = [task.member], functools.partial(web.unzip, there)
    if task.labels:
        parts.append(Path(parts[0]).with_suffix('').as_posix() + task.labels)
    try:
        items = task.read(*(files.text_of(read(part), part) for part in parts))
        for number, item in enumerate(items, 1):
            if isinstance(item, Choice) and not 0 <= item.gold < len(item.choices):
                raise ValueError(f"item {number} says that choice {item.gold + 1} is right")
            texts = item.choices if isinstance(item, Choice) else item.answers
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"item {number} has no answer, or an empty one")
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as e:
        fail(f"task={name}: {path or task.url} is not in the official format ({type(e).__name__}: {e})")
    return items or fail(f"task={name}: {path or task.url} is empty")


# ---- programs that a model completes ----------------------------------------------------------------------

def limit(process, memory):
    """Bound the memory of a process, in bytes, where the system can (Linux)."""
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource
        resource.prlimit(process.pid, resource.RLIMIT_AS, (memory, memory))


def end(process):
    """Kill a process, and where the system has groups of them (not on Windows) all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, 'killpg'):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
    process.wait()
    process.stdin.close()


def passes(text, item, seconds=5, memory=2 ** 31):
    """Does the program with this line pass its tests? It runs in a process of its own, in an empty folder,
    without our environment, for so many seconds, in so many bytes, and must come to its end, where it says a
    word drawn for this run. That is no sandbox: the model's code runs with your rights, and on Windows what
    it has started may outlive it."""
    bare = {name: os.environ[name] for name in ('SYSTEMROOT',) if name in os.environ}  # Windows needs it
    word = secrets.token_hex(16)
    try:
        program = (f"{item.before}{text}{item.after}\n{item.test['code']}\ncheck({item.test['entry']})\n"
                   f"print({word!r})\n").encode()
    except UnicodeEncodeError:  # half a character
        return False
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, 'said'), 'w+b') as said:
        process = subprocess.Popen([sys.executable, '-I', '-'], cwd=folder, env=bare, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=said, stderr=subprocess.DEVNULL)
        try:
            limit(process, memory)
            process.communicate(program, seconds)  # sent only now, when the limit holds
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(process)
        said.seek(0)
        return said.read().decode(errors='replace').endswith(word + '\n')
