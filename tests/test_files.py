"""What people have and what they get: byte order marks, ~, consoles that know few letters, outputs that are
full or gone, folders that cannot be written, files that are something else."""
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import configurator
import eval as evaluation
from text import files, rows, vocabulary
from hub import export
from hub.find import find
import sample
from tools import frontier, machine, tasks
import train
from conftest import ROOT, TEXT, TINY
from data import tools

BOM = b'\xef\xbb\xbf'


def run(main, *flags):
    """Run a script as a process of its own would; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [main.__module__, *flags])
        try:
            return configurator.script(main) or 0
        except SystemExit as exit:
            return exit.code


# ---- reading ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoding, mark', [('utf-8', BOM), ('utf-8', b''), ('utf-16', b''),
                                            ('utf-16-be', b'\xfe\xff'), ('utf-32', b'')])  # own marks
def test_a_byte_order_mark_is_no_text(encoding, mark):
    for text in ('naïve\nä', 'naïve\r\nä'):
        assert files.text_of(mark + text.encode(encoding), 'x') == 'naïve\nä'


def test_what_cannot_be_read_is_named(workdir, mistake):
    (workdir / 'latin').write_bytes('naïve'.encode('latin-1'))
    (workdir / 'list.json').write_text('[1]')
    (workdir / 'wide').write_bytes('naive'.encode('utf-16-le'))
    assert 'zero bytes' in mistake(lambda argv: files.read_text('wide'))
    for path, words in (('latin', 'UTF-8'), ('none', 'No such file'), ('.', 'directory'), ('a\0b', 'null')):
        assert words in mistake(lambda argv: files.read_text(path))
    assert 'list instead of an object' in mistake(lambda argv: files.read_json('list.json'))
    (workdir / 'deep.json').write_text('[' * 100000)
    assert 'deep.json' in mistake(lambda argv: files.read_json('deep.json'))


def test_every_input_may_begin_with_a_byte_order_mark(trained, capsys):
    from data.gsm8k import prepare as pairs
    from data.lines import prepare as lines
    from data.openwebtext import prepare as documents
    from data.text import prepare as text
    Path('t.txt').write_bytes(BOM + TEXT.encode())
    text.main(['--input=t.txt', '--tokenizer=char', '--out=data/t'])
    assert '\ufeff' not in rows.load_meta('t')['chars']
    lines.main(['--input=t.txt', '--out=data/l', '--vocab_size=60'])
    assert b'\xef' not in vocabulary.Tokenizer(rows.load_meta('l')).pieces
    line = json.dumps(dict(question='a', answer='b', text='To be')).encode()
    jsonl = BOM + b'\n'.join([line] * 4)
    Path('p.jsonl').write_bytes(jsonl)
    read = pairs.read_pairs(jsonl, 'p')
    assert len(read) == 4 and list(documents.file_documents(Path('p.jsonl')))[:2] == ['To be'] * 2
    meta = Path('data/tiny/meta.json')
    meta.write_bytes(BOM + meta.read_bytes())
    Path('start.txt').write_bytes(BOM + b'To b\n')
    evaluation.main(['--out_dir=out-m', '--input=t.txt', '--windows=2'])
    sample.main(['--out_dir=out-m', '--start=FILE:start.txt', '--steps=2', '--num_samples=1'])
    assert '\nTo b' in capsys.readouterr().out
    Path('lambada.txt').write_bytes(BOM + b'to be or not\n')
    assert tasks.load('lambada', 'lambada.txt')[0].before == 'to be or'


def test_a_model_in_files_with_byte_order_marks_is_read(tmp_path):
    from theirs import make_folder
    make_folder(tmp_path / 'theirs', 'llama')
    for name in ('config.json', 'tokenizer.json'):
        path = tmp_path / 'theirs' / name
        path.write_bytes(BOM + path.read_bytes())
    common.load_model(find(str(tmp_path / 'theirs'))[1], torch.device('cpu'))


def test_only_shards_with_numbers_belong_to_a_split(workdir, mistake):
    folder = workdir / 'data' / 'tiny'
    n = rows.count_tokens('tiny', 'train', 30)
    for name in ('train_old.bin', 'train2.bin', 'train_1.bin.tmp', 'trained.bin', 'val-old.bin'):
        (folder / name).write_bytes(bytes(200))
    assert len(rows.load_tokens('tiny', 'train', 30, 'cpu')) == n == 4000
    (folder / 'train_000.bin').write_bytes(bytes(200))
    assert 'remove one of them' in mistake(lambda argv: rows.load_tokens('tiny', 'train', 30, 'cpu'))


def test_a_split_that_a_dataset_does_not_have_is_said_to_be_none(trained, mistake):
    told = mistake(evaluation.main, '--out_dir=out-m', '--split=test')
    assert 'train.bin, val.bin is there' in told and 'test.bin is missing' in told
    tools.prepare_text(dict(test=TEXT), 'byte', 'data/t', 't')
    assert 'test.bin is there' in mistake(evaluation.main, '--out_dir=out-m', '--dataset=t')


def test_tokens_that_are_cut_short_are_refused(workdir, mistake):
    from data.lines import prepare as lines
    with open('data/tiny/val.bin', 'ab') as f:
        f.write(b'x')
    assert 'val.bin is empty, cut short' in mistake(lambda argv: rows.load_tokens('tiny', 'val', 30, 'cpu'))
    (workdir / 't.txt').write_text(TEXT)
    lines.main(['--input=t.txt', '--out=data/l', '--vocab_size=60'])
    os.truncate('data/l/train.bin', 40)
    assert 'cut short' in mistake(train.main, *TINY, '--dataset=l', '--block_size=32')


@pytest.mark.parametrize('meta', [
    dict(kind='char'), dict(kind='bpe', pieces=['é€']), dict(kind='json'), dict(kind='byte', sep=3),
    dict(kind='sentencepiece', model='', vocab_size=3)])
def test_a_damaged_description_of_tokens_ends_in_one_line(meta, workdir, mistake):
    if meta['kind'] == 'sentencepiece':
        pytest.importorskip('sentencepiece')
    Path('data/tiny/meta.json').write_text(json.dumps(meta))
    mistake(train.main, *TINY)


# ---- a checkpoint that is something else ------------------------------------------------------------------

def zipped(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a', 'b')


FOREIGN = {
    'an HTML page': lambda p: p.write_text('<!doctype html><html><body>404</body></html>'),
    'a word': lambda p: p.write_text('hello'), 'a letter': lambda p: p.write_text('.'),
    'a short text': lambda p: p.write_text('This is no checkpoint.\n'),
    'numbers': lambda p: p.write_text('80\n12\n'), 'nothing': lambda p: p.write_bytes(b''),
    'a pickle': lambda p: p.write_bytes(pickle.dumps({'model': 1})),
    'a pickled array': lambda p: p.write_bytes(pickle.dumps(np.zeros(3))),
    'a pickled function': lambda p: p.write_bytes(pickle.dumps(print)),
    "nanoGPT's": lambda p: torch.save(dict(model={}, model_args={}, iter_num=3), p),
    'a module': lambda p: torch.save(torch.nn.Linear(2, 2), p), 'a list': lambda p: torch.save([1], p),
    'a zip file': zipped, 'a folder': Path.mkdir, 'noise': lambda p: p.write_bytes(bytes(range(256)) * 9),
    'a pointer of Git LFS': lambda p: p.write_text('version https://git-lfs.github.com/spec/v1\nsize 1\n')}


@pytest.mark.parametrize('kind', FOREIGN)
def test_a_checkpoint_that_is_something_else_is_said_to_be_none(kind, workdir, mistake):
    (workdir / 'out').mkdir()
    FOREIGN[kind](workdir / 'out' / 'last.pt')
    assert 'out/last.pt is not a checkpoint' in mistake(sample.main, '--out_dir=out')


def test_a_checkpoint_with_something_else_in_a_right_place_ends_in_one_line(trained, mistake):
    whole = common.load('out-m/last.pt')
    for change in (dict(config=[1]), dict(config=dict(n_embd='x')), dict(tokenizer={}),
                   dict(tokenizer=dict(kind='char', chars=['a'])), dict(objective='x'), dict(objective=3),
                   dict(model={}, ema={})):
        torch.save(whole | change, 'changed.pt')
        mistake(sample.main, '--out_dir=changed.pt')


# ---- knobs ------------------------------------------------------------------------------------------------

def test_tilde_is_the_home_folder_in_every_path(trained, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(trained / 'home'))
    (trained / 'home').mkdir()
    (trained / 'home' / 't.txt').write_text(TEXT)
    train.main([*TINY, '--out_dir=~/run'])
    train.main([*TINY, '--init_from=~/run', '--out_dir=~/more'])
    train.main(['--init_from=resume', '--out_dir=~/more', '--max_iters=6'])
    sample.main(['--out_dir=~/more', '--steps=2', '--num_samples=1', '--html=~/page.html'])
    evaluation.main(['--out_dir=~/run', '--input=~/t.txt', '--windows=2'])
    from data.text import prepare
    prepare.main(['--input=~/t.txt', '--out=~/data'])
    assert {p.name for p in (trained / 'home').iterdir()} == {'t.txt', 'run', 'more', 'page.html', 'data'}
    assert not (trained / '~').exists()
    assert sample.prompt_of('FILE:~/t.txt') == TEXT.removesuffix('\n')
    assert configurator.build(dict(start='~/x'), sample.Config)[0].start == '~/x'  # a text is no path


@pytest.mark.parametrize('flags, words', [
    (['--max_iters', '100'], '--max_iters=100'), (['--lr'], '--lr=0.003'), (['--out_dir'], 'out_dir=True'),
    (['--init_from'], 'init_from'), (['--objective'], 'objective'), (['--device'], 'device'),
    (['--compile', 'False'], '--compile=False'), (['--dataset'], 'dataset')])
def test_a_flag_without_its_equals_sign_is_told_how_it_is_written(workdir, mistake, flags, words):
    assert words in mistake(train.main, *TINY, *flags)


def test_an_unknown_knob_is_told_before_a_dataset_is_missed(workdir, mistake):
    assert '--config' in mistake(train.main, '--config=config/train_mdlm.py', '--dataset=none')


@pytest.mark.parametrize('source, word', [('cpu = 3', 'cpu is a dict'), ('cpu = {1: 2}', 'cpu is a dict'),
                                          ('import sys; sys.exit(1)', 'does not run: SystemExit'),
                                          ('lr = [1]', 'lr')])
def test_a_config_file_that_is_something_else_is_named(source, word, workdir, mistake):
    (workdir / 'c.py').write_text(source)
    assert word in mistake(train.main, 'c.py', '--dataset=tiny')


@pytest.mark.parametrize('flag', ['--lr=' + '9' * 400, '--lr={[]:1}', '--T=99999999999999999999',
                                  '--seed=' + '9' * 30, '--lr=' + '[' * 5000, '--device=meta', '--out_dir='])
def test_values_beyond_all_measure_end_in_one_line(flag, workdir, mistake):
    mistake(train.main, *[a for a in TINY if 'device' not in a], flag)


# ---- outputs ----------------------------------------------------------------------------------------------

def test_outputs_that_know_few_letters_are_written_in_utf8(workdir, monkeypatch):
    """What a console writes to a file in cp1252 or ASCII, and '±' of the log."""
    chars = sorted(set('Мой дядя самых честных правил 日本'))
    ids = np.random.default_rng(0).integers(len(chars), size=400).astype(np.uint16)
    for split in ('train', 'val'):
        ids.tofile(f'data/tiny/{split}.bin')
    Path('data/tiny/meta.json').write_text(json.dumps(dict(kind='char', chars=chars)))
    for encoding, main, flags in (('ascii', train.main, TINY), ('cp1252', sample.main, [
            '--steps=2', '--num_samples=1', '--html=x.html'])):
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding))
        assert run(main, *flags) == 0
        text = sys.stdout.buffer.getvalue().decode()
        assert '±' in text if main is train.main else len(text.rstrip('\n')) == 16
    assert Path('x.html').exists()


def shell(command, **how):
    """A command as a person types it; PY is this Python."""
    return subprocess.run(command.replace('PY', sys.executable), shell=True, capture_output=True, timeout=120,
                          **how)


def test_a_reader_that_leaves_ends_a_script_without_a_traceback():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from configurator import script"
    done = shell(f"""PY -c "{code}; script(lambda argv: print('text' * 10 ** 6))" | head -c 4""")
    assert done.stdout == b'text' and b'Traceback' not in done.stderr and b'ignored' not in done.stderr


@pytest.mark.skipif(not Path('/dev/full').exists(), reason="needs /dev/full")
def test_a_full_output_ends_in_one_line_after_all_else_is_done(trained, monkeypatch, capsys):
    for main, flags in ((sample.main, ['--out_dir=out-m', '--steps=2', '--html=x.html']), (train.main, TINY)):
        with open('/dev/full', 'w') as full, monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', full)
            assert run(main, *flags) == 2
        told = capsys.readouterr().err
        assert 'standard output' in told and told.count('\n') == 1
    assert Path('x.html').exists()  # saved before anything is printed
    assert common.load('out/last.pt')['iter'] == 4


def test_outputs_that_are_closed_are_as_if_they_were_nowhere(trained, monkeypatch, capsys):
    done = shell(f"PY {ROOT / 'train.py'} {' '.join(TINY)} >&- 2>&-")
    assert done.returncode == 0 and common.load('out/last.pt')['iter'] == 4
    for name, flags in (('stderr', []), ('stdout', ['--watch', '--num_samples=1'])):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert run(sample.main, '--out_dir=out-m', '--steps=2', *flags) == 0
        out, err = capsys.readouterr()
        assert '[out' not in out and bool(out) == (name == 'stderr')


def test_too_little_memory_ends_in_one_line(mistake):
    assert 'out of memory' in mistake(lambda argv: configurator.script(lambda argv: torch.empty(10 ** 15)))


def test_links_are_followed_and_devices_and_pipes_are_written_to_as_they_are(workdir):
    (workdir / 'real').write_text('old')
    (workdir / 'link').symlink_to('real')
    (workdir / 'dangling').symlink_to('gone')
    files.write('link', 'new')
    files.write('dangling/x', 'new')
    files.writable('dangling/y', 'html')
    assert (workdir / 'real').read_text() == 'new' and (workdir / 'link').is_symlink()
    assert (workdir / 'gone' / 'x').read_text() == 'new'
    if hasattr(os, 'mkfifo'):
        os.mkfifo('pipe')
        reader = subprocess.Popen(['cat', 'pipe'], stdout=subprocess.PIPE)
        files.write('pipe', 'new')
        assert reader.communicate(timeout=20)[0] == b'new' and not (workdir / 'pipe').is_file()


def test_a_name_that_is_too_long_is_told_at_the_start(trained, mistake, monkeypatch):
    monkeypatch.setattr(common, 'load', lambda *_: pytest.fail("too late"))
    mistake(sample.main, '--out_dir=out-m', '--html=' + 'a' * 250)


def test_preparing_anew_on_a_disk_that_is_full_leaves_what_was_there(workdir, mistake, monkeypatch):
    tools.prepare_bytes(TEXT.encode(), 't', 'char', 'data/t')
    before = {p.name: p.read_bytes() for p in Path('data/t').iterdir()}
    written, real = [], files.os.fsync

    def full(number):
        written.append(number)
        if len(written) == 2:  # the second of two files
            raise OSError(28, 'No space left on device')
        real(number)
    monkeypatch.setattr(files.os, 'fsync', full)
    assert 'make room' in mistake(lambda argv: tools.prepare_bytes(TEXT.encode() * 2, 't', 'byte', 'data/t'))
    assert {p.name: p.read_bytes() for p in Path('data/t').iterdir()} == before


@pytest.mark.parametrize('main, flag', [
    (sample.main, '--html=file/x.html'), (sample.main, '--html=data'),
    (frontier.main, '--judge=out-a --csv=file/x.csv'), (frontier.main, '--judge=out-a --plot=file/x.svg'),
    (frontier.main, '--judge=out-a --plot=x.txt'),
    (export.main, '--to=file')])
def test_what_cannot_be_written_is_told_before_the_model_is_loaded(trained, mistake, monkeypatch, main, flag):
    (trained / 'file').touch()
    monkeypatch.setattr(common, 'load', lambda *_: pytest.fail("too late"))
    assert flag.split()[-1].split('=')[1] in mistake(main, '--out_dir=out-m', *flag.split())
    assert sorted(p.name for p in trained.iterdir()) == ['data', 'file', 'out-a', 'out-m']


def test_the_folders_of_what_is_written_are_made(trained, capsys):
    sample.main(['--out_dir=out-m', '--steps=2', '--num_samples=1', '--html=new/deep/x.html'])
    assert [p.name for p in (trained / 'new' / 'deep').iterdir()] == ['x.html']


def test_a_preparer_finds_out_first_that_its_folder_cannot_be_written(workdir, mistake, monkeypatch):
    from data.text import prepare
    (workdir / 'file').touch()
    (workdir / 't.txt').write_text(TEXT)
    monkeypatch.setattr(tools, 'prepare_bytes', lambda *_: pytest.fail("too late"))
    assert 'file is no folder' in mistake(prepare.main, '--input=t.txt', '--out=file/x')


# ---- the folder of a run ----------------------------------------------------------------------------------

def test_training_finds_out_first_that_its_folder_is_a_file(workdir, mistake, monkeypatch):
    (workdir / 'afile').touch()
    monkeypatch.setattr(train, 'train', lambda *_: pytest.fail("too late"))
    assert 'afile is no folder' in mistake(train.main, *TINY, '--out_dir=afile/x')


def test_training_finds_out_first_that_there_is_no_room(workdir, mistake, monkeypatch):
    monkeypatch.setattr(train, 'train', lambda *_: pytest.fail("too late"))
    full = type('Usage', (), dict(free=1000))
    monkeypatch.setattr(machine.shutil, 'disk_usage', lambda path: full)
    assert 'no room for the checkpoints in out/' in mistake(train.main, *TINY)


def test_the_room_that_is_asked_for_is_what_two_checkpoints_and_a_temporary_one_take(workdir, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, 'fail', lambda message: asked.append(message.split('take ')[1].split()[0]))
    full = type('Usage', (), dict(free=0))
    monkeypatch.setattr(machine.shutil, 'disk_usage', lambda path: full)
    train.main([*TINY, '--n_embd=64', '--n_layer=4'])
    best, last = (Path('out', name).stat().st_size / 1e6 for name in ('best.pt', 'last.pt'))
    assert abs(float(asked[0]) / (best + 2 * last) - 1) < 0.1


def test_a_new_run_moves_the_checkpoints_of_an_old_one_aside_and_says_so(workdir, after, capsys):
    after(TINY)
    old = {name: Path('out', name).read_bytes() for name in ('best.pt', 'last.pt')}
    (workdir / 'out' / 'mine.txt').touch()
    capsys.readouterr()
    train.main([*TINY, '--out_dir=out', '--objective=ar', '--eval_interval=100', '--max_iters=2'])
    assert 'out/old-1/ from now on' in capsys.readouterr().out.splitlines()[0]
    assert all(Path('out/old-1', name).read_bytes() == data for name, data in old.items())
    assert common.load('out/best.pt')['objective'] == common.load('out/last.pt')['objective'] == 'ar'
    sample.main(['--out_dir=out/old-1', '--steps=2'])
    train.main([*TINY, '--init_from=out', '--out_dir=out', '--objective=ar'])  # of itself
    assert sorted(p.name for p in (workdir / 'out').iterdir()) == ['best.pt', 'last.pt', 'mine.txt', 'old-1',
                                                                   'old-2']
    train.main(['--init_from=resume', '--out_dir=out', '--max_iters=6'])  # the same run: nothing is moved
    assert not (workdir / 'out' / 'old-3').exists()


def test_a_new_run_that_has_not_saved_yet_is_not_taken_for_the_old_one(after, mistake, monkeypatch):
    after(TINY)

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, 'step', killed)  # before its first checkpoint
    with pytest.raises(KeyboardInterrupt):
        train.main([*TINY, '--out_dir=out', '--objective=ar'])
    told = mistake(sample.main, '--out_dir=out')
    assert 'there is no checkpoint out/last.pt yet' in told and 'out/old-1/last.pt' in told


@pytest.mark.parametrize('flags', [['--expanded=True'], ['--dataset=lines', '--objective=block'],
                                   ['--dataset=empty']])
def test_a_mistake_moves_nothing(flags, workdir, after, mistake):
    from data.lines import prepare as lines
    (workdir / 't.txt').write_text(TEXT)
    lines.main(['--input=t.txt', '--out=data/lines', '--vocab_size=60'])
    tools.write_splits('data/empty', dict(train=[0] * 100, val=[]), dict(kind='byte'))
    after(TINY)
    mistake(train.main, *TINY, '--out_dir=out', *flags)
    assert sorted(p.name for p in (workdir / 'out').iterdir()) == ['best.pt', 'last.pt']


def test_temporary_files_of_killed_processes_are_removed_and_no_others(workdir):
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    (workdir / 'out').mkdir()
    for name in (f'last.pt.{gone.pid}.tmp', f'best.pt.{os.getpid()}.tmp', f'latents-1.{gone.pid}.tmp',
                 f'last.pt.{os.getppid()}.tmp', 'mine.tmp'):
        (workdir / 'out' / name).touch()
    os.utime(workdir / 'out' / 'mine.tmp', (0, 0))
    train.main(TINY)
    assert sorted(p.name for p in (workdir / 'out').iterdir()) == sorted([
        'best.pt', 'last.pt', 'mine.tmp', f'last.pt.{os.getppid()}.tmp'])  # that process is alive


def test_two_runs_at_once_cannot_share_a_folder(workdir, mistake):
    mark = workdir / 'out' / f'training.{os.getppid()}.tmp'
    mark.parent.mkdir()
    mark.touch()  # of a process that is alive
    assert f'process {os.getppid()} trains there' in mistake(train.main, *TINY)
    mark.rename(workdir / 'out' / 'training.99999999.tmp')
    train.main(TINY)
    assert sorted(p.name for p in (workdir / 'out').iterdir()) == ['best.pt', 'last.pt']


def test_a_finished_run_that_is_resumed_says_so(after, capsys):
    after(TINY)
    before = Path('out/last.pt').read_bytes()
    capsys.readouterr()
    train.main(['--init_from=resume'])
    out = capsys.readouterr().out
    assert 'finished' in out and '--max_iters=' in out and Path('out/last.pt').read_bytes() == before
    train.main(['--init_from=resume', '--max_iters=2'])
    assert 'done 4 iterations, max_iters is 2' in capsys.readouterr().out


def test_a_best_pt_cannot_be_resumed_and_says_why(workdir, after, mistake):
    after(TINY)
    (workdir / 'out' / 'best.pt').rename(workdir / 'out' / 'last.pt')
    assert 'a best.pt has none' in mistake(train.main, '--init_from=resume', '--max_iters=9')


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason="Windows has no SIGHUP")
@pytest.mark.parametrize('ignored', [False, True])
def test_a_terminal_that_hangs_up_saves_and_one_that_is_left_alone_by_nohup_goes_on(
        workdir, capsys, monkeypatch, ignored):
    own, before = train.step, signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    def hanging_up(state, *more):
        signal.raise_signal(signal.SIGHUP) if state.iter == 1 else None
        return own(state, *more)
    monkeypatch.setattr(train, 'step', hanging_up)
    try:
        train.main(TINY)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ('--init_from=resume' in capsys.readouterr().out) == (not ignored)
    assert common.load('out/last.pt')['iter'] == (4 if ignored else 2)


def test_the_length_of_a_text_is_checked_before_a_model_is_made(workdir, mistake, monkeypatch):
    monkeypatch.setattr(train, 'State', lambda *_: pytest.fail("too late"))
    assert 'fewer than block_size=100000000' in mistake(train.main, *TINY, '--block_size=100000000')


# ---- texts of almost nothing ------------------------------------------------------------------------------

@pytest.mark.parametrize('objective', ['ar', 'masked', 'block'])
def test_a_vocabulary_of_one_trains_samples_and_is_measured(workdir, objective, capsys):
    tools.prepare_bytes(b'a' * 1000, 'one.txt', 'char', 'data/one')
    train.main([*TINY, '--dataset=one', f'--objective={objective}'])
    for rule in ('', 'margin', 'entropy', 'analytic')[:4 if objective == 'masked' else 1]:
        sample.main(['--steps=3', '--num_samples=1', *[f'--rule={rule}'] * bool(rule)])
        assert capsys.readouterr().out.splitlines()[-1] == 'a' * 16
    evaluation.main(['--windows=2'])
    assert '| 0.0000 ± 0.0000 |' in capsys.readouterr().out


def test_an_empty_text_to_score_is_said_to_be_none(trained, mistake):
    (trained / 'empty.txt').touch()
    assert 'holds no text' in mistake(evaluation.main, '--out_dir=out-m', '--input=empty.txt')


def test_a_given_text_that_is_no_utf8_is_refused_and_a_path_is_not(mistake):
    assert '--start is not UTF-8' in mistake(lambda argv: configurator.build(dict(start='caf\udce9'),
                                                                             sample.Config))
    assert configurator.build(dict(html='caf\udce9'), sample.Config)[0].html == 'caf\udce9'
