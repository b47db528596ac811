"""
Write text with any checkpoint: unmasking, infilling, left to right, and texts longer than the model's block.

    python sample.py --steps=64                                   # the newest checkpoint under out*/
    python sample.py --start="ROMEO:" --suffix="Exit." --rule=eb --gamma=0.1
    python sample.py --template="To be, ___ that is the ___." --hole=12
    python sample.py --out_dir=GSAI-ML/LLaDA-8B-Instruct --chat="What is 12 times 7?" --rule=threshold
    python sample.py --watch                                      # the text as it denoises, in the terminal
    python sample.py --html=sample.html                           # the same as a page with a slider

The samplers are in unmask.py; score and latent have others (parts/gaussian.py). Here is what they need around
them: a prompt becomes a canvas, (num_samples, length) tokens with the id V where text is to be
written, and `model.sample(canvas, ...)` yields it again and again, with more and more text on it. What is
printed, watched or saved as a page is that one sequence of canvases.
"""
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import common
from configurator import (Count, Filename, Natural, NonNegative, ShareAbove0, arguments, fail, knobs_of,
                          script, settings)
from hub import find
from parts.graphs import quick
from text import chat, ends, files
from text.prompts import ids_of, prompt_of, starts
from tools import page, samplers, terminal


@dataclass
class Config:
    # the model
    out_dir: Filename = ''       # the checkpoint, also one of others (hub/); '': the newest out*/
    which: Literal['best', 'last'] = 'best'      # best | last
    weights: Literal['ema', 'model'] = 'ema'     # ema, the average | model, not averaged
    device: str = 'auto'         # auto | cpu | cuda | mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto | float32 | bfloat16
    compile: bool = False        # torch.compile the network: pays for thousands of calls
    seed: Natural = 1337         # equal seeds, equal texts

    # the sampler
    steps: Count = 64            # of the denoiser for a block; an autoregressive model takes one per token
    rule: str = ''               # see below; '': what reads best (masked: confidence, apart, temperature 0.5)
    temperature: NonNegative = 0.7  # 1: the model's distribution; lower: likelier; 0: argmax; see rule
    top_k: Natural = 0           # draw from the k likeliest tokens; 0: all
    top_p: ShareAbove0 = 1.0     # draw from the fewest tokens that hold this probability

    # the text
    num_samples: Count = 2       # texts, side by side in one batch
    length: Natural = 0          # tokens of a text, prompt included; 0: the model's block, at most 1,024
    overlap: Natural = 0         # beyond the block: tokens of the last part kept as context; 0: half a block
    start: str = ''              # given text at the start; FILE:path: one a line, num_samples texts for each
    suffix: str = ''             # given text at the end; FILE:path reads it from a file, as for template
    template: str = ''           # given text with ___ for each hole, instead of start and suffix
    hole: Count = 8              # tokens of a hole
    chat: str = ''               # a message to a model that has a chat template; length: of the answer
    early_end: Literal['', 'never', 'last'] = ''  # denoisers write the end token: never | last; '': any time
    stop: str = ''               # end a text after this string; <|endoftext|>: the model's own end
    min_entropy: NonNegative = 0.0  # stop when 256 tokens have less unigram entropy, nats (BD3-LM: 4)

    # display
    watch: bool = False          # show the denoising in the terminal
    html: Filename = ''          # write the denoising to this file, a page that needs nothing else

    def __post_init__(self):
        if self.template and (self.start or self.suffix or self.length):
            raise ValueError("template says where everything goes: leave out start, suffix and length")
        if self.chat and (self.template or self.start or self.suffix):
            raise ValueError("chat has a template of its own: leave out start, suffix and template")


SAMPLER = [name for name, knob in knobs_of(Config).items() if knob.group == 'the sampler']
ANSWER = 128  # tokens of an answer, unless --length= says it
WINDOWS = 5   # to write after the start, if a model takes a canvas of any length and --length is not given


def write(model, tokenizer, config, canvas, how, marks=()):
    """From a canvas (B, L) to texts: (B of them, the canvases on the way if --html asks for them, network
    calls, seconds). how: what model.sample is called with; marks: ids that end an answer."""
    V = tokenizer.vocab_size
    stops = ends.of(tokenizer, config.stop, bool(config.suffix or config.template), marks)
    n_given = (canvas != V).long().cumprod(-1).sum(-1).tolist()  # tokens at the start of every text
    block_size = canvas.size(1) if model.any_length else model.config.block_size
    overlap = config.overlap or block_size // 2

    def ended(canvas, at):
        """Where each text ends, 0: nowhere yet; those that are known, `at`, stay."""
        return [end or ends.ending(row, start, V, stops, config.min_entropy)
                for row, start, end in zip(canvas.tolist(), n_given, at)]

    if config.min_entropy and model.revises:
        raise ValueError("min_entropy ends a text while it is written: this model may change any token "
                         "until the last step")
    canvases, at, began = [canvas], [0] * len(canvas), time.time()
    with quick(model, config.compile) as calls:
        for new in common.generate(model, canvas, block_size, overlap, **how):
            if config.watch:
                pause = time.time()
                terminal.show(canvas[0].tolist(), new[0].tolist(), tokenizer)
                began += time.time() - pause
            if config.html:
                canvases.append(new)
            canvas = new
            if (stops or config.min_entropy) and not model.revises:
                at = ended(canvas, at)
                if all(at):
                    break
    texts = []
    for row, end, n in zip(canvas.tolist(), ended(canvas, at), n_given):
        begin = n if config.chat else row[0] == tokenizer.first == tokenizer.end  # <|endoftext|> in front
        row = [i for i in row[begin:end or (row.index(V) if V in row else None)] if i not in marks]
        text = tokenizer.text(row)
        texts.append(ends.up_to(text, config.stop, tokenizer.text(row[:-1])) if end else text)
    return texts, canvases, len(calls), time.time() - began


