"""
Is a text right? Graders of zero-shot tasks, (text, item) -> {name: figure}, and what runs a program.
"""
import contextlib
import os
import re
import secrets
import signal
import string
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from text.vocabulary import library


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
