"""
Where a run of train.py begins: at random weights, where an earlier run stopped (--init_from=resume), at the
weights of another model (--init_from=), or on top of a frozen one (--base=, for vae and latent).

`begin` finds the knobs of the run, checks that they fit what it begins with, and ends the script in one line
if not, before anything is written. `weights` puts the weights in.
"""
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import common
from configurator import build, check_names, fail, help_text, is_fixed, knobs_of, peek, read
from hub import adapt, find, older
from parts import lora
from text import rows
from text.vocabulary import Tokenizer


class Origin(NamedTuple):
    meta: dict         # of the dataset: its tokenizer and where the text is from
    checkpoint: dict   # to resume or to begin with, None: random weights
    base: dict         # checkpoint that the model is built on, or None
    resumed: bool


def begin(argv, doc, Config):
    """argv -> (run Config, concept Config, Config of the rows, Origin), or the script ends; so it does after
    printing --help."""
    files, devices, flags = read(argv)
    if 'help' in flags:
        objective, = peek({**files, **flags}, Config, 'objective')
        kinds = [module.Config for module in rows.KINDS.values() if knobs_of(module.Config)]
        print(help_text(doc, Config, common.concept(objective).Config, *kinds))
        sys.exit(0)
    device = common.pick_device(*peek({**files, **flags}, Config, 'device'))
    files |= devices.get(device.type, {})
    knobs = dict(files)
    source, out_dir = peek({**knobs, **flags}, Config, 'init_from', 'out_dir')
    if not out_dir or Path(out_dir, 'config.json').exists():
        fail(f"out_dir={out_dir} is no place for a run: it must not be empty, nor hold a model in Hugging "
             f"Face's layout")
    checkpoint = None
    if source == 'resume':
        checkpoint = older.upgraded(common.load(Path(out_dir, 'last.pt')))
        kept = {**checkpoint['config'], **checkpoint['run'], **checkpoint['rows']}
        knobs |= {k: v for k, v in kept.items() if k not in ('init_from', 'device', 'out_dir')}
    elif source != 'scratch':
        _, checkpoint = find.find(source)
        knobs = adapt.knobs_of_start(checkpoint, knobs | flags, source)
    knobs = {**knobs, **flags}
    objective, dataset = peek(knobs, Config, 'objective', 'dataset')
    if source == 'resume' and objective != checkpoint['objective']:
        fail(f"objective={objective}: the run to resume is of {checkpoint['objective']}, that cannot change")
    concept = common.concept(objective)
    check_names(knobs, Config, concept.Config, *(kind.Config for kind in rows.KINDS.values()))
    meta = rows.load_meta(dataset)
    tokenizer = Tokenizer(meta)
    kind = rows.KINDS[rows.kind_of(tokenizer)]
    known = check_names(knobs, Config, concept.Config, kind.Config)
    if checkpoint and 'base' in flags:
        fail(f"base is for a new run: init_from={source} holds all it needs")
    base = None if checkpoint else built_on(concept, knobs.get('base', ''))
    own = concept.knobs_of_base(base['config']) if base else {}
    for name in {**files, **flags}:
        if is_fixed(known[name]) or name in own:
            fail(f"{name} is set by the dataset, by the base, or by the weights that the run begins with: "
                 f"leave it out")
    knobs |= own
    run, config, row_knobs, _ = build({**knobs, 'vocab_size': tokenizer.vocab_size}, Config, concept.Config,
                                      kind.Config)
    origin = Origin(meta, checkpoint, base, source == 'resume')
    check(run, config, tokenizer, origin)
    return run, config, row_knobs, origin


def check(run, config, tokenizer, origin):
    """Does what a run begins with fit its config and its dataset? Or the script ends."""
    for split in ('train', 'val') if rows.kind_of(tokenizer) == 'windows' else ():
        n = rows.count_tokens(run.dataset, split, tokenizer.vocab_size)
        if 0 < n < config.block_size:
            fail(f"data/{run.dataset}/{split}.bin has {n} tokens, fewer than block_size={config.block_size}")
    if origin.resumed:
        return check_resumed(run, config, origin)
    other = origin.base or origin.checkpoint
    if other is None and getattr(config, 'lora_rank', 0):
        fail(f"lora_rank={config.lora_rank} is for a run with init_from=: adapters change a model that has "
             f"been trained")
    if other and Tokenizer(other['tokenizer']).pieces != tokenizer.pieces:
        source = f"base={config.base}" if origin.base else f"init_from={run.init_from}"
        fail(f"dataset={run.dataset} has another vocabulary than {source}: prepare it with that model's, as "
             f"by data/text/prepare.py --tokenizer={source.partition('=')[2]}")
    if origin.checkpoint:
        adapt.check_shape(config, origin.checkpoint, run.init_from)


def check_resumed(run, config, origin):
    """May the run to resume go on with this config and this dataset? Or the script ends."""
    theirs, muon = origin.checkpoint['config'], origin.checkpoint['run'].get('muon_lr', run.muon_lr)
    for name, value in asdict(config).items():
        if theirs.get(name, value) != value:
            fail(f"{name}={value} but the run to resume has {theirs[name]}: it cannot change")
    if bool(muon) != bool(run.muon_lr):
        fail(f"muon_lr={run.muon_lr} but the run to resume has {muon}: it cannot go on with other optimizers")
    if origin.checkpoint['tokenizer'] != origin.meta:
        fail(f"dataset={run.dataset} has another vocabulary or source than the run to resume")


def built_on(concept, path):
    """The checkpoint that --base names (a file, or a folder: its best), if the concept is built on one."""
    kind = concept.Model.base
    if not kind:
        return None
    make = f"`python train.py config/train_{kind}.py` makes one, --base=FOLDER names it"
    if not path:
        fail(f"objective={concept.__name__} is built on a checkpoint of {kind}: {make}")
    if '/' not in path and path not in find.GPT2 and not Path(path).exists():
        fail(f"base={path} does not exist; {make}")
    path, checkpoint = find.find(path)
    if checkpoint['objective'] != kind:
        fail(f"base={path} is of {checkpoint['objective']}, it must be of {kind}: {make}")
    return checkpoint


def weights(net, run, config, origin):
    """Give a new model the weights that its run begins with, or the script ends."""
    try:
        if origin.base:
            base = origin.base['ema']
            if origin.base['objective'] in adapt.ONE_TRANSFORMER:
                base = lora.folded(base, origin.base['config'])  # its adapters, if any, are merged
            net.inherit(base, Tokenizer(origin.meta).pieces)
        if origin.resumed:
            net.load_state_dict(origin.checkpoint['model'])
        elif origin.checkpoint:
            adapt.take_over(net, run.objective, asdict(config), origin.checkpoint)
    except (RuntimeError, ValueError) as e:
        source = f"init_from={run.init_from}" if origin.checkpoint else f"base={config.base}"
        fail(f"the weights of {source} do not fit this model: {e}"[:300])


def resume_optimizers(optimizers, run, origin):
    """Go on with the momenta of the run to resume; their weight decay is this run's."""
    states = origin.checkpoint.get('optimizers', [])
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            decay = [group['weight_decay'] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, own in zip(optimizer.param_groups, decay):
                group['weight_decay'] = own
    except ValueError:
        fail(f"the run to resume has {len(states)} optimizers, this one {len(optimizers)}, or of other "
             f"parameters; a best.pt has none: --init_from={run.out_dir} starts a new run from its weights")
