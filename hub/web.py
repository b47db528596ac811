"""
Downloads that continue where they were cut, and what lies in zip files.
"""
import hashlib
import os
import sys
import time
import zipfile
from pathlib import Path

import requests
from tqdm import tqdm

from configurator import fail
from text import files

TRIES, PAUSE = 5, 1.0  # of a download that was cut; seconds before the second, doubled for each after it


def address(repository, name, kind='datasets/'):
    """The URL of a file in a dataset of the Hugging Face hub (kind='': a model), or of its mirror
    HF_ENDPOINT."""
    host = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    return f'{host}/{kind}{repository}/resolve/main/{name}'


def append(url, part, headers):
    """One connection: ask for what the file `part` lacks and append it -> what the hub says to be the file's
    sha256, or ''. Raises requests.RequestException; what has come by then stays in `part`."""
    have = part.stat().st_size if part.exists() else 0
    asked = {**headers, 'Accept-Encoding': 'identity'}  # otherwise lengths would count compressed bytes
    if have:
        asked['Range'] = f'bytes={have}-'
    with requests.get(url, headers=asked, stream=True, timeout=20) as response:
        # the hub redirects to where large files lie; the checksum stands in its own answer
        tags = [r.headers.get('x-linked-etag', '').strip('"') for r in (*response.history, response)]
        sha256 = next((tag for tag in tags if len(tag) == 64), '')
        size = response.headers.get('content-range', '').rpartition('/')[2]
        if response.status_code == 416 and have:  # nothing lies beyond `have`
            if size == str(have):
                return sha256
            part.unlink()  # of another file, or of another version of this one
            return append(url, part, headers)
        response.raise_for_status()
        if response.status_code != 206:  # the server knows no ranges and sends all of it
            have, size = 0, response.headers.get('content-length', '')
        total = int(size) if size.isdigit() else None
        with files.disk(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            f = open(part, 'ab' if have else 'wb')
        with f, tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=part.stem,
                     disable=not sys.stderr.isatty()) as bar:
            for chunk in response.iter_content(1 << 16):
                with files.disk(part):
                    f.write(chunk)
                    f.flush()  # a full disk says so here
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes came")
    return sha256


def download(url, path, sha256='', headers=()):
    """url -> path, whole and with the right checksum, or not at all; a file that exists is left alone.

    What has come lies in path.part, where the next call continues. A connection that was cut is tried again,
    one that never gave a byte is not. Raises requests.RequestException, or ValueError (another checksum).
    """
    path = Path(path)
    if path.exists():
        return
    part = path.with_name(path.name + '.part')
    for attempt in range(TRIES):
        try:
            sha256 = append(url, part, dict(headers)) or sha256
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            if attempt == TRIES - 1 or not part.exists():
                raise
            time.sleep(PAUSE * 2 ** attempt)
    if sha256:
        with open(part, 'rb') as f:
            found = hashlib.file_digest(f, 'sha256').hexdigest()
        if found != sha256:
            part.unlink()
            raise ValueError(f"sha256 {found[:12]}… instead of {sha256[:12]}…")
    os.replace(part, path)


def fetch(url, path, sha256='', otherwise='', headers=(), known=()):
    """download(), or the script ends. Returns the HTTP status, 200 or one of those in `known`, which are not
    failures. otherwise: another way out."""
    try:
        download(url, path, sha256, headers)
        return 200
    except (requests.RequestException, ValueError) as e:
        status = e.response.status_code if isinstance(e, requests.HTTPError) else 0
        why = type(e).__name__ if isinstance(e, requests.ConnectionError) else str(e)[:150]
    if status not in known:
        fail(f"{url} could not be downloaded ({why}): run the same command again, it goes on where it "
             f"stopped{otherwise and '; or ' + otherwise}")
    return status


def unzip(path, member):
    """The bytes of one member of a zip file, which has a checksum of its own; or the script ends."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError) as e:
        fail(f"{path} is damaged or another file than expected ({e}): replace it")
