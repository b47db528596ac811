"""
Knobs: a dataclass in the source, then config files, then --key=value; the last one wins.

    python train.py config/train_mdlm.py --n_layer=2

A config file is Python whose names are knobs. Its `cpu = dict(...)`, if any, holds the values that replace
them on a CPU. Every knob is checked against its dataclass field: an unknown name, a wrong type or an
impossible value ends in one line on stderr and exit code 2, before anything is written.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import math
import os
import runpy
import sys
import textwrap
from pathlib import Path
from typing import NewType

Filename = NewType('Filename', str)  # type of a knob that names a file, a folder or a model: ~ is your home


def script(main):
    """Run main(argv) as a script. What it prints, every output can hold: UTF-8 where that is no terminal, and
    '?' for what a terminal has no letter for; an output that is closed is as if it were nowhere. Ctrl-C, a
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
    """End the script as a person's mistake deserves:
    what is wrong and the way out, one line, exit code 2."""
    with contextlib.suppress(OSError):
        print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def read(argv):
    """argv -> (knobs of the config files, their `cpu` knobs, knobs of the flags as strings).
    `--help` is {'help': ''}."""
    files, cpu, flags, bare = {}, {}, {}, ''
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
            if not isinstance(names.get('cpu', {}), dict) or not all(isinstance(k, str)
                                                                     for k in names.get('cpu', {})):
                fail(f"config file {arg}: cpu is a dict of knobs, as in cpu = dict(n_layer=4)")
            names = {k: v for k, v in names.items() if not k.startswith('_') and not inspect.ismodule(v)}
            cpu.update(names.pop('cpu', {}))
            files.update(names)
    return files, cpu, flags


def convert(field, value):
    """A knob's value as its field's type, or ValueError.
    Flags come as strings; an int will do for a float."""
    if value is True and field.type is not bool:
        raise ValueError(f"--{field.name}=True is not of type {field.type.__name__}: a knob and its value "
                         f"are joined by =, as in --{field.name}={field.default or 'VALUE'}")
    if field.type is str and isinstance(value, str) and value != value.encode(errors='replace').decode():
        raise ValueError(f"--{field.name} is not UTF-8 text")
    if field.type in (str, Filename) and isinstance(value, str):
        return os.path.expanduser(value) if field.type is Filename else value
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    if type(value) is int and abs(value) >= 2 ** 63:
        raise ValueError(f"--{field.name}={str(value)[:20]}... is too large")
    if field.type is float and type(value) is int:
        value = float(value)
    if type(value) is not field.type or value != value or value in (math.inf, -math.inf):
        raise ValueError(f"--{field.name}={value} is not of type {field.type.__name__} "
                         f"(default: {field.default!r})")
    return value


def peek(knobs, cls, *names):
    """The values of a few knobs of a dataclass, checked, before the others are known."""
    fields = fields_of({}, cls)
    try:
        return [convert(fields[name], knobs.get(name, fields[name].default)) for name in names]
    except ValueError as e:
        fail(e)


def fields_of(knobs, *classes):
    """The fields of the dataclasses by name; every knob must be one of them, or the script ends."""
    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    for key in knobs:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            fail(f"unknown knob --{key}"
                 + (f"; did you mean --{near[0]}?" if near else "; --help lists them"))
    return fields


def build(knobs, *classes):
    """One instance of each dataclass from the knobs; every knob must be a field of one of them."""
    fields = fields_of(knobs, *classes)
    try:
        values = {key: convert(fields[key], value) for key, value in knobs.items()}
        return [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
                for cls in classes]
    except ValueError as e:
        fail(e)


def help_text(doc, *classes):
    """The script's docstring and, for every knob, its default and the comment behind it in the source."""
    lines = [textwrap.dedent(doc).strip()]
    for cls in classes:
        source = '\n'.join(inspect.getsource(c) for c in reversed(cls.__mro__)
                           if dataclasses.is_dataclass(c))
        comments = {s.split(':')[0].strip(): s.partition('#')[2].strip()
                    for s in source.splitlines() if ':' in s}
        lines.append(f"\nknobs of {Path(inspect.getsourcefile(cls)).name}:")
        shown = {f.name: str(f.default).replace('\n', '\\n') for f in dataclasses.fields(cls)}
        lines += [f"  --{f'{name}={default}':<26} {comments.get(name, '')}"
                  for name, default in shown.items()]
    return '\n'.join(lines)
