"""
Checkpoints that earlier versions of this repository wrote, with today's names.
"""
import re

from parts.neighbours import TAPS

OBJECTIVES = dict(subs='masked', sedd='sedd', d3pm='d3pm')  # by `parameterization`, all once `masked`
CONFIG_GONE = ('copy_weight', 'bell_center', 'bell_width', 'random_length', 'parameterization', 'law_mean',
               'law_std')
RUN_GONE = ('packed', 'expanded', 'inserted', 'slow_decay', 'base', 'eval_draws', 'log_interval')


def upgraded(checkpoint):
    """A checkpoint dict (see common.load) as today's code would have written it; one of today's, or of others
    (hub/folder.py), comes back as it is."""
    config, run = dict(checkpoint['config']), dict(checkpoint['run'])
    objective, meta = checkpoint['objective'], checkpoint['tokenizer']
    ours = config.get('arch', 'ours') == 'ours'
    whole = {which: completed(checkpoint[which], config) if ours else checkpoint[which]
             for which in ('model', 'ema')}
    if 'packed' not in run:
        return checkpoint | whole | dict(run={k: v for k, v in run.items() if k not in RUN_GONE})
    if objective == 'masked':
        objective = OBJECTIVES[config['parameterization']]
        if config['T']:  # SUBS in steps is d3pm's
            config['carry_over'], objective = objective == 'masked', 'd3pm'
        else:
            config.pop('T')
    if objective in ('vae', 'latent'):
        config['base'] = run['base']
    if 'given' in config:
        config['given_share'] = config.pop('given')
    rows = dict(random_length=config.get('random_length', 0.0))
    if meta['kind'] == 'bpe' or 'sep' in meta:
        rows = {} if 'sep' in meta else dict(packed=run['packed'], expanded=run['expanded'])
    return {**checkpoint, 'objective': objective, 'rows': rows,
            'config': {k: v for k, v in config.items() if k not in CONFIG_GONE},
            'run': {k: v for k, v in run.items() if k not in RUN_GONE} | dict(objective=objective),
            **{which: renamed(whole[which]) for which in whole}}


def renamed(weights):
    """A state dict with today's names of a VAE's tensors, its own or embedded in a latent diffusion."""
    return {re.sub(r'^(vae\.)?told$', r'\1noise_embedding', name): tensor
            for name, tensor in weights.items() if name not in ('steps', 'vae.steps')}


def completed(weights, config):
    """A state dict of arch='ours' with what its blocks did not have, convolutions, gates, shares of the first
    values: zero, which changes nothing. config: a dict."""
    out = dict(weights)
    for name, matrix in weights.items():
        at, _, rest = name.rpartition('blocks.')
        number, _, last = rest.partition('.')
        ours = f'{at}blocks.{number}.norm1.weight' not in weights  # the others have gains
        if ours and last in ('attn.qkv.weight', 'attn.qkv.linear.weight'):
            C, H = matrix.size(1), config.get('n_head', 1)
            for near in ('near1', 'near2'):
                out.setdefault(f'{at}blocks.{number}.{near}.taps', matrix.new_zeros(TAPS, C))
            out.setdefault(f'{at}blocks.{number}.attn.gate.weight', matrix.new_zeros(H, C))
            out.setdefault(f'{at}blocks.{number}.attn.mix', matrix.new_zeros(config.get('n_kv_head') or H))
    return out

