"""The canvases of a sampler as a page with a slider (sample.py --html)."""
import html
import json
import re

import torch

PAGE = """<!doctype html><meta charset="utf-8"><title>unmask</title>
<style>body{font:16px/1.4 ui-monospace,monospace;max-width:52em;margin:2em auto;padding:0 1em;
color:#222;background:#fff}
pre{white-space:pre-wrap;border-top:1px solid #ccc;padding-top:1em}input{width:100%}.m{color:#bbb}
.n{background:#0072b2;color:#fff}</style>
<p>TITLE<p><label>step <output id="o"></output> <input id="s" type="range" min="0" value="0"></label>
<button id="b">play</button><div id="t"></div><script>
const frames = FRAMES, text = TEXT, mask = MASK,
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
      span.className = id == mask ? 'm' : id != old[b][i] ? 'n' : ''
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


def render(canvases, tokenizer, title):
    """The canvases (B, L) as one HTML page; nothing is loaded from elsewhere. Tokens are shown one by one: a
    character that GPT-2's byte pairs cut in two is two of U+FFFD."""
    text = {i: tokenizer.piece(i) for i in torch.cat(canvases).unique().tolist()}
    parts = {'TITLE': html.escape(title), 'MASK': str(tokenizer.vocab_size),
             'TEXT': json.dumps(text).replace('<', '\\u003c'),
             'FRAMES': json.dumps([canvas.tolist() for canvas in canvases], separators=(',', ':'))}
    return re.sub('|'.join(parts), lambda found: parts[found[0]], PAGE)
