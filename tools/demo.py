"""
The first run: a text by the model that comes with the repository, a training, and a text by the new model
beside it.

    make demo
    python -m tools.demo              # the same, in an environment of your own

Ctrl-C ends the training early; the rest goes on with what has been learned until then.
"""
import signal
import subprocess
import sys
from pathlib import Path

import common
from configurator import script, settings
from hub.find import SHIPPED
from tools.glimpse import side_by_side

ROOT = Path(__file__).parents[1]
CONFIG, OUT = ROOT / 'config/demo.py', 'out-demo'


def run(*words, show=True):
    """Run one of the programs with its flags -> what it has printed, unless it is shown. If it fails, the
    script ends as it did."""
    print(f"\n$ python {' '.join(map(str, words)).replace(f'{ROOT}/', '')}\n", flush=True)
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], text=True,
                          stdout=None if show else subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main(argv):
    settings(argv, __doc__)
    print("1. A text by the small model that comes with the repository: it begins as masks.")
    run('sample.py', f'--out_dir={SHIPPED}', '--watch', '--num_samples=1')
    print("\n2. A model of your own, trained from nothing. Ctrl-C ends it early.")
    if not Path('data/shakespeare_char/meta.json').exists():
        run('data/shakespeare_char/prepare.py')
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for train.py, which saves and ends
    run('train.py', CONFIG, f'--out_dir={OUT}')
    signal.signal(signal.SIGINT, before)
    print("\n3. The one that came with the repository (left), and yours (right).")
    texts = [run('sample.py', f'--out_dir={path}', '--num_samples=1', show=False)
             for path in (SHIPPED, OUT)]
    print('\n' + side_by_side(*texts))
    longer = 2 * common.load(Path(OUT, 'last.pt'))['iter']
    print(f"\nWhat next? More text:   python sample.py --out_dir={OUT} --start=\"ROMEO:\" --watch\n"
          f"           How good?    python eval.py --out_dir={OUT}\n"
          f"           Train on:    python train.py --init_from=resume --out_dir={OUT} --max_iters={longer}\n"
          f"           The lesson:  masked.py, then unmask.py")


if __name__ == '__main__':
    script(main)
