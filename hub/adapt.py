"""
From one objective to another on the same weights: `train.py --init_from=`.

An autoregressive model and a denoiser are the same transformer, so the one can begin where the other ended:
its matrices, norms and head, and of its embedding the rows of the tokens (DiffuGPT and DiffuLLaMA, arXiv
2410.17891; Dream, 2508.15487). What is new is [MASK]. It gets a row of its own, the mean of all tokens' rows
at first; DiffuGPT reuses the row of a rare token, which then counts as masked wherever it occurs. Fine-tuning
is the same without a change of objective.
"""
from collections import ChainMap
from dataclasses import fields

import torch
import torch.nn.functional as F

import model
from configurator import fail
from parts import lora

ONE_TRANSFORMER = ('ar', 'masked', 'sedd', 'd3pm', 'block')  # objectives whose weights are model.GPT's alone
SHAPE = {f.name for f in fields(model.Config)} - {'dropout'}
TRAINING_ONLY = ('dropout', 'anneal_iters', 'first_given')  # of one run, as are those of parts/lora.py


def knobs_of_start(checkpoint, knobs, source):
    """The knobs of a run that begins with the weights of a checkpoint: without an objective of its own it
    has the checkpoint's; of the same objective all that it says of the model, of another the transformer's
    shape. Adapters are not taken over, they get merged."""
    theirs, objective = checkpoint['config'], knobs.get('objective', checkpoint['objective'])
    same = objective == checkpoint['objective']
    if not same and not {objective, checkpoint['objective']} <= set(ONE_TRANSFORMER):
        fail(f"init_from={source} is of {checkpoint['objective']}, which cannot become {objective}: "
             f"one of {', '.join(ONE_TRANSFORMER)} can become another")
    kept = {k: v for k, v in theirs.items()
            if k in SHAPE or same and k not in TRAINING_ONLY and not k.startswith('lora_')}
    return {**kept, **knobs, 'objective': objective}


def check_shape(config, checkpoint, source):
    """The shapes of weights cannot change, but the context may be cut; or the script ends."""
    theirs = checkpoint['config']
    for name in sorted(SHAPE & theirs.keys()):
        own = getattr(config, name)
        if own != theirs[name] and not (name == 'block_size' and own < theirs[name]):
            fail(f"{name}={own} but init_from={source} has {theirs[name]}: leave it out")


def marks(objective, config):
    """What the rows of the embedding beyond the vocabulary are for."""
    if objective == 'ar':
        return ['bos']
    return ['mask'] + ['bos'] * (config.get('shift', False) and config.get('bos', True))


def turned(taps, was_causal):
    """The taps (TAPS, C) of parts/neighbours.py for the other kind of network: those of neighbours that both
    reach stay, the others are lost (begin at zero)."""
    shift = len(taps) // 2  # places between a causal network's first neighbour and a denoiser's
    return F.pad(taps[shift:], (0, 0, 0, shift)) if was_causal else F.pad(taps[:-shift], (0, 0, shift, 0))


@torch.no_grad()
def take_over(net, objective, config, checkpoint):
    """Give a network the averaged weights of a checkpoint, maybe of another objective, adapters merged. A
    mark that the checkpoint has no row for begins as the mean of the tokens' rows. Raises ValueError."""
    if checkpoint['objective'] not in ONE_TRANSFORMER:
        return net.load_state_dict(checkpoint['ema'])
    weights, V = ChainMap({}, lora.folded(checkpoint['ema'], checkpoint['config'])), config['vocab_size']
    rows = weights['gpt.embed.weight']
    there = dict(zip(marks(checkpoint['objective'], checkpoint['config']), rows[V:]))
    fresh = [there.get(mark, rows[:V].mean(0)) for mark in marks(objective, config)]
    weights['gpt.embed.weight'] = torch.cat([rows[:V], torch.stack(fresh)])
    if 'gpt.pos.weight' in weights:  # the context may be cut
        rows = config['block_size'] + len(marks(objective, config)) - 1  # [BOS] of a denoiser takes one
        weights['gpt.pos.weight'] = weights['gpt.pos.weight'][:rows]
    was, will = (objective == 'ar' for objective in (checkpoint['objective'], objective))
    for name in [name for name in weights if name.endswith('.taps') and was != will]:
        weights[name] = turned(weights[name], was)
    homeless = weights.keys() - {name.replace('.linear.', '.') for name in net.state_dict()}
    if homeless:
        raise ValueError(f"objective={objective} has no place for {min(homeless)}")
    return lora.load_base(net, weights)
