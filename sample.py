"""
Write text with any checkpoint: unmasking, infilling, left to right, and texts longer than the model's block.

    python sample.py --steps=64                                   # the newest checkpoint under out*/
    python sample.py --start="ROMEO:" --suffix="Exit." --rule=eb --gamma=0.1
    python sample.py --template="To be, ___ that is the ___." --hole=12
    python sample.py --watch                                      # the text as it denoises, in the terminal
    python sample.py --html=sample.html                           # the same as a page with a slider
    python sample.py --out_dir=out-latent --start="I did not know what to make of it." --sentences=5
    python sample.py --out_dir=out-vae --reconstruct --start="..."   # --interpolate="A|B", --nearest=3

The rules: RULES.

A canvas is (num_samples, length) tokens with the id V where text is still to be written.
`model.sample(canvas, ...)` yields it after every network call, those of vae.py and latent.py after every
window; what is printed, watched or saved as a page is that one sequence of canvases.
"""
import html
import itertools
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from text import files
import latent
from hub.find import find
import score
import unmask
import vae
from text import vocabulary
from configurator import Filename, build, fail, help_text, read, script


@dataclass
class Config(unmask.Config):
    out_dir: Filename = ''     # the checkpoint, also one of others (hub/find.py); '': the newest out*/
    which: str = 'best'        # best | last
    weights: str = 'ema'       # ema | slow, a second average | model, not averaged
    device: str = 'auto'       # auto | cpu | cuda | mps
    dtype: str = 'auto'        # auto | float32 | bfloat16
    seed: int = 1337           # equal seeds, equal texts
    num_samples: int = 2       # texts, side by side in one batch
    length: int = 0            # tokens of a text, prompt included; 0: the model's block size, at most 1,024
    overlap: int = 0           # beyond the block: tokens of the last part kept as context; 0: half a block
    start: str = ''            # given text at the start; FILE:path: one a line, num_samples texts for each
    suffix: str = ''           # given text at the end; FILE:path reads it from a file, as for template
    template: str = ''         # given text with ___ for each hole, instead of start and suffix
    hole: int = 8              # tokens of a hole
    stop: str = ''             # end a text behind this one; <|endoftext|>: the model's own end
    min_entropy: float = 0.0   # end a text whose last 256 tokens have less entropy, nats (BD3-LM: 4)
    sentences: int = 0         # vae, latent: windows to write behind the start; 0: what fits in length, or 5
    joined: str = ' | '        # vae, latent: what stands between them
    reconstruct: bool = False  # vae, latent: the start as latents and back
    interpolate: str = ''      # vae, latent: A|B, two texts: the way from the latents of one to the other's
    points: int = 7            # texts on that way
    nearest: int = 0           # vae, latent: so many training windows that are nearest to the start
    watch: bool = False        # show the denoising in the terminal
    html: Filename = ''        # write the denoising to this file, a page that needs nothing else

    def __post_init__(self):
        super().__post_init__()
        for name in ('num_samples', 'hole'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.points < 2:
            raise ValueError(f"points={self.points} must be at least 2: A and B")
        for name in ('seed', 'length', 'overlap', 'min_entropy', 'sentences', 'nearest'):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.template and (self.start or self.suffix or self.length):
            raise ValueError("template says where everything goes: leave out start, suffix and length")


PAUSE = 0.05   # seconds between the pictures of --watch
SENTENCES = 5  # windows behind a start, unless --sentences or --length says


def given(text):
    """A prompt from the command line: FILE:path is what that file holds."""
    if not text.startswith('FILE:'):
        return text
    return files.read_text(os.path.expanduser(text[5:])).removesuffix('\n')


def starts(text):
    """The given starts: of FILE:path the lines that are not empty, else the text itself."""
    if not text.startswith('FILE:'):
        return [text]
    lines = [line for line in given(text).split('\n') if line.strip()]
    return lines or fail(f"{text[5:]} holds no start")


def known(tokenizer, text, rest=False):
    """The ids of a given text (rest: of one that does not begin there); characters that a model of lines does
    not know end the script."""
    ids = tokenizer.encode_rest(text) if rest else tokenizer.encode(text)
    if tokenizer.bos is not None and vocabulary.UNK in ids:
        unknown = sorted({c for c in text if vocabulary.UNK in tokenizer.encode(c)})
        fail(f"not in the vocabulary of this model: {' '.join(map(repr, unknown[:10]))}")
    return ids


def make_canvas(config, start, tokenizer, block_size, window=0):
    """One row of tokens that begins with `start`, V where the model is to write: (length,) int64. window: of
    a model that writes window after window, any number of them, else 0."""
    blank, bos = tokenizer.vocab_size, [] if tokenizer.bos is None else [tokenizer.bos]
    if config.template:
        first, *parts = given(config.template).split('___')
        if not parts:
            fail("template has no ___ (three underscores) to fill")
        row = bos + known(tokenizer, first)
        row += [i for part in parts for i in [blank] * config.hole + known(tokenizer, part, rest=True)]
    else:
        suffix = known(tokenizer, given(config.suffix), rest=True)
        if start and tokenizer.sep:  # of a model that answers: behind the prompt, also if it stands there
            start = bos + known(tokenizer, start.removesuffix(tokenizer.meta['sep'])) + tokenizer.sep
        else:
            start = bos + known(tokenizer, start)
        if window:
            block_size = len(start) + (config.sentences or SENTENCES) * window
        length = config.length or min(block_size, 1024)
        block_size = length if window else block_size
        if len(start) >= min(length, block_size):
            fail(f"start has {len(start)} tokens: it must be shorter than the text ({length}) "
                 f"and the block ({block_size}); shorten it or raise --length")
        if len(start) + len(suffix) >= length:
            fail(f"start and suffix fill all {length} tokens: raise --length")
        row = start + [blank] * (length - len(start) - len(suffix)) + suffix
    if len(row) > block_size and (config.template or config.suffix):
        fail(f"infilling sees one block: {len(row)} tokens are more than block_size={block_size}")
    return torch.tensor(row)


ENDS = ('<|endoftext|>', '</s>', '<eos>')  # names of a model's own end


def stop_ids(config, tokenizer):
    """Where a text ends, as functions (ids, how many of them are given) -> how many it has then, 0: it goes
    on. Behind the text --stop, however it was cut into tokens; and behind the end of a line or an answer,
    where a dataset is made of these."""
    def at_end(ids, start):
        return ids.index(tokenizer.end, start) + 1 if tokenizer.end in ids[start:] else 0
    stops, marked = [], (tokenizer.bos, tokenizer.sep) != (None, None)
    if config.stop in ENDS and tokenizer.end is not None:
        stops.append(at_end)
    elif config.stop:
        known(tokenizer, config.stop)  # a character that cannot be written ends the script
    if config.stop:
        stops.append(lambda ids, start: behind(tokenizer, ids, start, config.stop.encode(errors='replace')))
    if marked and not (config.suffix or config.template):
        stops.append(at_end)
    return stops


def behind(tokenizer, ids, start, text):
    """How many ids it takes until those from `start` on hold the bytes `text`, 0: they do not."""
    parts = [tokenizer.pieces[i] for i in ids[start:]]
    if start == 0 and parts:  # a space that is not shown
        parts[0] = parts[0].removeprefix(tokenizer.lead.encode())
    at = b''.join(parts).find(text)
    if at < 0:
        return 0
    lengths = itertools.accumulate(map(len, parts))
    return next(n for n, length in enumerate(lengths, start + 1) if length >= at + len(text))


def ending(row, start, blank, stops, min_entropy, last=256):
    """Where a text ends that has met a stopping rule, else 0. row: ids, the first `start` given.

    At the first of the `stops` (see `stop_ids`); or here, if the last 256 ids have an entropy below
    min_entropy nats (as what repeats itself has, BD3-LM arXiv 2503.09573). Only the part before the first
    blank is looked at.
    """
    written = row[:row.index(blank)] if blank in row else row
    found = [n for n in (stop(written, start) for stop in stops) if n]
    if found:
        return min(found)
    if min_entropy and len(written) >= max(start + 1, last):
        p = torch.bincount(torch.tensor(written[-last:])) / last
        return len(written) if -torch.special.xlogy(p, p).sum() < min_entropy else 0
    return 0


def up_to(text, stop, before):
    """A text without what its last token holds behind the first --stop that ends in it; before: the text
    without that token."""
    at = text.find(stop, max(0, len(before) - len(stop) + 1)) if stop else -1
    return text[:at + len(stop)] if at >= 0 else text


def stream(model, canvas, config):
    """Generator of (canvas, start (B,) of the window being written, or None)."""
    block_size = model.config.block_size
    if hasattr(model, 'unroll'):
        most = config.sentences or (0 if config.length else SENTENCES)
        yield from model.unroll(canvas, **config.knobs(), most=most)
    else:
        overlap = config.overlap or block_size // 2
        for canvas in unmask.generate(model, canvas, block_size, overlap, **config.knobs()):
            yield canvas, None


def in_windows(row, starts, blank):
    """A row's prompt and the windows behind it, which begin at `starts`; up to the first blank."""
    row = row[:row.index(blank)] if blank in row else row
    borders = [0, *starts, len(row)]
    return [row[a:b] for a, b in zip(borders, borders[1:]) if row[a:b]]


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
<p>TITLE<p><label>step <output id="o"></output> <input id="s" type="range" min="0" value="0"></label>
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


def reconstruct(config, encoder, decode, windows, nearest):
    """Lines: every window of the start, what comes back of it, and how much."""
    x = torch.cat([windows(text) for text in starts(config.start)])
    again = encoder.reconstruct(x.repeat_interleave(config.num_samples, 0), config.tau, max(0, config.doubt))
    for row, copies in zip(x, again.split(config.num_samples)):
        yield decode(row)
        yield from (f"  -> {decode(copy)}" for copy in copies)
        yield f"  {(copies == row)[:, row != encoder.mask_id].float().mean():.0%} of the tokens"


def interpolate(config, encoder, decode, windows, nearest):
    """Lines: texts on the way from the latents of A to those of B."""
    ends = config.interpolate.split('|')
    if len(ends) != 2 or not all(ends):
        fail("interpolate takes two texts: --interpolate='A|B'")
    x = [windows(text) for text in ends]
    if any(len(rows) > 1 for rows in x):
        fail(f"interpolate is between two windows, of at most {x[0].size(1)} tokens each")
    a, b = encoder.encode(x := torch.cat(x))
    z = torch.stack([vae.slerp(a, b, i / (config.points - 1)) for i in range(config.points)])
    blank = torch.full((len(z), x.size(1)), encoder.mask_id, device=x.device)
    longer = int((x != encoder.mask_id).sum(-1).max())
    return map(decode, encoder.write(encoder.raw(z), blank, longer, config.tau, max(0, config.doubt)))


def neighbours(config, encoder, decode, windows, nearest):
    """Lines: every window of the start and the training windows nearest to it, with their cosines."""
    x = torch.cat([windows(text) for text in starts(config.start)])
    for row, found in zip(x, nearest(encoder.encode(x))):
        yield decode(row)
        yield from (f"  {cosine:.3f}  {decode(window)}" for cosine, window in found)


def about_latents(tool, config, encoder, tokenizer, checkpoint, folder):
    """The lines that a tool prints."""
    device = encoder.mean.device
    if tool != interpolate and not config.start:
        fail("reconstruct and nearest are about a text: give one with --start")

    def decode(row):
        return tokenizer.decode(row[row != encoder.mask_id].tolist())

    def windows(text):
        return encoder.windows_of(torch.tensor(known(tokenizer, text), device=device))

    def nearest(z):
        """Of latents z (K, n, d): lists of (cosine, training window)."""
        dataset = checkpoint['run']['dataset']
        if common.load_meta(dataset) != checkpoint['tokenizer']:
            fail(f"data/{dataset} has been prepared anew from another text: its windows cannot be compared")
        tokens = common.load_tokens(dataset, 'train', tokenizer.vocab_size, device)
        cut = encoder.cut(tokens, tokenizer.end)
        there = latent.cached(encoder, cut, folder).to(device).flatten(1).float()
        with torch.autocast(device.type, enabled=False):  # bfloat16 has three digits
            cosine = F.normalize(z.flatten(1), dim=-1) @ F.normalize(there, dim=-1).T
        best = cosine.topk(min(config.nearest, len(there)))
        return [zip(c.tolist(), cut.window(i)) for c, i in zip(best.values, best.indices)]
    return tool(config, encoder, decode, windows, nearest)


def write(config, path, checkpoint, model, tokenizer, device):
    """Write the texts, show them on the way, print them."""
    block_size, blank = model.config.block_size, tokenizer.vocab_size
    window = block_size if hasattr(model, 'unroll') else 0
    prompts = [prompt for prompt in starts(config.start) for _ in range(config.num_samples)]
    canvas = [make_canvas(config, p, tokenizer, block_size, window) for p in prompts]
    canvas = torch.nn.utils.rnn.pad_sequence(canvas, batch_first=True, padding_value=blank).to(device)
    begin, stops = (canvas != blank).long().cumprod(-1).sum(-1).tolist(), stop_ids(config, tokenizer)
    revises = model.revises or config.trace
    unit = 'steps' if config.trace else 'windows' if window else 'network calls'
    if config.min_entropy and revises:
        fail(f"min_entropy ends a text while it is written: {checkpoint['objective']} writes all at once, "
             f"and so does trace")

    def ended(ends, canvas):
        """Where each text ends, 0: nowhere yet; those of `ends` stay."""
        return [end or ending(row, start, blank, stops, config.min_entropy)
                for end, start, row in zip(ends, begin, canvas.tolist())]

    ends, calls, frames, cuts, began = [0] * len(prompts), 0, [canvas], [], time.time()
    for canvas, start in stream(model, canvas, config):
        calls += 1
        if start is not None and start.tolist() not in cuts[-1:]:
            cuts.append(start.tolist())
        if config.trace and not config.watch:
            print(f"{calls:5d}  {tokenizer.decode(canvas[0, begin[0]:].tolist(), '')}")
        if config.watch:
            show(frames[-1][0].tolist(), canvas[0].tolist(), tokenizer)
            time.sleep(PAUSE)
            began += PAUSE
        if config.watch or config.html:
            frames.append(canvas)
        if (stops or config.min_entropy) and not revises:
            ends = ended(ends, canvas)
            if all(ends):
                break
    texts = []
    for i, (row, end) in enumerate(zip(canvas.tolist(), ended(ends, canvas))):
        row = row[:end or None]
        pieces = in_windows(row, [cut[i] for cut in cuts], blank) if window else [row]
        text = config.joined.join(map(tokenizer.text, pieces))
        texts.append(up_to(text, config.stop, tokenizer.text(row[:-1])) if end else text)
    seconds = time.time() - began
    if config.html:
        files.write(config.html, page(frames, tokenizer, f"{checkpoint['objective']}, {calls} {unit}"))
    print(('\n' + '-' * 60 + '\n').join(texts), flush=True)
    print(f"[{path}, iteration {checkpoint['iter']}: {calls} {unit}, {seconds:.2f} s, "
          f"{canvas.numel() / seconds:,.0f} tokens/s]", file=sys.stderr)
    if config.html:
        print(f"[{config.html}: {len(frames)} frames]", file=sys.stderr)


def main(argv):
    knobs, _, flags = read(argv)
    if 'help' in flags:
        rules = (f"{', '.join(unmask.RULES)}; of score.py: {', '.join(score.RULES)}; "
                 f"of latent.py: {', '.join(latent.RULES)}")
        return print(help_text(__doc__.replace('RULES', rules), Config))
    config, _ = build({**knobs, **flags}, Config)
    if config.html:
        files.writable(config.html, 'html')
    device = common.pick_device(config.device)
    path, checkpoint = find(config.out_dir, config.which)
    model, tokenizer = common.load_model(checkpoint, device, config.weights)
    tools = dict(reconstruct=reconstruct, interpolate=interpolate, nearest=neighbours)
    latents = hasattr(model, 'unroll')
    others = {'temperature', 'overlap'} if latents else {*tools, 'sentences', 'joined', 'points'}
    for name in (knobs.keys() | flags.keys()) & others:
        instead = dict(temperature='take --tau', overlap='every window sees the one before')
        fail(f"{name} is not for {checkpoint['objective']}: {instead.get(name, 'it is for vae and latent')}")
    asked = [tool for name, tool in tools.items() if getattr(config, name)]
    if not asked and config.overlap >= model.config.block_size:
        fail(f"overlap={config.overlap} must be smaller than block_size={model.config.block_size}")
    try:
        with torch.no_grad(), common.autocast(device, common.pick_dtype(config.dtype, device)):
            common.seed_everything(config.seed)
            for tool in asked:
                encoder = getattr(model, 'vae', model)
                lines = about_latents(tool, config, encoder, tokenizer, checkpoint, Path(path).parent)
                print('\n'.join(lines))
            if not asked:
                write(config, path, checkpoint, model, tokenizer, device)
    except ValueError as e:  # what this model cannot do
        fail(f"{path}: {e}")


if __name__ == '__main__':
    script(main)
