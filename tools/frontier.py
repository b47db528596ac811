"""
Quality against network calls: every rule of a model's sampler with several numbers of steps, under a judge.

    python -m tools.frontier --out_dir=out-mdlm --judge=out-ar --csv=frontier.csv --plot=frontier.svg
    python -m tools.frontier --out_dir=out-score --judge=out-ar --rules=euler,heun --grid_of_steps=8,64

tools/judge.py says what the table holds. A rule that takes no steps is tried with values of its own knob
instead. Knobs of a rule may be given; they are for the rules that have them. The table and the plot are
written anew after every row.
"""
import csv
import io
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import common
from configurator import Filename, fail, knobs_of, script, settings
from hub import find
from text import files
from text.vocabulary import library
from tools import judge, samplers, source

SWEEPS = {'threshold': ('threshold', (0.3, 0.5, 0.7, 0.9, 0.97)),
          'factor': ('factor', (8.0, 4.0, 2.0, 1.0, 0.5)),
          'eb': ('gamma', (10.0, 3.0, 1.0, 0.3, 0.1, 0.03))}  # of the rules without steps


@dataclass
class Config(judge.Config, source.Config):
    # frontier
    rules: str = ''      # these only, separated by commas; '': all
    grid_of_steps: str = '8,16,32,64,128,256,512,1024'  # the numbers of steps
    csv: Filename = ''   # write the table here
    plot: Filename = ''  # draw it here, .svg or .png (needs matplotlib)

    def __post_init__(self):
        if not self.judge:
            raise ValueError("a frontier needs a judge, for example --judge=out-ar")
        if not all(part.strip().isdecimal() and int(part) for part in self.grid_of_steps.split(',')):
            raise ValueError(f"grid_of_steps={self.grid_of_steps!r} is not a list of numbers: 8,16,32")
        if Path(self.plot or 'x.svg').suffix not in ('.svg', '.png'):
            raise ValueError(f"plot={self.plot} must end in .svg or .png")


def label_of(objective, model, how):
    """What the table says of how texts were written: steps, or what their number depends on. how: arguments
    of the sampler."""
    rules, rule = common.concept(objective).RULES, how.get('rule')
    if rule in SWEEPS:
        name = SWEEPS[rule][0]
        return f"{name} {how.get(name, knobs_of(rules[rule])[name].default)}"
    if model.bound == 'exact' or rule == 'first_hitting':
        return 'one token a call'
    return f"{how['steps']} steps" if rules else 'z from the prior'


def points_of(config, said, sampler, rules):
    """(rule, arguments of the sampler) of every point; rules: of the objective, {name: function}. Raises
    ValueError for a rule that is none of these, and for something said that none of them takes."""
    if not rules:
        raise ValueError("this model has one way to write, which eval.py --judge= measures")
    names = list(filter(None, config.rules.split(','))) or list(rules)
    if wrong := [name for name in names if name not in rules]:
        raise ValueError(f"rules: {wrong[0]!r} is not one of: {', '.join(rules)}")
    known = {name: knobs_of(rules[name]) for name in names}
    for rule, own in known.items():
        others = {name for names in known.values() for name in names} - own.keys()
        how = judge.how_to_write(sampler, config, {k: v for k, v in said.items() if k not in others})
        if rule in SWEEPS:
            name, values = SWEEPS[rule]
            points = [{'steps': 1, name: value} for value in values]
        elif rule == 'first_hitting':
            points = [dict(steps=1)]
        else:
            points = [dict(steps=int(steps)) for steps in config.grid_of_steps.split(',')]
        for point in points:
            yield rule, how | dict(rule=rule) | point


def frontier(config, points, checkpoint, model, tokenizer, device, amp):
    """A row for every point; the same in a CSV and a plot."""
    scorer = judge.open_table(config, checkpoint, model, tokenizer, device)
    rows, refused = [], {}
    for rule, how in points:
        common.seed_everything(config.seed)
        try:
            with amp:
                texts, calls, speed = judge.written(model, tokenizer, config, device, how)
        except ValueError as e:  # of a rule that this model cannot take
            refused[rule] = e
            continue
        figures, label = scorer(texts), label_of(checkpoint['objective'], model, how)
        rows.append(dict(rule=rule, knob=label, calls=calls, tokens_per_second=speed, **figures))
        if config.csv:
            writer = csv.DictWriter(table := io.StringIO(newline=''), rows[0])
            writer.writeheader()
            writer.writerows(rows)
            files.write(config.csv, table.getvalue())
        if config.plot:
            plot(rows, config.plot)
        judge.row(rule, figures, label, calls, speed)
    if not rows:
        raise next(iter(refused.values()))
    for rule, why in refused.items():
        print(f"{rule} is left out: {why}", file=sys.stderr)


def plot(rows, path):
    """Quality and entropy against network calls, a line a rule."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout='constrained')
    for i, (rule, points) in enumerate(itertools.groupby(rows, key=lambda r: r['rule'])):
        points = sorted(points, key=lambda r: r['calls'])
        for axis, column in zip(axes, ('nats_per_token', 'unigram_entropy')):
            axis.plot([p['calls'] for p in points], [p[column] for p in points], marker='osv^D'[i % 5],
                      color=pyplot.cm.tab20(i % 20), label=rule, markersize=4)
    for axis, label in zip(axes, ('nats/token under the judge', 'unigram entropy of a text, nats')):
        axis.set(xscale='log', xlabel='network calls', ylabel=label)
    axes[1].legend(fontsize='small', ncols=2)
    figure.savefig(drawn := io.BytesIO(), format=Path(path).suffix[1:])
    pyplot.close(figure)
    files.write(path, drawn.getvalue())


def main(argv):
    config, chosen = settings(argv, __doc__, Config, functions=samplers.functions())
    if config.csv:
        files.writable(config.csv, 'csv')
    if config.plot:
        library('matplotlib', "a plot").use('agg')
        files.writable(config.plot, 'plot')
    device = common.pick_device(config.device)
    _, checkpoint = find.find(config.out_dir, config.which)
    model, tokenizer = common.load_model(checkpoint, device, config.weights, config.dtype)
    amp = common.precision(model, config.dtype, device)
    try:
        points = list(points_of(config, judge.said(config, chosen), model.sample,
                                common.concept(checkpoint['objective']).RULES))
        frontier(config, points, checkpoint, model, tokenizer, device, amp)
    except ValueError as e:
        fail(e)


if __name__ == '__main__':
    script(main)
