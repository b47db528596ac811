import contextlib
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# for the scripts that tests start; tiny tensors only lose time to a second thread
os.environ['OMP_NUM_THREADS'] = '1'
torch.set_num_threads(1)

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 60
TINY = ['--dataset=tiny', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
        '--max_iters=4', '--eval_interval=2', '--eval_windows=8', '--compile=False',
        '--dtype=float32', '--device=cpu']


def make_tiny(path):
    """A tiny prepared dataset, data/tiny."""
    folder = path / 'data' / 'tiny'
    folder.mkdir(parents=True)
    chars = sorted(set(TEXT))
    tokens = np.array([chars.index(c) for c in TEXT], np.uint16)
    tokens[:4000].tofile(folder / 'train.bin')
    tokens[4000:].tofile(folder / 'val.bin')
    (folder / 'meta.json').write_text(json.dumps(dict(kind='char', chars=chars, source='tests', sha256='')))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working folder with a tiny prepared dataset, data/tiny."""
    make_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='session')
def trainings(tmp_path_factory):
    """A function (runs of train.py, each its flags) -> a folder as they leave it. Every run is made once."""
    import train
    found = {}

    def after(*runs):
        if runs not in found:
            folder = tmp_path_factory.mktemp('trained')
            if runs:
                shutil.copytree(after(*runs[:-1]), folder, dirs_exist_ok=True)
                with contextlib.chdir(folder):
                    train.main(list(runs[-1]))
            else:
                make_tiny(folder)
            found[runs] = folder
        return found[runs]
    return after


@pytest.fixture
def after(workdir, trainings):
    """A function (runs of train.py, each a list of flags): the working folder becomes a copy of one in which
    these were made."""
    def copy(*runs):
        shutil.copytree(trainings(*map(tuple, runs)), workdir, dirs_exist_ok=True)
        return workdir
    return copy


@pytest.fixture
def trained(after):
    """A working folder with a tiny masked model in out-m and its AR twin in out-a."""
    return after([*TINY, '--out_dir=out-m'], [*TINY, '--out_dir=out-a', '--objective=ar'])


def started(*flags):
    """Training in a process of its own; a copy of this one, where there are copies, is there at once."""
    kind = 'fork' if sys.platform == 'linux' else 'spawn'
    import train
    process = multiprocessing.get_context(kind).Process(target=train.main, args=(list(flags),))
    process.start()
    return process


@pytest.fixture
def mistake(capsys):
    """Call a script's main and return its one line of complaint; anything but exit code 2 and one line fails
    the test."""
    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(list(argv))
        out, err = capsys.readouterr()
        assert (exit.value.code == 2 and err.startswith('error: ')
                and err.count('\n') == 1), (exit.value.code, err)
        return err
    return call


class Joint:
    """A random joint distribution over V ** T sequences with all its conditionals, by enumeration: the known
    answer."""

    def __init__(self, V=3, T=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.V, self.T = V, T
        self.x = torch.tensor(list(itertools.product(range(V), repeat=T)))           # (V^T, T)
        self.p = torch.rand(V ** T, generator=generator, dtype=torch.float64) ** 3 + 1e-3
        self.p /= self.p.sum()
        self.calls = 0
        canvases = torch.tensor(list(itertools.product(range(V + 1), repeat=T)))     # ((V + 1)^T, T)
        agrees = ((canvases[:, None] == self.x) | (canvases[:, None] == V)).all(-1)
        weight = agrees * self.p
        onehot = torch.nn.functional.one_hot(self.x, V).double()                     # (V^T, T, V)
        joint = torch.einsum('bn,ntv->btv', weight, onehot)
        self.conditionals = (joint / weight.sum(-1)[:, None, None]).log()

    def logp(self, xt):
        """log p(x0_i = v | unmasked tokens of xt), (B, T, V); V in xt is the mask."""
        self.calls += 1
        return self.conditionals[xt @ (self.V + 1) ** torch.arange(self.T - 1, -1, -1)]

    def denoise(self, xt, t):
        return self.logp(xt)


@pytest.fixture
def joint():
    return Joint()


def chi_square_p(samples, joint_p, V):
    """p-value of the samples (N, T) under probabilities joint_p of all sequences in lexicographic order."""
    index = (samples * V ** torch.arange(samples.size(1) - 1, -1, -1)).sum(-1)
    observed = torch.bincount(index, minlength=len(joint_p)).double()
    expected = joint_p * len(samples)
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(joint_p) - 1) / 2).double(), statistic / 2).item()


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A hub with the repositories me/tiny, once old/name, me/tiny-NAME and the gated me/shut, which all hold
    what is in the folder `served`; returns what has been asked for, and the handler, whose `digest` may
    replace the checksum that is published."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        digest = ''

        def redirect(self, status, path, **headers):
            self.send_response(status)
            for name, value in dict(headers, Location=path, Content_Length='0').items():
                self.send_header(name.replace('_', '-'), value)
            self.end_headers()

        def do_GET(self):
            asked.append(self.path)
            if self.path.startswith('/me/shut/') and self.headers.get('Authorization') != 'Bearer secret':
                return self.send_error(401)
            if self.path.startswith('/old/name/'):  # the hub's way for what has been renamed
                return self.redirect(307, self.path.replace('/old/name/', '/me/tiny/'))
            file = tmp_path / 'served' / self.path.rpartition('/')[2]
            if not self.path.startswith(('/me/tiny', '/me/shut/', '/large/')) or not file.is_file():
                return self.send_error(404 if self.path.startswith('/me/') else 401)
            data = file.read_bytes()
            if file.suffix == '.safetensors' and not self.path.startswith('/large/'):
                digest = self.digest or hashlib.sha256(data).hexdigest()
                return self.redirect(302, f'/large/{file.name}', X_Linked_Etag=f'"{digest}"')
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.chdir(tmp_path)
    yield asked, Handler
    server.shutdown()
