"""
Checkpoints that older versions of this repository wrote: their names -> today's.
"""

GONE = ('copy_weight', 'bell_center', 'bell_width', 'random_length', 'parameterization', 'law_mean',
        'law_std')


def upgraded(checkpoint):
    """A checkpoint dict (see common.load) as today's code would have written it; one of today's is left as it
    is."""
    config, run = dict(checkpoint['config']), dict(checkpoint['run'])
    if 'rows' in checkpoint or 'packed' not in run:  # of today, or of others (hub/folder.py)
        return checkpoint
    objective = checkpoint['objective']
    if objective == 'masked':
        objective = config['parameterization']
        if objective == 'subs':
            objective = 'd3pm' if config['T'] else 'masked'
            config['carry_over'] = True
        if objective != 'd3pm':
            config.pop('T')
            config.pop('carry_over', None)
    rows = dict(random_length=config.get('random_length', 0.0))
    if checkpoint['tokenizer']['kind'] == 'bpe':
        rows = dict(packed=run['packed'], expanded=run['expanded'])
    if 'sep' in checkpoint['tokenizer']:
        rows = {}
    if objective in ('vae', 'latent'):
        config['base'] = run['base']
    for name in GONE:
        config.pop(name, None)
    for name in ('packed', 'expanded', 'inserted', 'slow_decay', 'base'):
        run.pop(name, None)
    return {**checkpoint, 'objective': objective, 'config': config, 'run': run, 'rows': rows}
