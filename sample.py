"""
Write text with any checkpoint: unmasking, infilling, left to right, and texts longer than the model's block.

    python sample.py --steps=64                                   # the newest checkpoint under out*/
    python sample.py --start="ROMEO:" --suffix="Exit." --rule=eb --gamma=0.1
    python sample.py --template="To be, ___ that is the ___." --hole=12
    python sample.py --watch                                      # the text as it denoises, in the terminal
    python sample.py --html=sample.html                           # the same as a page with a slider

The rules: RULES.

A canvas is (num_samples, length) tokens with the id V where text is still to be written.
`model.sample(canvas, ...)` yields it after every network call; what is printed, watched or saved as a page
is that one sequence of canvases.
"""
import html
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import score
import unmask
from configurator import build, fail, help_text, read


@dataclass
class Config(unmask.Config):
    out_dir: str = ''          # folder of the checkpoint; '': the newest out*/
    which: str = 'best'        # best | last
    weights: str = 'ema'       # ema | slow, a second average | model, not averaged
    device: str = 'auto'       # auto | cpu | cuda | mps
    dtype: str = 'auto'        # auto | float32 | bfloat16
    seed: int = 1337           # equal seeds, equal texts
    num_samples: int = 2       # texts, side by side in one batch
    length: int = 0            # tokens of a text, prompt included; 0: the model's block size
    overlap: int = 0           # beyond the block: tokens of the last part kept as context; 0: half a block
    start: str = ''            # given text at the start; FILE:path: one a line, num_samples texts for each
    suffix: str = ''           # given text at the end; FILE:path reads it from a file, as for template
    template: str = ''         # given text with ___ for each hole, instead of start and suffix
    hole: int = 8              # tokens of a hole
    stop: str = ''             # end a text behind this one; <|endoftext|> is GPT-2's
    min_entropy: float = 0.0   # end a text whose last 256 tokens have less entropy, nats (BD3-LM: 4)
    watch: bool = False        # show the denoising in the terminal
    html: str = ''             # write the denoising to this file, a page that needs nothing else

    def __post_init__(self):
        super().__post_init__()
        for name in ('num_samples', 'hole'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ('seed', 'length', 'overlap', 'min_entropy'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.template and (self.start or self.suffix or self.length):
            raise ValueError("template says where everything goes: leave out start, suffix and length")


PAUSE = 0.05  # seconds between the pictures of --watch


def given(text):
    """A prompt from the command line: FILE:path is what that file holds."""
    if not text.startswith('FILE:'):
        return text
    try:
        return Path(text[5:]).read_text(encoding='utf-8').removesuffix('\n')
    except (OSError, UnicodeDecodeError) as e:
        fail(f"cannot read {text[5:]}: {e}")


def starts(text):
    """The given starts: of FILE:path the lines that are not empty, else the text itself."""
    if not text.startswith('FILE:'):
        return [text]
    lines = [line for line in given(text).split('\n') if line.strip()]
    return lines or fail(f"{text[5:]} holds no start")


def known(tokenizer, text):
    """The ids of a given text; characters that a model of lines does not know end the script."""
    ids = tokenizer.encode(text)
    if tokenizer.bos is not None and common.UNK in ids:
        unknown = sorted({c for c in text if common.UNK in tokenizer.encode(c)})
        fail(f"not in the vocabulary of this model: {' '.join(map(repr, unknown[:10]))}")
    return ids


def make_canvas(config, start, tokenizer, block_size):
    """One row of tokens that begins with `start`, V where the model is to write: (length,) int64."""
    blank, bos = tokenizer.vocab_size, [] if tokenizer.bos is None else [tokenizer.bos]
    if config.template:
        parts = [known(tokenizer, part) for part in given(config.template).split('___')]
        if len(parts) == 1:
            fail("template has no ___ (three underscores) to fill")
        row = bos + parts[0] + [i for part in parts[1:] for i in [blank] * config.hole + part]
    else:
        start, suffix = bos + known(tokenizer, start), known(tokenizer, given(config.suffix))
        length = config.length or block_size
        if len(start) >= min(length, block_size):
            fail(f"start has {len(start)} tokens: it must be shorter than the text ({length}) "
                 f"and the block ({block_size}); shorten it or raise --length")
        if len(start) + len(suffix) >= length:
            fail(f"start and suffix fill all {length} tokens: raise --length")
        row = start + [blank] * (length - len(start) - len(suffix)) + suffix
    if len(row) > block_size and (config.template or config.suffix):
        fail(f"infilling sees one block: {len(row)} tokens are more than block_size={block_size}")
    return torch.tensor(row)


def stop_ids(config, tokenizer):
    """Lists of ids behind which a text ends: --stop, and <eos> where lines are texts of their own."""
    end, stops = [tokenizer.end], []
    if config.stop:
        stops.append(end if config.stop == '<|endoftext|>' and tokenizer.end is not None
                     else known(tokenizer, config.stop))
    if tokenizer.bos is not None and not (config.suffix or config.template):
        stops.append(end)
    return stops


def ending(row, start, blank, stops, min_entropy, last=256):
    """Where a text ends that has met a stopping rule, else 0. row: ids, the first `start` given.

    Behind the first of the `stops` (lists of ids); or here, if the last 256 ids have an entropy below
    min_entropy nats (as what repeats itself has, BD3-LM arXiv 2503.09573). Only the part before the first
    blank is looked at.
    """
    written = row[:row.index(blank)] if blank in row else row
    for i in range(start, len(written)):
        for stop in stops:
            if written[i:i + len(stop)] == stop:
                return i + len(stop)
    if min_entropy and len(written) >= max(start + 1, last):
        p = torch.bincount(torch.tensor(written[-last:])) / last
        return len(written) if -torch.special.xlogy(p, p).sum() < min_entropy else 0
    return 0


def show(old, new, tokenizer):
    """Draw a canvas (L,) over the last one in the terminal: blanks dim, tokens new since `old` bright."""
    text = ''
    for before, after in zip(old, new):
        char = tokenizer.decode([after])
        text += f'\033[2m{char}\033[0m' if after == tokenizer.vocab_size else \
            f'\033[1;32m{char}\033[0m' if before != after else char
    sys.stdout.write('\033[H\033[J' + text + '\n')
    sys.stdout.flush()


PAGE = """<!doctype html><meta charset="utf-8"><title>unmask</title>
<style>body{font:16px/1.4 ui-monospace,monospace;max-width:52em;margin:2em auto;padding:0 1em;
color:#222;background:#fff}
pre{white-space:pre-wrap;border-top:1px solid #ccc;padding-top:1em}input{width:100%}.m{color:#bbb}
.n{background:#0072b2;color:#fff}</style>
<p>TITLE<p><label>network call <output id="o"></output> <input id="s" type="range" min="0" value="0"></label>
<button id="b">play</button><div id="t"></div><script>
const frames = FRAMES, text = TEXT, blank = BLANK,
  s = document.getElementById('s'), t = document.getElementById('t')
s.max = frames.length - 1
function show() {
  const now = frames[s.value], old = frames[Math.max(0, s.value - 1)]
  document.getElementById('o').textContent = s.value + ' of ' + s.max
  t.replaceChildren(...now.map((row, b) => {
    const pre = document.createElement('pre')
    row.forEach((id, i) => {
      const span = document.createElement('span')
      span.textContent = text[id]
      span.className = id == blank ? 'm' : id != old[b][i] ? 'n' : ''
      pre.append(span)
    })
    return pre
  }))
}
let timer = 0
document.getElementById('b').onclick = () => {
  clearInterval(timer)
  if (s.value == s.max) s.value = 0
  timer = setInterval(() => { s.value == s.max ? clearInterval(timer) : (s.value++, show()) }, 60)
}
s.oninput = () => { clearInterval(timer); show() }
show()
</script>"""


def page(frames, tokenizer, title):
    """The canvases as one HTML page with a slider; nothing is loaded from elsewhere. Tokens are shown one by
    one: a character that GPT-2's byte pairs cut in two is two of U+FFFD."""
    text = {i: tokenizer.piece(i) for i in torch.cat(frames).unique().tolist()}
    parts = {'TITLE': html.escape(title), 'BLANK': str(tokenizer.vocab_size),
             'TEXT': json.dumps(text).replace('<', '\\u003c'),
             'FRAMES': json.dumps([frame.tolist() for frame in frames], separators=(',', ':'))}
    return re.sub('|'.join(parts), lambda found: parts[found[0]], PAGE)


def main(argv):
    files, _, flags = read(argv)
    if 'help' in flags:
        rules = f"{', '.join(unmask.RULES)}; of score.py: {', '.join(score.RULES)}"
        return print(help_text(__doc__.replace('RULES', rules), Config))
    config, = build({**files, **flags}, Config)
    device = common.pick_device(config.device)
    checkpoint = common.load(path := common.find_checkpoint(config.out_dir, config.which))
    model, tokenizer = common.load_model(checkpoint, device, config.weights)
    block_size, blank = model.config.block_size, tokenizer.vocab_size
    overlap = config.overlap or block_size // 2
    if overlap >= block_size:
        fail(f"overlap={overlap} must be smaller than block_size={block_size}")
    prompts = [prompt for prompt in starts(config.start) for _ in range(config.num_samples)]
    canvas = torch.stack([make_canvas(config, p, tokenizer, block_size) for p in prompts]).to(device)
    begin, stops = (canvas != blank).long().cumprod(-1).sum(-1).tolist(), stop_ids(config, tokenizer)
    if config.min_entropy and model.revises:
        fail(f"min_entropy ends a text while it is written: {checkpoint['objective']} writes all at once")

    def found(canvas):
        """Where each text ends, 0: nowhere yet."""
        return [ending(row, start, blank, stops, config.min_entropy)
                for start, row in zip(begin, canvas.tolist())]
    ends = [0] * len(prompts)

    common.seed_everything(config.seed)
    calls, frames, began = 0, [canvas], time.time()
    try:
        with common.autocast(device, common.pick_dtype(config.dtype, device)):
            for canvas in unmask.generate(model, canvas, block_size, overlap, **config.knobs()):
                calls += 1
                if config.watch:
                    show(frames[-1][0].tolist(), canvas[0].tolist(), tokenizer)
                    time.sleep(PAUSE)
                    began += PAUSE
                if config.watch or config.html:
                    frames.append(canvas)
                if (stops or config.min_entropy) and not model.revises:
                    ends = [end or new for end, new in zip(ends, found(canvas))]
                    if all(ends):
                        break
    except ValueError as e:  # what this model cannot do
        fail(f"{path}: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    ends = [end or new for end, new in zip(ends, found(canvas))]
    texts = [tokenizer.decode(row[:end or None]) for row, end in zip(canvas.tolist(), ends)]
    seconds = time.time() - began
    print(('\n' + '-' * 60 + '\n').join(texts))
    print(f"[{path}, iteration {checkpoint['iter']}: {calls} network calls, {seconds:.2f} s, "
          f"{canvas.numel() / seconds:,.0f} tokens/s]", file=sys.stderr)
    if config.html:
        title = f"{checkpoint['objective']}, {calls} network calls"
        Path(config.html).write_text(page(frames, tokenizer, title), encoding='utf-8')
        print(f"[{config.html}: {len(frames)} frames]", file=sys.stderr)


if __name__ == '__main__':
    main(sys.argv[1:])
