"""
Knobs, nanoGPT's way: config files in order, then --key=value. A flag always wins.

    python train.py config/train_mdlm.py --n_layer=2

A config file is Python whose names are knobs. Its `cpu = dict(...)` and `mps = dict(...)`, if any, hold
values that replace them on a CPU and on a Mac's GPU. A knob is a field of a dataclass, or a keyword-only
argument of a function. Its type says what it may be, the comment on its line what it means:

    n_layer: Count = 6      # blocks

An unknown name, a wrong type or an impossible value ends in one line on stderr and exit code 2, before
anything is written.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import math
import os
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypeVar, get_args, get_origin

# ---- what a knob may be -----------------------------------------------------------------------------------

Filename = NewType('Filename', str)  # of a file, a folder or a model: ~ is your home


class Range(NamedTuple):
    """Numbers that a knob may be, and how to say so."""
    fits: Any   # value -> bool
    words: str


Count = Annotated[int, Range(lambda v: v >= 1, "must be at least 1")]
Natural = Annotated[int, Range(lambda v: v >= 0, "must not be negative")]
NonNegative = Annotated[float, Range(lambda v: v >= 0, "must not be negative")]
Positive = Annotated[float, Range(lambda v: v > 0, "must be positive")]
Share = Annotated[float, Range(lambda v: 0 <= v <= 1, "must be in [0, 1]")]
ShareBelow1 = Annotated[float, Range(lambda v: 0 <= v < 1, "must be in [0, 1)")]
ShareAbove0 = Annotated[float, Range(lambda v: 0 < v <= 1, "must be in (0, 1]")]
T = TypeVar('T')
Fixed = Annotated[T, 'fixed']  # set by the data or by the weights that are taken over; no flag


class Knob(NamedTuple):
    name: str
    type: Any
    default: Any
    comment: str = ''
    group: str = ''  # title of its group in --help
    depth: int = 0   # of its class: parents come first


def kind_of(type):
    """int, float, str, bool or Filename: what a knob's value is, without its range."""
    if get_origin(type) is Literal:
        return str
    return get_args(type)[0] if get_origin(type) is Annotated else type


def is_fixed(knob):
    return 'fixed' in getattr(knob.type, '__metadata__', ())


def knobs_of(thing):
    """The knobs {name: Knob} of a dataclass, or of a function: its keyword-only arguments."""
    if dataclasses.is_dataclass(thing):
        parents = [c for c in reversed(thing.__mro__) if dataclasses.is_dataclass(c)]
        sources, found = list(map(inspect.getsource, parents)), dataclasses.fields(thing)
    else:
        bound = thing.keywords if isinstance(thing, functools.partial) else {}
        thing = thing.func if isinstance(thing, functools.partial) else thing
        found = [p for name, p in inspect.signature(thing).parameters.items()
                 if p.kind is p.KEYWORD_ONLY and name not in bound]
        sources = [inspect.getsource(thing).split('"""')[0]]
    comments = {}
    for depth, source in enumerate(sources):
        group = ''
        for line in source.splitlines():
            if name := re.match(r'.*?\b(\w+): .*?#(.*)', line):
                comments[name[1]] = name[2].strip(), group, depth
            elif title := re.match(r' +# (.+)$', line):
                group = title[1]
    return {f.name: Knob(f.name, getattr(f, 'annotation', None) or f.type, f.default,
                         *comments.get(f.name, ())) for f in found}


# ---- scripts ----------------------------------------------------------------------------------------------

def script(main):
    """Run main(argv) as a script. Its output is UTF-8 unless it is a terminal, where '?' stands for what it
    has no letter for; a closed output is ignored. Ctrl-C, a
    reader that has left (`| head`), a full output and too little memory end it without a traceback."""
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=None if stream.isatty() else 'utf-8', errors='replace')
    try:
        try:
            main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        if e.filename is not None or e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise  # of a file, so it should have been told elsewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no second failure at the very end
        if isinstance(e, BrokenPipeError):
            sys.exit(141)  # as a program that SIGPIPE ends
        fail(f"the standard output cannot be written: {e.strerror}")
    except (MemoryError, RuntimeError) as e:
        words = ('out of memory', "can't allocate memory", 'not enough memory')  # of torch's RuntimeErrors
        if isinstance(e, RuntimeError) and not any(word in str(e).lower() for word in words):
            raise
        why = str(e).strip().splitlines()[0][:200] if str(e).strip() else "more than this machine has"
        fail(f"out of memory ({why}): a smaller batch, model or length may help")


def fail(message):
    """Exit with code 2 and one line on stderr: what is wrong and how to fix it."""
    with contextlib.suppress(OSError):
        print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def read(argv):
    """argv -> (knobs of the config files, {device: those that replace them there}, knobs of the flags as
    strings). `--help` is {'help': ''}."""
    files, devices, flags, bare = {}, {'cpu': {}, 'mps': {}}, {}, ''
    for arg in argv:
        if arg in ('-h', '--help'):
            flags['help'] = ''
        elif arg.startswith('--'):
            key, equals, value = arg[2:].partition('=')
            flags[key], bare = (value, '') if equals else (True, arg)  # --watch is --watch=True
        elif not Path(arg).is_file():
            if bare:
                fail(f"a knob and its value are joined by =: {bare}={arg}")
            near = difflib.get_close_matches(arg, map(str, Path('config').glob('*.py')), 1)
            fail(f"there is no config file {arg!r}"
                 + (f"; did you mean {near[0]}?" if near else "; knobs are --key=value"))
        else:
            try:
                names = runpy.run_path(arg)
            except (Exception, SystemExit) as e:
                fail(f"config file {arg} does not run: {type(e).__name__}: {e}")
            names = {k: v for k, v in names.items() if not k.startswith('_') and not inspect.ismodule(v)}
            for device, own in devices.items():
                theirs = names.pop(device, {})
                if not isinstance(theirs, dict) or not all(isinstance(k, str) for k in theirs):
                    fail(f"config file {arg}: {device} is a dict of knobs, as in {device} = dict(n_layer=4)")
                own.update(theirs)
            files.update(names)
    return files, devices, flags


