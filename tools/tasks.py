"""
Zero-shot tasks, the same for a language model and for the denoiser it became.

    python -m tools.tasks --out_dir=gpt2 --task=lambada,hellaswag --items=300
    python -m tools.tasks --out_dir=out-adapt --task=rocstories_infill --data=FILE --steps=32
    python -m tools.tasks --out_dir=out-sft --task=gsm8k --show=3

A `Choice` has a context and several continuations, one of them right. A model takes the one that costs least:
    exact model   sum of -log p of the continuation's tokens, and the same per token
    denoiser      its upper bound on that, given the context: k of the continuation's tokens masked, k
                  uniform (masked.py); and the S that DiffuGPT publishes (arXiv 2410.17891): the mean loss of
                  a masked token at 32 noise levels, one draw each, no weights. All choices of an item get
                  the same noise.
A `Blank` has a text before, a text behind, and what may stand between. A denoiser fills as many masks as the
longest right answer has tokens: the length is given away. A language model continues the text before and does
not see the text behind.

A context and a choice are cut into tokens together: the choice begins where the ids of the whole differ from
those of the context. The text before a blank and the text behind it are cut each by itself.
"""
import itertools
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import common
from configurator import Count, Filename, Natural, NonNegative, ShareAbove0, fail, script, settings
from hub import find
from tools import judge, samplers, source
from tools.items import TASKS, Choice, load, passes

LEVELS = 32  # of the published score


@dataclass
class Config(source.Checkpoint):
    block_size: Natural = 0   # tokens of the context; 0: the model's
    # tasks
    task: str = ''            # which, separated by commas
    data: Filename = ''       # the official file of the task; '': downloaded
    items: Natural = 0        # how many, evenly spread; 0: all
    draws: Count = 8          # noise draws a choice, for bounds
    execute: bool = False     # run the programs that the model completes, with your rights
    show: Natural = 0         # print so many of the texts
    # texts
    steps: Count = 64         # of the denoiser for a text, at most one a token
    rule: str = 'confidence'  # of the denoiser, with its own knobs: see sample.py --help
    temperature: NonNegative = 0.0  # 1: the model's own law; 0: the likeliest token
    top_k: Natural = 0        # draw from the k likeliest tokens; 0: all
    top_p: ShareAbove0 = 1.0  # draw from the fewest tokens with this probability together

    def __post_init__(self):
        for name in self.task.split(','):
            if name not in TASKS:
                raise ValueError(f"task={name!r} is not one of: {', '.join(TASKS)}")
        if ',' in self.task and self.data:
            raise ValueError("data is the file of one task")


class TooLong(ValueError):
    """An item does not fit into the model's context."""


# ---- a text in tokens -------------------------------------------------------------------------------------

def locate(tokenizer, context, choice):
    """(ids of the whole text, where the choice begins): at the first id that is not one of the context, so a
    token across the border belongs to the choice."""
    ids, left = tokenizer.encode(context + choice), tokenizer.encode(context)
    same = [a == b for a, b in zip(left, ids[:-1])]
    return ids, (same + [False]).index(False)


def count_behind(tokenizer, context, text):
    """How many tokens a text has behind a context whose own tokens are given."""
    ids, left = tokenizer.encode(context + text), tokenizer.encode(context)
    return len(ids) - len(left) if ids[:len(left)] == left else len(tokenizer.encode_rest(text))


def cut_to(ids, start, end, T):
    """The same with at most T ids: what is far from [start, end) is cut, first before it, then behind it.
    Raises TooLong if that alone is longer."""
    if end - start > T:
        raise TooLong(f"{end - start} tokens are longer than the model's context, {T}")
    cut = min(start, max(0, len(ids) - T))
    return ids[cut:cut + T], start - cut, end - cut


# ---- what a continuation costs ----------------------------------------------------------------------------

def in_parts(cost, model, x, *rows):
    """The mean of cost(*rows) over the draws, as many at once as memory has room for."""
    at_once = common.rows_at_once(x.size(1), model.config.vocab_size)
    return torch.cat([cost(*part) for part in zip(*(t.split(at_once) for t in rows))]).mean().item()


