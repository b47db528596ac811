"""
Measure a checkpoint: the likelihood of a text or, with a judge, the texts that the model writes.

    python eval.py --out_dir=out-mdlm                     # likelihood of the dataset's validation split
    python eval.py --out_dir=out-mdlm --order=left        # the same network left to right: another model
    python eval.py --out_dir=out-ar --input=my.txt        # another text; --dataset=NAME: another dataset
    python eval.py --out_dir=out-mdlm --T=10              # the bound of a diffusion in 10 steps
    python eval.py --out_dir=out-mdlm --judge=out-ar --steps=64 --rule=eb --gamma=0.1

Likelihood: the text is cut into windows of the model's block size, each scored on its own; all objectives see
the same windows. The standard error is over windows and holds both the noise of the estimate and the spread
of the text. Bits per byte divide by the bytes that the tokens stand for, perplexity per word by the words
(what spaces separate) of the whole text, in proportion to the tokens scored. A model that cuts windows of its
own and is given what stands before each (vae, latent) compares with others of its kind only.

Judge: tools/judge.py says what its table holds. The rules of the samplers and their knobs: sample.py --help.
More to measure: python -m tools.frontier, tools.latents, tools.tasks.
"""
import functools
import math
from dataclasses import dataclass
from typing import Literal

import common
from configurator import Count, Natural, fail, knobs_of, script, settings
from hub import find
from text.rows import kind_of
from text.vocabulary import as_ids
from tools import judge, samplers, source
from tools.frontier import label_of


@dataclass
class Config(judge.Config, source.Config):
    # their sampler
    steps: Count = 64        # for a block of the denoiser; an autoregressive model takes one per token
    rule: str = ''           # its rule, which may have knobs of its own; '': the model's default
    # likelihood
    windows: Natural = 0     # how many windows, evenly spread; 0: all
    block_size: Natural = 0  # tokens of a window and of a context; 0: the model's
    draws: Count = 8         # noise draws a window, for bounds
    order: Literal['', 'left'] = ''  # '': the objective's own; left: exact, from left to right
    T: Natural = 0           # masked diffusion: steps of its bound, 0: continuous; left out: as it is trained


def in_steps(checkpoint, T):
    """A checkpoint of masked diffusion as one in T steps, 0: in continuous time. The network is the same:
    masked.py in T steps is d3pm.py with carry_over."""
    objective, config = checkpoint['objective'], checkpoint['config']
    carry_over = dict(masked=True, d3pm=config.get('carry_over', False))
    if objective not in carry_over:
        fail(f"T={T} is for masked diffusion, not for {objective}")
    if not T and not carry_over[objective]:
        fail("T=0: a d3pm that predicts [MASK] is a diffusion in steps: give it some, for example T=1000")
    new = 'd3pm' if T else 'masked'
    config = config | dict(T=T, carry_over=carry_over[objective], masking='bernoulli')  # for training only
    known = knobs_of(common.concept(new).Config)
    return checkpoint | dict(objective=new, config={k: v for k, v in config.items() if k in known})


def likelihood(config, checkpoint, model, tokenizer, device, amp):
    """Print the likelihood of a text."""
    tokens, reader = source.load_text(config, checkpoint, tokenizer, device)
    batch = source.rows_of(tokens, reader, model, checkpoint, config.windows)
    x = batch['x']
    scored = common.scored_tokens(batch, model.mask_id)
    nats = functools.partial(model.nats, n=config.draws)
    label = {'exact': 'exact', 'upper': 'upper bound'}[model.bound]
    if config.order and model.bound != 'exact':  # an autoregressive model's own order is left
        if config.order not in model.orders:
            fail(f"order={config.order} is not something {checkpoint['objective']} can do")
        if batch.keys() != {'x'}:
            fail(f"order={config.order} reads windows without given tokens, not packed lines: leave it out")
        nats, label = model.nats_left, 'exact, left to right'
    at_once = common.rows_at_once(x.size(1), tokenizer.vocab_size)
    with amp:
        mean, error = common.evaluate(nats, batch, scored, at_once, config.seed)
    text = x[scored].cpu()
    whole = as_ids(tokens) if kind_of(reader) == 'windows' else text
    n_words = len(tokenizer.decode(whole.tolist()).split())
    word_perplexity = math.exp(min(700, mean * len(whole) / max(1, n_words)))
    per_bit = 1 / math.log(2)
    per_byte = per_bit * len(text) / tokenizer.n_bytes(text)
    print("| objective | parameters | tokens seen | nats/token | bits/token | bits/byte | perplexity/word | "
          "likelihood | windows |")
    print("|---" * 9 + "|")
    print(f"| {checkpoint['objective']} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M | "
          f"{checkpoint['tokens'] / 1e6:.1f}M | {mean:.4f} ± {error:.4f} | "
          f"{mean * per_bit:.4f} ± {error * per_bit:.4f} | {mean * per_byte:.4f} ± {error * per_byte:.4f} | "
          f"{word_perplexity:{',.0f' if word_perplexity < 1e9 else '.1e'}} | {label} | "
          f"{x.size(0)} of {x.size(1)} |")


def judge_texts(config, how, checkpoint, model, tokenizer, device, amp):
    """Print what a judge says of the validation text and of texts of the model. Raises ValueError for what
    its sampler cannot do."""
    scorer = judge.open_table(config, checkpoint, model, tokenizer, device)
    common.seed_everything(config.seed)
    with amp:
        texts, calls, speed = judge.written(model, tokenizer, config, device, how)
    judge.row(config.rule or checkpoint['objective'], scorer(texts),
              label_of(checkpoint['objective'], model, how), calls, speed)


def main(argv):
    config, chosen = settings(argv, __doc__, Config, functions=samplers.functions())
    said = judge.said(config, chosen)
    if said and not config.judge:
        fail(f"{', '.join(said)}: for texts, which need a judge, for example --judge=out-ar")
    device = common.pick_device(config.device)
    _, checkpoint = find.find(config.out_dir, config.which)
    changed = in_steps(checkpoint, config.T) if 'T' in chosen else checkpoint
    if config.block_size:
        changed = source.shortened(changed, config.block_size)
    model, tokenizer = common.load_model(changed, device, config.weights, config.dtype)
    amp = common.precision(model, config.dtype, device)
    if not config.judge:
        return likelihood(config, checkpoint, model, tokenizer, device, amp)
    try:
        how = judge.how_to_write(model.sample, config, said)
        judge_texts(config, how, checkpoint, model, tokenizer, device, amp)
    except ValueError as e:
        fail(e)


if __name__ == '__main__':
    script(main)
