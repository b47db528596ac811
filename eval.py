"""
Measure a checkpoint: its likelihood on a text, or its own texts under a judge.

    python eval.py --out_dir=out-mdlm                     # likelihood on the dataset's validation split
    python eval.py --out_dir=out-mdlm --order=left        # the same network left to right: another model
    python eval.py --out_dir=out-ar --input=my.txt        # another text; --dataset=NAME: another dataset
    python eval.py --out_dir=out-mdlm --T=10              # the bound of a diffusion in 10 steps
    python eval.py --mode=gen_ppl --out_dir=out-mdlm --judge=out-ar --steps=64 --temperature=1
    python eval.py --mode=frontier --out_dir=out-mdlm --judge=out-ar --csv=frontier.csv --plot=frontier.svg
    python eval.py --mode=latents --out_dir=out-vae
    python eval.py --mode=tasks --task=lambada,hellaswag --out_dir=gpt2   # tasks.py; --data=FILE --items=300

nll: the text is cut into windows of the model's block size, each scored on its own; every objective sees the
same windows. The standard error is over windows and holds both the noise of the estimate and the spread of
the text. Bits per byte divide by the bytes the tokens stand for, perplexity per word by the words (what
spaces separate) of the whole text, in proportion to the tokens scored.

The windows of vae and latent are of their own length, and what stands before each is given: their figures
compare with each other.

gen_ppl: texts of the model end at its first <|endoftext|>, if its tokens have one; they are decoded, written
in the judge's tokens (with its <|endoftext|> behind those that ended) and all scored, none dropped, in
windows of the judge's block size, each on its own. Sure but dull texts have a low perplexity; so there stand
beside it, in the judge's tokens: the entropy of the tokens of a text (nats, mean over texts), the share of
different n-grams among all (distinct), and the share of a text's 4-grams that it had before (repetition).
The first row is the validation text's.

frontier: the same for every rule and number of steps.

latents: of a VAE, how much of a window comes back, and what it costs; of latent diffusion, how near its
prediction of the next window comes to the true one, and (with a judge) how its texts compare with real
windows that went through the VAE, and how much of the latents they were written from they say.

tasks: TASKS. Texts are greedy there, by rule=confidence, unless told otherwise.
"""
import csv
import io
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
from text import files
from text import packing
from hub.find import find
from tools import tasks
import unmask
import vae
from text import vocabulary
from configurator import Filename, build, fail, help_text, read, script
from text.pairs import Pairs
from tools.tasks import TASKS

MODES = ('nll', 'gen_ppl', 'frontier', 'latents', 'tasks')


