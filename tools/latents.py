"""
What the latents of a sentence VAE (vae.py), and of the diffusion built on one (latent.py), tell.

    python -m tools.latents --out_dir=out-vae
    python -m tools.latents --out_dir=out-latent --judge=out-ar --steps=50
    python -m tools.latents --out_dir=out-vae --reconstruct --start="I did not know what to make of it."
    python -m tools.latents --out_dir=out-vae --interpolate="I did not know|What is it" --points=5
    python -m tools.latents --out_dir=out-latent --nearest=3 --start=FILE:starts.txt

The report is about windows of the validation text. Of a VAE: how much of a window comes back, and what that
costs. Of latent diffusion: how near its prediction of the next window's latents is to the true ones. With a
judge: how texts compare with real windows that went through the VAE, and how much they say of the latents
that they were written from.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import common
import latent
import vae
from configurator import Count, Filename, Natural, NonNegative, fail, help_of_rules, script, settings
from hub import find
from text.latents import cached
from text.prompts import starts
from text.rows import load_meta, load_tokens
from tools import judge, source


@dataclass
class Config(source.Config):
    # report
    windows: Natural = 0     # how many, evenly spread; 0: all
    judge: Filename = ''     # an autoregressive checkpoint, as for out_dir: out-ar, gpt2-large
    steps: Count = 64        # latent: of the sampler
    rule: Literal[('', *latent.RULES)] = ''  # latent: of the sampler; '': dpmpp_2m_sde
    cfg: NonNegative = 0.0   # latent: guidance towards the windows before; 0: none
    # decoder
    tau: NonNegative = 0.0   # share of the noise on z, temperature of tokens; 0: neither
    decoder_noise: NonNegative = 0.0  # noise on z that the decoder assumes; left out: latent, the model's own
    # instead of the report
    reconstruct: bool = False  # the start as latents and back
    interpolate: str = ''    # A|B, two texts: the way from the latents of one to the other's
    points: Count = 7        # texts on that way
    nearest: Natural = 0     # so many training windows that are nearest to the start
    start: str = ''          # a text; FILE:path: one a line
    num_samples: Count = 2   # times that the start is reconstructed

    def __post_init__(self):
        if self.points < 2:
            raise ValueError(f"points={self.points} must be at least 2: A and B")
        if bool(self.start) != bool(self.reconstruct or self.nearest):
            raise ValueError("--start is the text of --reconstruct and --nearest: give both")


# ---- the report -------------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruction(encoder, x, at_once):
    """What a VAE keeps of windows x (N, W), as rows of a table: (name, figure)."""
    found = []
    for part in x.split(at_once):
        nothing, W = torch.full_like(part, encoder.mask_id), part.size(1)
        mu, logvar = encoder.posterior(part)
        z = mu + (logvar / 2).exp() * torch.randn_like(mu)
        writes = [encoder.write(mu, nothing, W, tau) for tau in (0.0, 0.1, 1.0)]
        reads = [encoder.logits(latents, part, nothing).argmax(-1) for latents in (mu, z)]
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
def condition_effect(model, x, before, at_once):
    """How often the latents that latent diffusion expects of windows x (N, W), given the windows `before`
    (N, n_prev, W), are nearer in angle to the true ones than to those of another window: rows of a table.
    Windows without any before are left out."""
    kept = (before[:, -1] != model.mask_id).any(-1)
    guesses, truths = [], []
    for part, past in zip(x[kept].split(at_once), before[kept].split(at_once)):
        guesses.append(model.expected(*model.context(past)).flatten(1))
        truths.append(model.vae.encode(part).flatten(1))
    guess, z = torch.cat(guesses), torch.cat(truths)
    right, wrong = F.cosine_similarity(guess, z), F.cosine_similarity(guess, z.roll(len(z) // 2, 0))
    figure = lambda values: f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}"
    return [('true next window nearer than another', figure((right > wrong).double())),
            ('cosine with the true one', figure(right)), ('cosine with another', figure(wrong))]


@torch.no_grad()
def window_texts(model, x, prefix, before=None, tau=0.0, decoder_noise=None, cfg=0.0, **how):
    """What becomes of windows x (N, W): name -> tokens (N, W), their latents and those that they were
    written from (N, n d). Of latent diffusion, with the windows `before`, also windows drawn in their place,
    and what the decoder makes of pure noise. how: of model.sample_latents."""
    encoder, texts = model if before is None else model.vae, {}

    def write(name, z, prefix, noise):
        ids = encoder.write(encoder.raw(z), prefix, x.size(1), tau, noise)
        texts[name] = ids, encoder.encode(ids).flatten(1), z.flatten(1)
    write('the same through the VAE', encoder.encode(x), prefix, 0.0)
    if before is not None:
        z, there = model.context(before)
        noise = model.decoder_noise if decoder_noise is None else decoder_noise
        *_, drawn = model.sample_latents(z, there, cfg=cfg, **how)
        write('next windows', drawn, prefix, noise)
        write('noise in place of their latents', torch.randn_like(drawn), prefix, noise)
        *_, drawn = model.sample_latents(z, there & False, cfg=0.0, **how)
        write('windows out of nothing', drawn, torch.full_like(x, encoder.mask_id), noise)
    return texts


def report(config, chosen, checkpoint, model, tokenizer, device, amp):
    """Print what the latents of the validation windows tell."""
    scorer = judge.load_judge(config.judge, device) if config.judge else None
    common.seed_everything(config.seed)
    tokens, reader = source.load_text(config, checkpoint, tokenizer, device)
    batch = source.rows_of(tokens, reader, model, checkpoint, config.windows)
    x, before = batch['x'], batch.get('before')
    at_once = common.rows_at_once(x.size(1), tokenizer.vocab_size)
    with amp:
        table = (reconstruction(model, x, at_once) if before is None else
                 condition_effect(model, x, before, at_once))
    print(f"| {checkpoint['objective']}, {len(x)} windows | |\n|---|---|")
    print('\n'.join(f"| {name} | {figure} |" for name, figure in table))
    if not scorer:
        return
    how = dict(steps=config.steps, rule=config.rule, cfg=config.cfg, tau=config.tau,
               decoder_noise=chosen.get('decoder_noise'))
    how |= {name: value for name, value in chosen.items() if name not in vars(config)}  # the rule's own
    parts = zip(*(tensor.split(at_once) for tensor in batch.values()))
    with amp:
        parts = [window_texts(model, **dict(zip(batch, part)), **how) for part in parts]
    texts = {name: list(map(torch.cat, zip(*(part[name] for part in parts)))) for name in parts[0]}
    print('\n' + judge.HEAD)
    for name, (ids, *_) in {'validation windows': (x,), **texts}.items():
        ids = [(text_of(tokenizer, row), False) for row in ids]
        judge.row(name, judge.judged(scorer, ids, device))
    print('\n| texts | cosine of their latents with those they were written from | with another\'s |')
    print('|---|---|---|')
    for name, (_, again, z) in texts.items():
        own, other = (F.cosine_similarity(again, of).mean() for of in (z, z.roll(len(z) // 2, 0)))
        print(f"| {name} | {own:.3f} | {other:.3f} |")


# ---- about a text -----------------------------------------------------------------------------------------

def text_of(tokenizer, window):
    """The text of a window (W,), V where there is no token."""
    return tokenizer.decode(window[window != tokenizer.vocab_size].tolist())


def windows_of(encoder, tokenizer, text):
    """A text as windows (N, W)."""
    return encoder.windows_of(torch.tensor(tokenizer.encode(text), device=encoder.mean.device))


def reconstruct(encoder, x, tau=0.0, decoder_noise=0.0):
    """Windows x (B, W) -> latents -> windows again, without a prefix. tau, decoder_noise: of vae.py's
    `write`."""
    nothing = torch.full_like(x, encoder.mask_id)
    again = encoder.write(encoder.posterior(x)[0], nothing, x.size(1), tau, decoder_noise)
    return again.masked_fill(x == encoder.mask_id, encoder.mask_id)


def slerp(a, b, share):
    """The way from latents a to b (n, d) on the arc between their directions, and evenly in norm."""
    u, v = (F.normalize(t.flatten(), dim=0) for t in (a, b))
    angle = (u @ v).clamp(-1, 1).acos()
    if angle < 1e-4:
        return a + share * (b - a)
    unit = ((1 - share) * angle).sin() / angle.sin() * u + (share * angle).sin() / angle.sin() * v
    return ((1 - share) * a.norm() + share * b.norm()) * unit.view_as(a)


def show_reconstruction(config, encoder, tokenizer):
    """Print every window of the start, what comes back of it, and how much."""
    x = torch.cat([windows_of(encoder, tokenizer, text) for text in starts(config.start)])
    copies = x.repeat_interleave(config.num_samples, 0)
    again = reconstruct(encoder, copies, config.tau, config.decoder_noise)
    for row, copies in zip(x, again.split(config.num_samples)):
        print(text_of(tokenizer, row))
        for copy in copies:
            print(f"  -> {text_of(tokenizer, copy)}")
        print(f"  {(copies == row)[:, row != encoder.mask_id].float().mean():.0%} of the tokens")


def show_interpolation(config, encoder, tokenizer):
    """Print texts on the way from the latents of A to those of B."""
    ends = config.interpolate.split('|')
    if len(ends) != 2 or not all(ends):
        fail("interpolate takes two texts: --interpolate='A|B'")
    x = [windows_of(encoder, tokenizer, text) for text in ends]
    if any(len(rows) > 1 for rows in x):
        fail(f"interpolate is between two windows, of at most {x[0].size(1)} tokens each")
    a, b = encoder.encode(x := torch.cat(x))
    z = torch.stack([slerp(a, b, i / (config.points - 1)) for i in range(config.points)])
    nothing = torch.full((len(z), x.size(1)), encoder.mask_id, device=x.device)
    longer = int((x != encoder.mask_id).sum(-1).max())
    for row in encoder.write(encoder.raw(z), nothing, longer, config.tau, config.decoder_noise):
        print(text_of(tokenizer, row))


def show_nearest(config, encoder, tokenizer, checkpoint, folder):
    """Print every window of the start and the training windows nearest to it, with their cosines."""
    x = torch.cat([windows_of(encoder, tokenizer, text) for text in starts(config.start)])
    dataset = checkpoint['run']['dataset']
    if load_meta(dataset) != checkpoint['tokenizer']:
        fail(f"data/{dataset} has been prepared anew from another text: its windows cannot be compared")
    tokens = load_tokens(dataset, 'train', tokenizer.vocab_size, x.device)
    passages = encoder.cut(tokens, tokenizer.end, '')
    z, there = encoder.encode(x).flatten(1), cached(encoder, passages, folder).flatten(1).float()
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 has three digits
        cosine = F.normalize(z, dim=-1) @ F.normalize(there, dim=-1).T
    best = cosine.topk(min(config.nearest, len(there)))
    for row, values, indices in zip(x, best.values, best.indices):
        print(text_of(tokenizer, row))
        for value, window in zip(values, passages.window(indices)):
            print(f"  {value:.3f}  {text_of(tokenizer, window)}")


def main(argv):
    config, chosen = settings(argv, __doc__, Config, functions=latent.RULES.values(),
                             others=help_of_rules('rules of latent.py', latent.RULES))
    device = common.pick_device(config.device)
    path, checkpoint = find.find(config.out_dir, config.which)
    if checkpoint['objective'] not in ('vae', 'latent'):
        fail(f"these are tools for vae and latent, not for {checkpoint['objective']}")
    model, tokenizer = common.load_model(checkpoint, device, config.weights, config.dtype)
    encoder = model.vae if checkpoint['objective'] == 'latent' else model
    amp = common.precision(model, config.dtype, device)
    if not (config.reconstruct or config.interpolate or config.nearest):
        try:
            return report(config, chosen, checkpoint, model, tokenizer, device, amp)
        except ValueError as e:  # of the sampler's knobs
            fail(e)
    with torch.no_grad(), amp:
        common.seed_everything(config.seed)
        if config.reconstruct:
            show_reconstruction(config, encoder, tokenizer)
        if config.interpolate:
            show_interpolation(config, encoder, tokenizer)
        if config.nearest:
            show_nearest(config, encoder, tokenizer, checkpoint, Path(path).parent)


if __name__ == '__main__':
    script(main)
