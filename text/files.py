"""
Files: reading what people have, and writing so that a file is whole or absent.

Texts are read as UTF-8, with or without a byte order mark, or as UTF-16 or UTF-32 with one. Files are
written under a temporary name and renamed when they are whole. What cannot be read or written ends the
script in one line.
"""
import contextlib
import errno
import json
import os
import re
import time
from pathlib import Path

from configurator import fail

# ---- reading ----------------------------------------------------------------------------------------------

MARKS = {b'\xff\xfe\0\0': 'utf-32', b'\0\0\xfe\xff': 'utf-32', b'\xff\xfe': 'utf-16', b'\xfe\xff': 'utf-16'}


def encoding_of(data):
    """The name of the encoding of a text, from its first bytes."""
    return next((name for mark, name in MARKS.items() if data.startswith(mark)), 'utf-8-sig')


def text_of(data, source):
    """Bytes -> text without a byte order mark and with plain line ends, or the script ends."""
    encoding = encoding_of(data)
    if encoding == 'utf-8-sig' and data.count(0) > len(data) / 4:
        fail(f"{source} holds zero bytes, as UTF-16 does: save it as UTF-8")
    try:
        return data.decode(encoding).replace('\r\n', '\n').replace('\r', '\n')
    except UnicodeDecodeError as e:
        fail(f"{source} is not UTF-8 text, nor UTF-16 or UTF-32 with a byte order mark: {e}")


def read_bytes(path, flag=''):
    """The bytes of a file, or the script ends. flag: the knob that named it, if one did."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        fail(f"cannot read {f'--{flag}=' if flag else ''}{path}: {getattr(e, 'strerror', None) or e}")


def read_text(path, flag=''):
    """The text of a file, or the script ends."""
    return text_of(read_bytes(path, flag), path)


def read_json(path):
    """The dict in a JSON file, or the script ends."""
    try:
        found = json.loads(read_text(path))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} instead of an object")
        return found
    except (ValueError, RecursionError) as e:
        fail(f"{path} is cut short or damaged ({e}): remove it and get it again")


# ---- writing ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def disk(path, then="then run the same command again"):
    """End the script in one line if `path` cannot be written (no room, no rights). then: what to do when
    there is room."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        fail(f"cannot write {path}: {e.strerror or e}{f'; make room, {then}' if full else ''}")


def temporary(path):
    """The name under which this process writes `path` until it is whole."""
    return path.with_name(f'{path.name}.{os.getpid()}.tmp')


def sync(f):
    """A disk that is full may say so only now."""
    f.flush()
    os.fsync(f.fileno())


@contextlib.contextmanager
def writing(path, *then):
    """A binary file to write to, renamed to `path` at the end; a failure leaves nothing. Links are followed;
    a device or a pipe is written to directly."""
    with disk(path, *then):
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            with open(path, 'wb') as f:
                yield f
            return
        try:
            with open(temporary(path), 'wb') as f:
                yield f
                sync(f)
            os.replace(temporary(path), path)
        finally:
            temporary(path).unlink(missing_ok=True)


def write(path, data):
    """Write bytes, or a text as UTF-8."""
    with writing(path) as f:
        f.write(data.encode(errors='replace') if isinstance(data, str) else data)


def write_all(folder, data, stale=()):
    """Files that belong together, {name: bytes}: renamed, in this order, when all of them are written. The
    `stale` ones are removed just before."""
    with contextlib.ExitStack() as stack:  # leaves what was entered last first
        for name, content in reversed(data.items()):
            f = stack.enter_context(writing(Path(folder, name)))
            f.write(content)
            sync(f)
        for name in stale:
            Path(folder, name).unlink(missing_ok=True)


def folder(path, flag, named=''):
    """Check that files can be written into a folder, which need not exist yet, and end the script if not.
    Temporary files of processes that were killed are removed. flag, named: the knob that led here and its
    value, if that is not `path`. Returns the nearest folder that exists."""
    with disk(f'--{flag}={named or path}'):
        there = Path(os.path.realpath(path))
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f'{there.name} is no folder')
        for old in Path(path).glob('*.tmp'):
            if (name := re.fullmatch(r'.+\.(\d+)\.tmp', old.name)) and abandoned(old, int(name[1])):
                old.unlink(missing_ok=True)
        (test := temporary(there / Path(named or 'test').name)).write_bytes(b'')
        test.unlink()
    return there


def writable(path, flag):
    """Check that the file named with --flag can be written, and end the script if not."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a device, a pipe
        return
    folder(path.parent, flag, path)
    with disk(f'--{flag}={path}'):
        if path.exists():  # a folder cannot be opened
            open(path, 'ab').close()


def abandoned(path, pid):
    """Has the process that made the temporary file `path` ended?"""
    if os.name != 'posix':  # there is no harmless way to ask
        return pid == os.getpid() or time.time() - path.stat().st_mtime > 600
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as e:
        return not isinstance(e, PermissionError)  # another person's process runs
    return pid == os.getpid()


@contextlib.contextmanager
def occupied(path):
    """Mark a folder as in use; the script ends if another process has marked it. (`folder` removes the marks
    of processes that were killed.)"""
    for other in Path(path).glob('training.*.tmp'):
        fail(f"{path}/ is in use: process {other.name.split('.')[1]} trains there; stop it or take another "
             f"folder (or remove {other}, if it does not)")
    mark = temporary(Path(os.path.realpath(path), 'training'))
    with disk(path):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