def bound_cost(model, x, given, noise, v):
    """The denoiser's bound on -log p of the tokens of x (1, T) that are not given, in nats, from one draw a
    row: noise (n, T), v (n,) in [0, 1), stratified."""
    def cost(noise, v):
        n = len(v)
        return model.count_nats(x.expand(n, -1), v, given=given.expand(n, -1), u=noise)
    return in_parts(cost, model, x, noise, v)


def published_cost(model, x, given, noise):
    """S(choice) of arXiv 2410.17891: the mean over len(noise) noise levels of the mean loss of a masked
    token, 0 where none is masked."""
    n = len(noise)
    level = (1 + torch.arange(n, device=x.device)) / n
    masked = (noise < level[:, None]) & ~given

    def cost(masked, level):
        loss = model.masked_nats(x.expand(len(masked), -1), masked, m=level)
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
        ids, begin, end = cut_to(ids, start, len(ids), T)
        x, n = torch.tensor([ids], device=device), end - begin
        given = torch.arange(len(ids), device=device)[None] < begin
        if model.bound == 'exact':
            figures = {'nats': model.nats(x=x, given=given).item()}
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
    ids, start, end = cut_to(ids, len(before), len(before) + n, model.config.block_size)
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
    text = itertools.takewhile(lambda i: i != tokenizer.end and i < tokenizer.vocab_size, ids)
    return tokenizer.decode(text)


# ---- a table ----------------------------------------------------------------------------------------------

def measure(name, items, model, tokenizer, device, draws, seed, how, execute=False, show=0):
    """({figure: (mean over the items, standard error)}, how many items there were room for); a function of
    its arguments alone. how: what `Model.sample` takes. show: print so many of the texts."""
    figures, write = [], answer if TASKS[name].pairs else fill
    for number, item in enumerate(tqdm(items, desc=name, disable=not sys.stderr.isatty())):
        try:
            if isinstance(item, Choice):
                cost = costs(model, tokenizer, item, draws, seed + number, device)
                figures.append({rule: float(c.index(min(c)) == item.gold) for rule, c in cost.items()})
                continue
            common.seed_everything(seed, number)
            text = write(model, tokenizer, item, device, **how)
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
    table = {key: np.array([f[key] for f in figures]) for key in figures[0]}
    n = len(figures)
    return {key: (t.mean(), t.std(ddof=min(1, n - 1)) / n ** 0.5) for key, t in table.items()}, n


def main(argv):
    config, chosen = settings(argv, __doc__, Config, functions=samplers.functions(),
                             others='\n\ntasks: ' + ', '.join(TASKS))
    device = common.pick_device(config.device)
    _, checkpoint = find.find(config.out_dir, config.which)
    if checkpoint['objective'] not in ('ar', 'masked', 'sedd'):
        fail(f"tasks are for ar, masked and sedd, not for {checkpoint['objective']}")
    if config.block_size:
        checkpoint = source.shortened(checkpoint, config.block_size)
    model, tokenizer = common.load_model(checkpoint, device, config.weights, config.dtype)
    amp = common.precision(model, config.dtype, device)
    found = {name: load(name, config.data) for name in config.task.split(',')}
    if tokenizer.sep is None and any(TASKS[name].pairs for name in found):
        fail("task=gsm8k is for a model that was fine-tuned on pairs (config/sft_gsm8k.py)")
    try:
        how = judge.how_to_write(model.sample, config, judge.said(config, chosen))
        print(f"| {checkpoint['objective']} | items | figures |\n|---|---|---|", flush=True)
        for name, items in found.items():
            if 0 < config.items < len(items):
                items = [items[i] for i in np.linspace(0, len(items) - 1, config.items).astype(int)]
            with amp:
                figures, n = measure(name, items, model, tokenizer, device, config.draws, config.seed, how,
                                     config.execute, config.show)
            cells = ', '.join(f"{key} {100 * mean:.1f} ± {100 * error:.1f}"
                              for key, (mean, error) in figures.items())
            left_out = f" ({len(items) - n} too long)" if n < len(items) else ''
            print(f"| {name} | {n}{left_out} | {cells} |", flush=True)
    except ValueError as e:  # of a rule, or an item that is too long
        fail(e)


if __name__ == '__main__':
    script(main)
