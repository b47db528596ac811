"""
Keys and values that are kept while a text is written part by part (Fast-dLLM arXiv 2505.22618).

Every token of a denoiser sees every other, so each token that is written changes the keys and values of all:
what is kept is only nearly right. It is read anew for every part (and every `refresh` calls, if asked for):
    prefix   inside a part, the network reads the part and all behind it, and keeps what stands before
    dual     it reads the part alone, and keeps what stands before and behind
With refresh=1 nothing is kept and the texts are those without a cache. Block diffusion (block.py) is trained
so that a text never changes what stands before: there the cache is exact.
"""
import torch
import torch.nn.functional as F

import model
from parts.adapted import normalised
from parts.graphs import graphed
from parts.neighbours import TAPS


class Canvas(model.Cache):
    """What the modules keep of a whole canvas; a call renews it from place `low` to `high`."""

    def at(self, low, high):
        self.low, self.high, self.length = low, high, 0
        return self

    def append(self, module, *new):
        for old, part in zip(self.kept.setdefault(module, new), new):
            old[..., self.low:self.high, :] = part
        return self.kept[module]

    def beside(self, h, first, t):
        """parts/neighbours.py's `beside` for t tokens from `low` on, in a canvas h (B, T, C)."""
        h = F.pad(h, (0, 0, -first, first + TAPS - 1))
        return [h[:, self.low + i:self.low + i + t] for i in range(TAPS)]


class Cached:
    """denoise(xt, t) -> log p(x0 | xt) (B, T, V), right at the masked places of the part that is being
    written, the only ones that a rule with a part_length looks at. The next call writes over what one call
    has returned. Raises ValueError."""

    def __init__(self, net, xt, kind, refresh, knobs):
        """knobs: those of the rule and of unmask.unmask, which work together with a cache."""
        begin = (xt == net.mask_id).long().argmax(-1).unique().tolist()
        length = knobs.get('part_length')
        if not kind:
            raise ValueError(f"refresh={refresh} is for a cache, --cache=prefix or dual")
        if not length or knobs.get('cfg'):
            raise ValueError(f"cache={kind} keeps what stands around the part that is being written: it "
                             f"needs a part_length, and a rule that has one, and no cfg")
        if len(begin) > 1:
            raise ValueError("a cache is for texts that all begin with equally many given tokens")
        self.net, self.kind, self.refresh, self.length = net, kind, refresh, length
        self.begin, self.part, self.age, self.cache = begin[0], None, 0, Canvas()
        self.out, self.readers = torch.zeros(*xt.shape, net.mask_id, device=xt.device), {}

    def __call__(self, xt, t):
        masked, T = xt == self.net.mask_id, xt.size(1)
        first = int(masked.any(0).long().argmax())
        start = first - (first - self.begin) % self.length  # of the part
        end = min(start + self.length, T)
        if start != self.part or self.refresh and self.age >= self.refresh:
            self.part, self.age, low, high = start, 0, 0, T
            self.readers = dict(list(self.readers.items())[:1])  # the first is that of the whole canvas
        else:
            low, high = start, T if self.kind == 'prefix' else end
        calls = getattr(self.net, 'calls', [])  # see parts/graphs.py
        n, h = len(calls), self.hidden(xt, t, low, high)
        calls[n:], self.age = [1], self.age + 1
        asked = masked[:, start:end]
        logits = self.net.gpt.logits(h[:, start - low:end - low][asked])[..., :self.net.mask_id]
        self.out[:, start:end][asked] = normalised(logits, self.net.config)
        return self.out

    def hidden(self, xt, t, low, high):
        """What the network says of the tokens low to high - 1, (B, high - low, C), reading them alone."""
        gpt = self.net.gpt
        shift, leads = getattr(gpt, 'shift', False), getattr(gpt, 'leads', False)
        if leads:  # [BOS] stands before: token i is at i + 1, and what is said of it at i
            xt = F.pad(xt, (1, 0), value=self.net.mask_id + 1)
        a, b = max(0, low - (shift and not leads)), high + leads
        if (a, b) not in self.readers:
            self.readers[a, b] = graphed(lambda x, t: self.read(x, t, a, b))
        h = self.readers[a, b](xt[:, a:b], t)
        if not shift:
            return h
        return h[:, :-1] if leads or low else torch.cat([h[:, :1], h[:, :-1]], 1)

    def read(self, x, t, a, b):
        """The trunk at the tokens x (B, b - a) from place a on, which renews what is kept of them."""
        cache, gpt = self.cache.at(a, b), self.net.gpt
        return gpt.trunk(gpt.embed(x), cache=cache, time=t if self.net.config.time_input else None,
                         where=torch.arange(a, b, device=x.device), near=cache.beside)