@dataclass
class Config(unmask.Config):
    mode: str = 'nll'        # nll | gen_ppl | frontier | latents | tasks
    out_dir: Filename = ''   # the checkpoint, also one of others (hub/find.py); '': the newest out*/
    which: str = 'best'      # best | last
    weights: str = 'ema'     # ema | slow, a second average | model, not averaged
    device: str = 'auto'     # auto | cpu | cuda | mps
    dtype: str = 'float32'   # of the networks: float32 | bfloat16 | auto
    seed: int = 1337         # equal seeds, equal figures
    input: Filename = ''     # a UTF-8 text to score; '': the dataset's split
    dataset: str = ''        # another dataset than the model's own
    split: str = 'val'       # of the dataset: val | test | train
    windows: int = 0         # how many windows, evenly spread; 0: all
    block_size: int = 0      # tokens of a window and of a context; 0: the model's
    draws: int = 8           # noise draws a window, for bounds
    order: str = ''          # '': the objective's own; left: a denoiser's exact likelihood left to right
    T: int = -1              # steps of the bound of masked diffusion, 0: continuous; -1: as in training
    judge: Filename = ''     # an autoregressive checkpoint, as for out_dir: out-ar, gpt2-large
    num_samples: int = 64    # texts to be judged
    batch: int = 64          # texts written at once
    length: int = 0          # tokens of a text; 0: the model's block size
    overlap: int = 0         # beyond the block: tokens kept as context; 0: half a block
    temperature: float = 1.0  # 1: the model's own law
    rules: str = ''          # frontier: these only, separated by commas; '': all
    grid_of_steps: str = '8,16,32,64,128,256,512,1024'  # frontier: the numbers of steps
    csv: Filename = ''       # frontier: write the table here
    plot: Filename = ''      # frontier: draw it here, .svg or .png (needs matplotlib)
    task: str = ''           # tasks: which, separated by commas
    data: Filename = ''      # tasks: the official file of the task; '': downloaded
    items: int = 0           # tasks: how many, evenly spread; 0: all
    execute: bool = False    # tasks: run the programs that the model completes, with your rights
    show: int = 0            # tasks: print so many of the texts

    def __post_init__(self):
        super().__post_init__()
        for name in ('draws', 'num_samples', 'batch'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.windows < 0 or self.seed < 0 or self.T < -1 or self.length < 0 or self.overlap < 0:
            raise ValueError(f"windows={self.windows}, seed={self.seed}, length={self.length} and "
                             f"overlap={self.overlap} must not be negative, T={self.T} not below -1")
        for name, known in (('order', ('', 'left')), ('mode', MODES), ('split', ('val', 'test', 'train'))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: "
                                 f"{', '.join(filter(None, known))}")
        wrong = [task for task in self.task.split(',') if self.mode == 'tasks' and task not in TASKS]
        if wrong:
            raise ValueError(f"task={wrong[0]!r} is not one of: {', '.join(TASKS)}")
        if ',' in self.task and self.data:
            raise ValueError("data is the file of one task")
        if self.items < 0 or self.show < 0 or self.block_size < 0:
            raise ValueError(f"items={self.items}, show={self.show} and block_size={self.block_size} must "
                             f"not be negative")
        if self.mode in ('gen_ppl', 'frontier') and not self.judge:
            raise ValueError(f"mode={self.mode} needs a judge, for example --judge=out-ar")
        if self.mode != 'frontier' and (self.rules or self.csv or self.plot):
            raise ValueError(f"rules, csv and plot are for mode=frontier, not for mode={self.mode}")
        if not all(part.strip().isdecimal() and int(part) for part in self.grid_of_steps.split(',')):
            raise ValueError(f"grid_of_steps={self.grid_of_steps!r} is not a list of numbers: 8,16,32")


# ---- likelihood -------------------------------------------------------------------------------------------

def as_tokens(ids, device):
    """ids -> what `common.windows` takes."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def load_text(config, checkpoint, tokenizer, device):
    """Tokens of --input, of --dataset, or of the dataset the checkpoint was trained on; and what stands
    between prompt and answer, if that dataset is made of these, else None."""
    if config.input:
        ids = tokenizer.stream(files.read_text(config.input, 'input'))
        return as_tokens(ids or fail(f"--input={config.input} holds no text"), device), None
    dataset = config.dataset or checkpoint['run']['dataset']
    if not dataset:
        fail("this model comes without a dataset: name one with --dataset=, or a text with --input=")
    meta, own = common.load_meta(dataset), checkpoint['tokenizer']
    if not config.dataset and meta != own:
        fail(f"data/{dataset} has been prepared anew from another text: score a text with --input=FILE")
    other = vocabulary.Tokenizer(meta)
    tokens = common.load_tokens(dataset, config.split, other.vocab_size, device)
    if other.pieces == tokenizer.pieces:
        return tokens, other.sep
    if other.sep is not None:
        fail(f"data/{dataset} holds prompts and answers in other tokens than this model's: prepare it with "
             f"its tokenizer")
    return as_tokens(tokenizer.stream(other.text(vocabulary.as_ids(tokens).tolist())), device), None


def rows_of(tokens, sep, tokenizer, model, most, run):
    """What `nats` takes of the tokens, as in training: windows [x (N, T)], with what is before them for the
    concepts of windows.py; packed lines, [x, segment]; prompts and answers (sep is not None)
    [x, None, given]. And which of x are scored, (N, T) bool."""
    T = model.config.block_size
    if sep is not None:
        if run.get('objective', 'ar') not in ('ar', 'masked'):
            fail("prompts and answers are for ar and masked")
        pairs = Pairs(vocabulary.as_ids(tokens), sep, tokenizer.end)
        x, given = (t.to(tokens.device) for t in pairs.rows(pairs.spread(most), T))
        return [x, None, given], ~given
    if tokenizer.bos is not None:
        how = run['packed'], run['inserted'], run['expanded']
        lines = packing.Lines(tokens, tokenizer.bos, vocabulary.PAD, *how)
        rows = [t.to(tokens.device) for t in lines.rows(T, most)]
        return rows, rows[1] >= 0
    cut = model.cut(tokens, tokenizer.end) if hasattr(model, 'cut') else None
    if not len(cut if cut is not None else tokens[T - 1:]):  # sentences may be shorter than T
        fail(f"the text has {len(tokens)} tokens, fewer than block_size={T}")
    if cut is not None:
        rows = cut.inputs(cut.spread(most), getattr(model.config, 'n_prev', 0))
    else:
        rows = [common.windows(tokens, T, most)]
    return rows, rows[0] != model.mask_id


def nll(config, checkpoint, model, tokenizer, amp):
    """Print one row of the table."""
    T = model.config.block_size
    tokens, sep = load_text(config, checkpoint, tokenizer, next(model.parameters()).device)
    (x, *others), kept = rows_of(tokens, sep, tokenizer, model, config.windows, checkpoint['run'])
    text = x[kept]
    nats = lambda x, *others: model.nats(x, config.draws, *others)
    label = {'exact': 'exact', 'upper': 'upper bound'}[model.bound]
    if config.order and model.bound != 'exact':  # an autoregressive model's own order is left
        if not hasattr(model, 'nats_left'):
            fail(f"order={config.order} is not something {checkpoint['objective']} can do")
        if others:
            fail(f"order={config.order} reads windows, not packed lines: leave it out")
        nats, label = model.nats_left, 'exact, left to right'
    with amp:
        mean, error = common.evaluate(nats, (x, *others), kept, common.rows_at_once(T, tokenizer.vocab_size),
                                       config.seed)
    per_byte = text.numel() / tokenizer.n_bytes(text.cpu()) / math.log(2)
    whole = text if (tokenizer.bos, sep) != (None, None) else vocabulary.as_ids(tokens)
    words = len(tokenizer.decode(whole.tolist()).split())
    parameters = sum(p.numel() for p in model.parameters())
    word_perplexity = math.exp(min(700, mean * len(whole) / max(1, words)))
    print("| objective | parameters | tokens seen | nats/token | bits/token | bits/byte | perplexity/word | "
          "likelihood | windows |")
    print("|---" * 9 + "|")
    print(f"| {checkpoint['objective']} | {parameters / 1e6:.2f}M | {checkpoint['tokens'] / 1e6:.1f}M | "
          f"{mean:.4f} ± {error:.4f} | {mean / math.log(2):.4f} ± {error / math.log(2):.4f} | "
          f"{mean * per_byte:.4f} ± {error * per_byte:.4f} | "
          f"{word_perplexity:{',.0f' if word_perplexity < 1e9 else '.1e'}} | "
          f"{label} | {x.size(0)} of {x.size(1)} |")


# ---- texts under a judge ----------------------------------------------------------------------------------

def token_entropy(text):
    """Entropy in nats of the tokens of one text (list of ids)."""
    _, counts = np.unique(text, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def ngrams(text, n):
    return list(zip(*(text[i:] for i in range(n))))


def distinct(texts, n):
    """Different n-grams / n-grams, over all texts."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(texts, n=4):
    """Share of a text's n-grams that occurred in it before, over all texts."""
    grams = [ngrams(text, n) for text in texts]
    return 1 - sum(len(set(g)) for g in grams) / sum(map(len, grams)) if any(grams) else 0.0


class Judge:
    """A checkpoint with an exact likelihood, ours or a pretrained one (hub/find.py)."""

    def __init__(self, path, device):
        _, checkpoint = find(path)
        self.net, self.tokenizer = common.load_model(checkpoint, device)
        if self.net.bound != 'exact':
            fail(f"judge={path} is of {checkpoint['objective']}, whose likelihood is not exact: "
                 f"take an autoregressive one")
        self.block_size = self.net.config.block_size

    def nats(self, x):
        return self.net.nats(x)


def until_end(ids, tokenizer):
    """(text before the first <|endoftext|>, whether there is one)."""
    ended = tokenizer.end in ids
    return tokenizer.text(ids[:ids.index(tokenizer.end)] if ended else ids), ended


@torch.no_grad()
def judged(judge, texts, device):
    """What the judge and the counts say of texts (list of (str, ended)): a dict of floats."""
    ids = []
    for text, ended in texts:
        ids.append(judge.tokenizer.encode(text))
        if ended and judge.tokenizer.end is not None:
            ids[-1].append(judge.tokenizer.end)
    ids = [row for row in ids if row]  # an empty text has nothing to score
    if not ids:
        fail("all texts are empty")
    T, bos = judge.block_size, [] if judge.tokenizer.bos is None else [judge.tokenizer.bos]
    whole = [bos + row for row in ids]  # <bos> costs a judge of lines nothing, and is no token of the text
    rows = common.rows_at_once(min(T, max(map(len, whole))), judge.tokenizer.vocab_size)
    windows = sorted((row[i:i + T] for row in whole for i in range(0, len(row), T)), key=len)
    nats = 0.0
    for _, same in itertools.groupby(windows, key=len):
        for part in torch.tensor(list(same)).to(device).split(rows):
            nats += judge.nats(part).cpu().double().sum().item()
    n = sum(map(len, ids))
    return dict(nats_per_token=nats / n, perplexity=math.exp(nats / n),
                entropy=sum(map(token_entropy, ids)) / len(ids),
                **{f'distinct_{k}': distinct(ids, k) for k in (1, 2, 3)}, repetition=repetition(ids))


def written(model, config, tokenizer, device, **knobs):
    """num_samples texts of the model: (texts, network calls of a batch, tokens/s)."""
    T, calls, texts, batches, began = model.config.block_size, [], [], 0, time.time()
    L = config.length or T
    counter = model.gpt.norm.register_forward_pre_hook(lambda *_: calls.append(1))  # once a call
    for start in range(0, config.num_samples, config.batch):
        rows = min(config.batch, config.num_samples - start)
        canvas = torch.full((rows, L), tokenizer.vocab_size, device=device)
        if tokenizer.bos is not None:
            canvas[:, 0] = tokenizer.bos
        whole = L if hasattr(model, 'unroll') else T  # a model of windows takes any length
        for canvas in unmask.generate(model, canvas, whole, config.overlap or T // 2, **knobs):
            pass
        texts += [until_end(row, tokenizer) for row in canvas.tolist()]
        batches += 1
    counter.remove()
    return texts, len(calls) / batches, config.num_samples * L / (time.time() - began)


COLUMNS = ('nats_per_token', 'perplexity', 'entropy', 'distinct_1', 'distinct_2', 'distinct_3', 'repetition')


def head():
    print("| texts | knob | network calls | tokens/s | judge, nats/token | perplexity | entropy | "
          "distinct-1 | distinct-2 | distinct-3 | repetition |")
    print("|---" * 11 + "|", flush=True)


def row(name, knob, calls, speed, figures):
    cells = [name, knob, f"{calls:.1f}" if calls else "", f"{speed:,.0f}" if speed else ""]
    print("| " + " | ".join(cells + [f"{figures[c]:.3f}" for c in COLUMNS]) + " |", flush=True)


def validation_row(config, checkpoint, tokenizer, judge, L, device):
    """The same figures for as many stretches of the validation text."""
    tokens, _ = load_text(config, checkpoint, tokenizer, device)
    if tokenizer.bos is None:
        stretches = common.windows(tokens, min(L, len(tokens)), config.num_samples).tolist()
    else:
        lines = packing.Lines(tokens, tokenizer.bos, vocabulary.PAD, packed=False)
        stretches = [x[segment >= 0].tolist() for x, segment in zip(*lines.rows(L, config.num_samples))]
    row('validation text', '', 0, 0, judged(judge, [until_end(s, tokenizer) for s in stretches], device))


# the rules without steps are tried with values of their own knob instead
SWEEPS = {'threshold': ('threshold', (0.3, 0.5, 0.7, 0.9, 0.97)),
          'factor': ('factor', (8.0, 4.0, 2.0, 1.0, 0.5)),
          'eb': ('gamma', (10.0, 3.0, 1.0, 0.3, 0.1, 0.03))}


def gen_ppl(config, checkpoint, model, tokenizer, judge, amp, device):
    """A row for texts of the model."""
    common.seed_everything(config.seed)
    with amp:
        texts, calls, speed = written(model, config, tokenizer, device, **config.knobs())
    name, label = config.rule or checkpoint['objective'], f"{config.steps} steps"
    if config.rule in SWEEPS:
        label = f"{SWEEPS[config.rule][0]} {getattr(config, SWEEPS[config.rule][0])}"
    elif model.bound == 'exact' or config.rule == 'first_hitting':
        label = 'one token a call'
    elif not hasattr(common.concept(checkpoint['objective']), 'RULES') and hasattr(model, 'unroll'):
        label = 'z from the prior'
    row(name, label, calls, speed, judged(judge, texts, device))


def rules_of(config, objective):
    """Those of --rules, or all that the objective has. Raises ValueError for one that it does not have."""
    known = getattr(common.concept(objective), 'RULES', unmask.RULES)
    rules = list(filter(None, config.rules.split(','))) or list(known)
    for rule in rules:
        if rule not in known:
            raise ValueError(f"rules: {rule!r} is not one of: {', '.join(known)}")
    return rules


def frontier_settings(config, rules):
    """(rule, its knob for the table, knobs) of every point."""
    shared = ('steps', 'rule', 'temperature', 'top_k', 'top_p', 'cfg', 'first', 'stagger')
    for rule in rules:
        own = unmask.knobs_of(rule) if rule in unmask.RULES else ('eta', 'tau', 'doubt', 'context')
        given = {k: v for k, v in config.knobs().items() if k in shared or k in own}
        if rule in SWEEPS:
            name, values = SWEEPS[rule]
            points = [(f"{name} {value}", {name: value}) for value in values]
        elif rule == 'first_hitting':
            points = [('one token a call', {})]
        else:
            points = [(f"{int(n)} steps", dict(steps=int(n))) for n in config.grid_of_steps.split(',')]
        for label, knobs in points:
            yield rule, label, given | dict(rule=rule) | knobs


def frontier(config, checkpoint, model, tokenizer, judge, amp, device):
    """A row for every rule and number of steps; the same in a CSV and a plot, after every row."""
    rows, refused = [], {}
    for rule, label, knobs in frontier_settings(config, rules_of(config, checkpoint['objective'])):
        if rule in refused:
            continue
        common.seed_everything(config.seed)
        with amp:
            try:
                texts, calls, speed = written(model, config, tokenizer, device, **knobs)
            except ValueError as e:  # of a rule that this model cannot take
                refused[rule] = e
                continue
        figures = judged(judge, texts, device)
        rows.append(dict(rule=rule, knob=label, calls=calls, tokens_per_second=speed, **figures))
        if config.csv:
            writer = csv.DictWriter(table := io.StringIO(newline=''), rows[0])
            writer.writeheader()
            writer.writerows(rows)
            files.write(config.csv, table.getvalue())
        if config.plot:
            plot(rows, config.plot)
        row(rule, label, calls, speed, figures)
    if not rows:
        fail(f"{next(iter(refused.values()))} (--mode=gen_ppl measures what it can do)")
    for rule, why in refused.items():
        print(f"{rule} is left out: {why}", file=sys.stderr)


def check_plot(path):
    """Can the file be drawn, by matplotlib, and be written? Or the script ends."""
    try:
        import matplotlib
    except ImportError:
        fail("plot needs matplotlib: pip install matplotlib; the table and --csv do not")
    matplotlib.use('agg')
    from matplotlib import pyplot
    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if Path(path).suffix[1:].lower() not in known:
        fail(f"--plot={path} must end in one of: .{', .'.join(sorted(known))}")
    files.writable(path, 'plot')


def plot(rows, path):
    """Quality and entropy against network calls, a line a rule."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout='constrained')
    for i, (rule, points) in enumerate(itertools.groupby(rows, key=lambda r: r['rule'])):
        points = sorted(points, key=lambda r: r['calls'])
        for axis, column in zip(axes, ('nats_per_token', 'entropy')):
            axis.plot([p['calls'] for p in points], [p[column] for p in points], marker='osv^D'[i % 5],
                      color=pyplot.cm.tab20(i % 20), label=rule, markersize=4)
    for axis, label in zip(axes, ('nats/token under the judge', 'entropy of the tokens of a text, nats')):
        axis.set(xscale='log', xlabel='network calls', ylabel=label)
    axes[1].legend(fontsize='small', ncols=2)
    figure.savefig(drawn := io.BytesIO(), format=Path(path).suffix[1:].lower())
    pyplot.close(figure)
    files.write(path, drawn.getvalue())


# ---- latents ----------------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruction(encoder, x, rows):
    """What a VAE keeps of windows x (N, W), `rows` at once, as rows of a table: (name, figure)."""
    found = []
    for part in x.split(rows):
        blank, W = torch.full_like(part, encoder.mask_id), part.size(1)
        mu, logvar = encoder.posterior(part)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        writes = [encoder.write(mu, blank, W, tau) for tau in (0.0, 0.1, 1.0)]
        reads = [encoder.logits(latents, part, blank).argmax(-1) for latents in (mu, z)]
        found.append((mu, logvar, z, *writes, *reads))
    mu, logvar, z, *texts = map(torch.cat, zip(*found))
    text, N = x != encoder.mask_id, min(len(x), 2048)
    greedy, warm, hot, right, noisy = (f"{(ids == x)[text].double().mean():.4f}" for ids in texts)
    whole = ((texts[0] == x) | ~text).all(-1).double().mean()
    kl = vae.kl_to_prior(mu, logvar).sum((1, 2))
    return [('tokens again, greedy (tau = 0)', greedy), ('windows again', f"{whole:.4f}"),
            ('tokens again, tau = 0.1', warm), ('tokens again, tau = 1', hot),
            ('tokens right, those before given', right), ('the same, z with its noise', noisy),
            ('KL, nats per window', f"{kl.mean():.1f} ± {kl.std() / len(x) ** 0.5:.1f}"),
            ('active units', f"{vae.active_units(mu):.0f} of {mu[0].numel()}"),
            ('variance of mu, the least of a dimension', f"{mu.var(0).min():.3f}"),
            (f'information, nats, at most log {N}',
             f"{vae.mutual_information(z[:N], mu[:N], logvar[:N]):.2f} of {math.log(N):.2f}")]


@torch.no_grad()
def condition_effect(model, x, before, rows):
    """How often the prediction of the latents of windows x (N, W) from the windows `before` (N, n_prev, W),
    their mean under the model, is nearer in angle to the true ones than to those of another window: rows of
    a table. Windows without any before are left out."""
    kept = (before[:, -1] != model.mask_id).any(-1)
    guesses, truths = [], []
    for part, past in zip(x[kept].split(rows), before[kept].split(rows)):
        guesses.append(model.expected(*model.context(past)).flatten(1))
        truths.append(model.vae.encode(part).flatten(1))
    guess, z = torch.cat(guesses), torch.cat(truths)
    right, wrong = F.cosine_similarity(guess, z), F.cosine_similarity(guess, z.roll(len(z) // 2, 0))
    figure = lambda values: f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}"
    return [('true next window nearer than another', figure((right > wrong).double())),
            ('cosine with the true one', figure(right)), ('cosine with another', figure(wrong))]


@torch.no_grad()
def window_texts(model, x, prefix, before, config):
    """What becomes of windows x (N, W): name -> tokens (N, W), their latents and those that they were
    written from (N, n d). For latent diffusion (before is not None) also the windows drawn in their place,
    and what the decoder makes of pure noise, told the same doubt."""
    encoder, rule, eta = getattr(model, 'vae', model), config.rule or 'dpmpp_2m_sde', max(0, config.eta)
    texts = {}

    def write(name, z, prefix, doubt):
        ids = encoder.write(encoder.raw(z), prefix, x.size(1), config.tau, doubt)
        texts[name] = ids, encoder.encode(ids).flatten(1), z.flatten(1)
    write('the same through the VAE', encoder.encode(x), prefix, 0.0)
    if before is not None:
        z, there = model.context(before)
        doubt = model.doubt if config.doubt < 0 else config.doubt
        *_, drawn = model.draw(z, there, config.steps, rule, eta, config.cfg)
        write('next windows', drawn, prefix, doubt)
        write('noise in place of their latents', torch.randn_like(drawn), prefix, doubt)
        *_, drawn = model.draw(z, there & False, config.steps, rule, eta, 0.0)
        write('windows out of nothing', drawn, torch.full_like(x, encoder.mask_id), doubt)
    return texts


def about_latents(config, checkpoint, model, tokenizer, amp, device):
    """Print what the latents of the validation windows tell."""
    if not hasattr(model, 'unroll'):
        fail(f"mode=latents is for vae and latent, not for {checkpoint['objective']}")
    judge = Judge(config.judge, device) if config.judge else None
    common.seed_everything(config.seed)
    tokens, sep = load_text(config, checkpoint, tokenizer, device)
    (x, prefix, *before), _ = rows_of(tokens, sep, tokenizer, model, config.windows, checkpoint['run'])
    rows = common.rows_at_once(x.size(1), tokenizer.vocab_size)
    with amp:
        table = condition_effect(model, x, *before, rows) if before else reconstruction(model, x, rows)
        print(f"| {checkpoint['objective']}, {len(x)} windows | |\n|---|---|")
        print('\n'.join(f"| {name} | {figure} |" for name, figure in table))
        if not judge:
            return
        past = before[0].split(rows) if before else itertools.repeat(None)
        parts = [window_texts(model, *part, config) for part in zip(x.split(rows), prefix.split(rows), past)]
        texts = {name: list(map(torch.cat, zip(*(part[name] for part in parts)))) for name in parts[0]}
    print()
    head()
    for name, (ids, *_) in {'validation windows': (x,), **texts}.items():
        ids = [text[text != model.mask_id].tolist() for text in ids]
        row(name, '', 0, 0, judged(judge, [(tokenizer.decode(text), False) for text in ids], device))
    print('\n| texts | cosine of their latents with those they were written from | with another\'s |')
    print('|---|---|---|')
    for name, (_, again, z) in texts.items():
        own, other = (F.cosine_similarity(again, of).mean() for of in (z, z.roll(len(z) // 2, 0)))
        print(f"| {name} | {own:.3f} | {other:.3f} |")


# ---- tasks ------------------------------------------------------------------------------------------------

def about_tasks(config, checkpoint, model, tokenizer, amp, device):
    """Print a table of tasks: every figure with its standard error over the items."""
    if checkpoint['objective'] not in ('ar', 'masked') or not getattr(model, 'copies', True):
        fail(f"mode=tasks is for ar and for masked (subs, sedd), not for {checkpoint['objective']}")
    how = config.knobs()
    if model.bound != 'exact':
        how['rule'] = config.rule or 'confidence'
    found = {}
    for name in config.task.split(','):
        if name == 'gsm8k' and tokenizer.sep is None:
            fail("task=gsm8k is for a model that was fine-tuned on pairs (config/sft_gsm8k.py)")
        items = tasks.load(name, config.data)
        if 0 < config.items < len(items):
            items = [items[i] for i in np.linspace(0, len(items) - 1, config.items).astype(int)]
        found[name] = items
    print(f"| {checkpoint['objective']} | items | figures |\n|---|---|---|", flush=True)
    for name, items in found.items():
        with amp:
            figures, n = tasks.measure(name, items, model, tokenizer, device, config.draws, config.seed, how,
                                       config.execute, config.show)
        cells = ', '.join(f"{key} {100 * mean:.1f} ± {100 * error:.1f}"
                          for key, (mean, error) in figures.items())
        left_out = f" ({len(items) - n} too long)" if n < len(items) else ''
        print(f"| {name} | {n}{left_out} | {cells} |", flush=True)


def shortened(T, checkpoint):
    """The change to a config that cuts the context to T tokens, or the script ends."""
    own = checkpoint['config']['block_size']
    if checkpoint['objective'] in ('vae', 'latent') or T > own:
        fail(f"block_size={T}: the model's is {own}; it can be made shorter, but not that of vae and latent")
    for state in (checkpoint.get(name, {}) for name in ('ema', 'model', 'slow')):
        if 'gpt.pos.weight' in state:
            state['gpt.pos.weight'] = state['gpt.pos.weight'][:T + checkpoint['config'].get('shift', False)]
    return dict(block_size=T)


def main(argv):
    knobs, _, flags = read(argv)
    if 'help' in flags:
        return print(help_text(__doc__.replace('TASKS', ', '.join(TASKS)), Config))
    config, _ = build({**knobs, **flags}, Config)
    if config.csv:
        files.writable(config.csv, 'csv')
    if config.plot:
        check_plot(config.plot)
    device = common.pick_device(config.device)
    _, checkpoint = find(config.out_dir, config.which)
    changes = {} if config.T < 0 else dict(T=config.T, masking='bernoulli')  # masking is for training only
    if changes and checkpoint['objective'] != 'masked':
        fail(f"T={config.T} is for masked diffusion, not for {checkpoint['objective']}")
    if config.block_size:
        changes |= shortened(config.block_size, checkpoint)
    model, tokenizer = common.load_model(checkpoint, device, config.weights, **changes)
    amp = common.autocast(device, common.pick_dtype(config.dtype, device))
    if config.mode == 'tasks':
        if 'temperature' not in knobs.keys() | flags.keys():
            config.temperature = 0.0
        try:
            return about_tasks(config, checkpoint, model, tokenizer, amp, device)
        except ValueError as e:  # of a rule, or an item that is too long
            fail(e)
    if config.mode == 'nll':
        return nll(config, checkpoint, model, tokenizer, amp)
    if hasattr(model, 'unroll') and 'temperature' in knobs.keys() | flags.keys():
        fail(f"temperature is not for {checkpoint['objective']}: take --tau")
    if config.mode == 'latents':
        try:
            return about_latents(config, checkpoint, model, tokenizer, amp, device)
        except ValueError as e:  # of a sampler's knobs
            fail(e)
    if (config.overlap or 1) >= model.config.block_size:
        fail(f"overlap={config.overlap} must be smaller than block_size={model.config.block_size}")
    judge = Judge(config.judge, device)
    measure = gen_ppl if config.mode == 'gen_ppl' else frontier
    try:
        if config.mode == 'frontier':
            rules_of(config, checkpoint['objective'])  # a mistake is told before anything is computed
        head()
        length = config.length or model.config.block_size
        validation_row(config, checkpoint, tokenizer, judge, length, device)
        measure(config, checkpoint, model, tokenizer, judge, amp, device)
    except ValueError as e:  # what this model cannot do
        fail(e)


if __name__ == '__main__':
    script(main)