# ---- from a prompt to a canvas ----------------------------------------------------------------------------

def make_canvas(config, start, tokenizer, block_size, any_length=False):
    """One row of tokens that begins with `start`, V where the model is to write: (length,) int64.
    any_length: of a model that writes window after window, block_size tokens each, until the row is full."""
    V, bos = tokenizer.vocab_size, [] if tokenizer.first is None else [tokenizer.first]
    if config.template:
        first, *others = prompt_of(config.template).split('___')
        if not others:
            fail("template has no ___ (three underscores) to fill")
        row = bos + ids_of(tokenizer, first)
        for text in others:
            row += [V] * config.hole + ids_of(tokenizer, text, rest=True)
    else:
        suffix = ids_of(tokenizer, prompt_of(config.suffix), rest=True)
        length = config.length
        if config.chat:
            start = chat.turn(tokenizer, start)[0]
            length = len(start) + (config.length or min(ANSWER, block_size - len(start)))
        elif start and tokenizer.sep:  # models of pairs: append the separator, once
            start = bos + ids_of(tokenizer, start.removesuffix(tokenizer.meta['sep'])) + tokenizer.sep
        else:
            start = bos + ids_of(tokenizer, start)
        default = len(start) + WINDOWS * block_size if any_length else min(block_size, 1024)
        length = length or default
        block_size = length if any_length else block_size
        if len(start) >= min(length, block_size):
            fail(f"start has {len(start)} tokens: it must be shorter than the text ({length}) "
                 f"and the block ({block_size}); shorten it or raise --length")
        if len(start) + len(suffix) >= length:
            fail(f"start and suffix fill all {length} tokens: raise --length")
        row = start + [V] * (length - len(start) - len(suffix)) + suffix
    if len(row) > block_size and (config.template or config.suffix):
        fail(f"infilling sees one context: {len(row)} tokens are more than block_size={block_size}")
    return torch.tensor(row)


# ---- from the command line --------------------------------------------------------------------------------

def main(argv):
    config, chosen = settings(argv, __doc__, Config, functions=samplers.functions(), others=samplers.help())
    if config.html:
        files.writable(config.html, 'html')
    device = common.pick_device(config.device)
    path, checkpoint = find.find(config.out_dir, config.which)
    model, tokenizer = common.load_model(checkpoint, device, config.weights, config.dtype)
    block_size = model.config.block_size
    if model.any_length and 'overlap' in chosen:
        fail(f"overlap is not for {checkpoint['objective']}, which writes a text of any length in one go")
    if not model.any_length and config.overlap >= block_size:
        fail(f"overlap={config.overlap} must be smaller than block_size={block_size}")
    asked = {name: value for name, value in chosen.items()  # --rule= asks for none
             if value != '' and (name in SAMPLER or name not in knobs_of(Config))}
    marks = tuple(chat.turn(tokenizer, config.chat)[1]) if config.chat else ()
    if config.early_end:
        asked[config.early_end] = marks or (() if tokenizer.end is None else (tokenizer.end,))
        if not asked[config.early_end]:
            fail("early_end is about the token that ends a text: this model has none")
    try:
        best = {} if config.rule else model.reading
        how = arguments(model.sample, best | asked, {name: getattr(config, name) for name in SAMPLER})
        rows = [make_canvas(config, start, tokenizer, block_size, model.any_length)
                for start in starts(config.chat or config.start) for _ in range(config.num_samples)]
        canvas = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.vocab_size)
        common.seed_everything(config.seed)
        with torch.no_grad(), common.precision(model, config.dtype, device):
            texts, canvases, calls, seconds = write(model, tokenizer, config, canvas.to(device), how, marks)
    except ValueError as e:  # what this model cannot do
        fail(f"{path}: {e}")
    if config.html:
        title = f"{checkpoint['objective']}, {calls} network calls"
        files.write(config.html, page.render(canvases, tokenizer, title))
    print(('\n' + '-' * 60 + '\n').join(texts), flush=True)
    print(f"[{path}, iteration {checkpoint['iter']}: {calls} network calls, {seconds:.2f} s, "
          f"{canvas.numel() / seconds:,.0f} tokens/s]", file=sys.stderr)
    if config.html:
        print(f"[{config.html}: {len(canvases)} frames]", file=sys.stderr)


if __name__ == '__main__':
    script(main)
