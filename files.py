"""
The files that people have, and those that they get.

What is read is UTF-8, with or without a byte order mark, or UTF-16 with one. What is written appears under a
temporary name and is renamed when it is whole, so a file is whole or absent. A file that cannot be read, and
a disk that refuses, end the script in one line.
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

def encoding_of(data):
    """The name of the encoding of a text, from its first bytes."""
    return 'utf-16' if data.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig'  # of PowerShell's >


def text_of(data, source):
    """Bytes -> text without a byte order mark, with plain line ends; or the script ends."""
    try:
        return data.decode(encoding_of(data)).replace('\r\n', '\n')
    except UnicodeDecodeError as e:
        fail(f"{source} is not UTF-8 text: {e}")


def read_bytes(path, flag=''):
    """The bytes of a file, named with --flag if a person did so, or the script ends."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        fail(f"cannot read {f'--{flag}=' if flag else ''}{path}: {getattr(e, 'strerror', None) or e}")


def read_text(path, flag=''):
    """The text of a file, see `text_of`, or the script ends."""
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
def disk(path, way_out=''):
    """A disk that refuses to hold `path` (full, no rights) ends the script in one line."""
    try:
        yield
    except OSError as e:
        room = way_out or "make room, then run the same command again" * (e.errno == errno.ENOSPC)
        fail(f"cannot write {path}: {e.strerror or e}{room and '; '}{room}")


@contextlib.contextmanager
def writing(path, way_out=''):
    """A binary file to write to, which is renamed to `path` at the end; nothing is left of one that fails."""
    path = Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    with disk(path, way_out):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, 'wb') as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write(path, data):
    """Write bytes (or a text, as UTF-8); see `writing`."""
    with writing(path) as f:
        f.write(data.encode(errors='replace') if isinstance(data, str) else data)


def folder(path, flag, named=''):
    """Can files be written into the folder that a person named with --flag, which need not exist yet? Or the
    script ends, before there is anything to write. Temporary files of processes that were killed are removed
    from it. named: what the person wrote, if it is not the path. Returns the nearest folder that exists."""
    with disk(f'--{flag}={named or path}'):
        there = Path(path)
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f'{there} is no folder')
        for old in Path(path).glob('*.tmp'):
            if (name := re.fullmatch(r'.+\.(\d+)\.tmp', old.name)) and abandoned(old, int(name[1])):
                old.unlink(missing_ok=True)
        (test := there / f'test.{os.getpid()}.tmp').write_bytes(b'')
        test.unlink()
    return there


def writable(path, flag):
    """The same of a file."""
    path = Path(path)
    folder(path.parent, flag, path)
    with disk(f'--{flag}={path}'):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, 'it is a folder')
        if path.is_file():
            with open(path, 'ab'):
                pass


def abandoned(path, pid, seconds=600):
    """Will process pid not go on writing the temporary file `path`?"""
    if pid == os.getpid():
        return True
    if os.name != 'posix':  # there is no harmless way to ask
        return time.time() - path.stat().st_mtime > seconds
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


@contextlib.contextmanager
def occupied(path):
    """While this runs, the folder is ours: another process that wants it ends in one line. (A mark of a
    process that was killed does not count, see `folder`.)"""
    for other in Path(path).glob('training.*.tmp'):
        fail(f"{path}/ is in use: process {other.name.split('.')[1]} trains there; stop it or take another "
             f"folder (or remove {other}, if it does not)")
    mark = Path(path, f'training.{os.getpid()}.tmp')
    with disk(path):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
