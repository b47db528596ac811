"""
A checkpoint of ours as a folder in Hugging Face's layout, adapters merged.

    python -m hub.export --out_dir=out-adapt --to=FOLDER

transformers opens it as a GPT-2 or LLaMA model. What it does not know, the objective and the rows of [MASK]
and [BOS], is there too (hub/folder.py), so that our scripts read all of the model back.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import Filename, fail, script, settings
from hub.find import find
from hub.folder import write_folder
from text import files


@dataclass
class Config:
    out_dir: Filename = ''  # the checkpoint to write down; '': the newest out*/
    which: Literal['best', 'last'] = 'best'  # best | last
    to: Filename = ''       # the folder that is made


def main(argv):
    config, _ = settings(argv, __doc__, Config)
    if not config.to:
        fail("where to? --to=FOLDER")
    if Path(config.to, 'config.json').exists() or any(Path(config.to).glob('*.pt')):
        fail(f"{config.to} holds a model or checkpoints already: name another folder")
    files.folder(config.to, 'to')
    path, checkpoint = find(config.out_dir, config.which)
    tensors = write_folder(checkpoint, config.to)
    print(f"{path}: {len(tensors)} tensors, the rows of the marks among them, to {config.to}/")


if __name__ == '__main__':
    script(main)
