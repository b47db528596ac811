"""
A checkpoint of ours to give away: as a folder in Hugging Face's layout, adapters merged, or as a small file.

    python -m hub.export --out_dir=out-adapt --to=FOLDER
    python -m hub.export --out_dir=out-mdlm --to=small.pt   # averaged weights in half precision, nothing else

The file is one of ours and works wherever a checkpoint is named. The folder is in the layout of the published
family that the model has the shape of (hub/families.py). transformers opens GPT-2, LLaMA and Qwen, the
authors' code MDLM, BD3-LM, SEDD, LLaDA, Dream and DiffuGPT. What they do not know is there too
(hub/folder.py), so that our scripts read all of the model back.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common
from configurator import Filename, fail, script, settings
from hub.find import find
from hub.folder import write_folder
from text import files


@dataclass
class Config:
    out_dir: Filename = ''  # the checkpoint to write down; '': the newest out*/
    which: Literal['best', 'last'] = 'best'  # best | last
    to: Filename = ''       # the folder that is made, or a file that ends in .pt


def slim(checkpoint):
    """A checkpoint dict without optimizers, with its averaged weights, in half precision, as its only ones.
    """
    half = {name: t.half() if t.is_floating_point() else t for name, t in checkpoint['ema'].items()}
    return {k: v for k, v in checkpoint.items() if k != 'optimizers'} | dict(model=half, ema=half)


def main(argv):
    config, _ = settings(argv, __doc__, Config)
    if not config.to:
        fail("where to? --to=FOLDER or --to=FILE.pt")
    if Path(config.to).suffix == '.pt':
        files.writable(config.to, 'to')
        path, checkpoint = find(config.out_dir, config.which)
        common.save(slim(checkpoint), config.to)
        return print(f"{path}: {Path(config.to).stat().st_size / 1e6:.1f} MB, to {config.to}")
    if Path(config.to, 'config.json').exists() or any(Path(config.to).glob('*.pt')):
        fail(f"{config.to} holds a model or checkpoints already: name another folder")
    files.folder(config.to, 'to')
    path, checkpoint = find(config.out_dir, config.which)
    tensors = write_folder(checkpoint, config.to)
    print(f"{path}: {len(tensors)} tensors, the rows of the marks among them, to {config.to}/")


if __name__ == '__main__':
    script(main)