def convert(knob, value):
    """A knob's value as its type, or ValueError. Flags come as strings; an int will do for a float."""
    kind, name = kind_of(knob.type), knob.name
    if value is True and kind is not bool:
        raise ValueError(f"--{name}=True is not of type {kind.__name__}: a knob and its value are joined by "
                         f"=, as in --{name}={knob.default or 'VALUE'}")
    if kind is str and isinstance(value, str) and value != value.encode(errors='replace').decode():
        raise ValueError(f"--{name} is not UTF-8 text")
    if isinstance(value, str) and kind not in (str, Filename):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if kind is Filename and isinstance(value, str):
        return os.path.expanduser(value)
    if type(value) is int and abs(value) >= 2 ** 63:
        raise ValueError(f"--{name}={str(value)[:20]}... is too large")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value != value or value in (math.inf, -math.inf):
        raise ValueError(f"--{name}={value} is not of type {kind.__name__} (default: {knob.default!r})")
    if get_origin(knob.type) is Literal and value not in get_args(knob.type):
        raise ValueError(f"{name}={value!r} is not one of: {', '.join(filter(None, get_args(knob.type)))}")
    for part in getattr(knob.type, '__metadata__', ()):
        if isinstance(part, Range) and not part.fits(value):
            raise ValueError(f"{name}={value} {part.words}")
    return value


def peek(knobs, cls, *names):
    """The values of a few knobs of a dataclass, checked, before the others are known."""
    found = knobs_of(cls)
    try:
        return [convert(found[name], knobs.get(name, found[name].default)) for name in names]
    except ValueError as e:
        fail(e)


def check_names(knobs, *things):
    """Every knob must be one of the dataclasses' or functions', or the script ends -> {name: Knob}."""
    known = {name: knob for thing in reversed(things) for name, knob in knobs_of(thing).items()}
    flags = [name for name, knob in known.items() if not is_fixed(knob)]
    for key in knobs:
        if key not in known:
            near = difflib.get_close_matches(key, flags, 1)
            fail(f"unknown knob --{key}"
                 + (f"; did you mean --{near[0]}?" if near else "; --help lists them"))
    return known


def build(knobs, *classes, functions=()):
    """One instance of each dataclass from the knobs, and a dict of all that were given, checked. Every knob
    must be a field of one of the dataclasses or one of the functions', or the script ends."""
    known = check_names(knobs, *classes, *functions)
    try:
        chosen = {key: convert(known[key], value) for key, value in knobs.items()}
        return [cls(**{name: chosen[name] for name in knobs_of(cls) if name in chosen})
                for cls in classes] + [chosen]
    except ValueError as e:
        fail(e)


def settings(argv, doc, *classes, functions=(), others=''):
    """`build` from a command line; --help prints the script's docstring and all knobs, and ends it. others:
    what else stands in the help."""
    files, _, flags = read(argv)
    if 'help' in flags:
        print(help_text(doc, *classes) + others)
        sys.exit(0)
    return build({**files, **flags}, *classes, functions=functions)


def arguments(function, chosen, defaults):
    """What to call a function with: all of `chosen`, and of the defaults what it takes. Raises ValueError for
    one that was given and is none of its arguments."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    wrong = [name for name in chosen if name not in parameters and not takes_all]
    if wrong:
        own = [name for name in parameters if name not in ('self', 'xt')]
        raise ValueError(f"{', '.join(wrong)} is not for this model: its sampler takes {', '.join(own)}")
    return {name: value for name, value in defaults.items() if name in parameters} | chosen


def help_lines(thing, indent='  '):
    """A line for every knob: its default, what it may be, its comment; a dataclass's groups have titles, and
    those of its own come before those of its parents."""
    group = ''
    for knob in sorted(knobs_of(thing).values(), key=lambda knob: -knob.depth):
        if is_fixed(knob):
            continue
        if knob.group != group:
            group = knob.group
            yield f"{indent}{group}" if group else ''
        default = str(knob.default).replace('\n', '\\n')
        choices = [c for c in get_args(knob.type) if c] if get_origin(knob.type) is Literal else []
        said = all(choice in knob.comment for choice in choices)
        comment = knob.comment if said else f"{' | '.join(choices)}: {knob.comment}"
        yield f"{indent}--{f'{knob.name}={default}':<26} {comment}".rstrip()


def help_text(doc, *classes):
    """The script's docstring and, for every knob, its default and the comment on its line in the source."""
    lines = [textwrap.dedent(doc).strip()]
    for cls in classes:
        lines += [f"\nknobs of {Path(inspect.getsourcefile(cls)).name}:", *help_lines(cls)]
    return '\n'.join(lines)


def help_of_rules(title, rules):
    """The rules {name: function} of a sampler with their own knobs, as lines of help."""
    lines = [f"\n{title}:"]
    for name, rule in rules.items():
        about = (inspect.getdoc(rule) or '').split('. ')[0].split(':')[0].replace('\n', ' ').rstrip('.')
        lines += [f"  {name:<14} {about}", *help_lines(rule, '      ')]
    return '\n'.join(lines)
