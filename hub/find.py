"""
The checkpoint that a person names: one of ours, a folder in Hugging Face's layout, or a model of the hub.

    python train.py config/adapt_gpt2.py --init_from=gpt2            # or any of what follows
    python sample.py --out_dir=HuggingFaceTB/SmolLM2-135M --start="The capital of Italy is" --length=16
    python eval.py --out_dir=FOLDER --input=my.txt

Every script takes these names: a folder or file of ours; a folder with config.json, *.safetensors and, if
its tokens are not GPT-2's, a tokenizer; gpt2, gpt2-medium, gpt2-large, gpt2-xl; owner/name on the Hugging
Face hub (hub/families.py lists the kinds of model that are known). The last two are downloaded once, into
HF_HOME, unless the hub's own library has them already (in HF_HUB_CACHE). HF_ENDPOINT names a mirror; HF_TOKEN
is needed for models that ask for consent.
"""
import functools
import os
import re
import sys
import time
from pathlib import Path

import common
from configurator import fail
from hub import layout, web
from hub.folder import described, read_folder
from hub.older import upgraded
from hub.tensors import shards
from text import files

SHIPPED = Path(__file__).parents[1] / 'trained' / 'shakespeare.pt'  # how it was made: README.md there
GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# the first part of a path that rather means a folder here than an owner on the hub
OURS = re.compile(r'out.*|(run|experiment|exp|log|checkpoint|ckpt|model|result|save|train|test|tmp|data'
                  r'|config)s?', re.IGNORECASE)


def find(source, which='best'):
    """The name of a checkpoint ('': the newest out*/) -> (its path, checkpoint dict), or the script ends."""
    path = Path(source)
    if source and (path / 'config.json').is_file():
        if any(path.glob('*.pt')):
            fail(f"{path}/ holds a config.json and checkpoints of ours too: move one of them away")
        return path, upgraded(read_folder(path))
    if path.is_file():
        return path, upgraded(common.load(path))
    on_hub = (re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', source) and path.suffix != '.pt'
              and not path.parent.exists() and not OURS.fullmatch(path.parts[0]))
    if source in GPT2 and not path.exists() or on_hub:
        return source, upgraded(read_folder(download(source), source))
    if source and not path.exists() and len(path.parts) == 1 and not source.startswith('out'):
        fail(f"there is no {source} here: `python train.py config/train_mdlm.py` makes a checkpoint; "
             f"others' are {', '.join(GPT2)}, and owner/name on the hub")
    path = of_ours(source, which)
    return path, upgraded(common.load(path))


def of_ours(out_dir, which):
    """out_dir/best.pt or last.pt; without out_dir, of the out*/ that was written last, or, if there is none,
    the checkpoint that comes with the repository."""
    if not out_dir:
        found = sorted(Path('.').glob('out*/last.pt'), key=lambda p: p.stat().st_mtime)
        if not found:
            print(f"[no out*/ here: {SHIPPED} writes, the small model that comes with the repository; "
                  f"`python train.py config/train_mdlm.py` makes one of your own]", file=sys.stderr)
            return SHIPPED
        out_dir = found[-1].parent
    path = Path(out_dir, f'{which}.pt')
    if Path(out_dir).suffix == '.pt' and not Path(out_dir).is_dir():
        fail(f"there is no checkpoint {out_dir}")
    return path if path.exists() else Path(out_dir, 'last.pt')


def tokenizer(source):
    """The meta of the tokenizer of a model, named as for `find`; or the script ends."""
    folder = Path(source)
    if (folder / 'last.pt').is_file() or folder.is_file():
        meta = find(source)[1]['tokenizer']
    else:
        folder = folder if folder.is_dir() else download(source, weights=False)
        meta = described(folder, source).tokenizer
    return {k: v for k, v in meta.items() if k not in ('source', 'sha256', 'before', 'sep', 'first')}


# ---- the hub ----------------------------------------------------------------------------------------------

def places(repository):
    """Where a repository may lie: where we put it, and where the hub's own library has."""
    caches = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    home = Path(os.environ.get('HF_HOME') or Path(caches, 'huggingface')).expanduser()
    cache = os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE') or home / 'hub'
    theirs = Path(cache).expanduser() / f"models--{repository.replace('/', '--')}"
    current = theirs / 'refs' / 'main'
    name = current.read_text().strip() if current.is_file() else ''
    return home / 'unmask' / repository.replace('/', '--'), theirs / 'snapshots' / name


def whole(folder, weights):
    """Does the folder hold all of a model (weights: its tensors too)?"""
    there = lambda name: (folder / name).exists()
    if not there('config.json') or weights and not all(map(there, shards(folder))):
        return False
    return (there('tokenizer.json') or there('tokenizer.model')
            or has_gpt2s(files.read_json(folder / 'config.json')))


def download(repository, weights=True):
    """owner/name, or gpt2 -> a folder with its files, downloaded unless they are there; or the script ends.
    weights=False: only config.json and the tokenizer."""
    folder, theirs = places(repository)
    for there in (theirs, folder):
        if whole(there, weights):
            return there
    while int(os.environ.get('LOCAL_RANK', 0)):  # one of several processes downloads
        time.sleep(1)
        if whole(folder, weights):
            return folder
    get = functools.partial(get_file, repository, folder)
    get('config.json', needed=True)
    refuse_unknown(files.read_json(folder / 'config.json'), repository)
    if not (get('tokenizer.json') or get('tokenizer.model')):
        get('vocab.json'), get('merges.txt'), get('added_tokens.json')
    get('tokenizer_config.json'), get('chat_template.jinja')  # how it is spoken to, if it is
    if weights and not get('model.safetensors'):
        get('model.safetensors.index.json')
        for name in shards(folder):
            get(name, needed=True)
    return folder


def refuse_unknown(theirs, repository):
    """End the script if a config.json (dict) is of a model that cannot be read."""
    try:
        layout.family_of(theirs, repository)
    except ValueError as e:
        fail(f"{repository}: {e}")


def has_gpt2s(theirs):
    """Does a model with this config.json (dict) have GPT-2's tokens, which tiktoken has?"""
    try:
        return layout.family_of(theirs).tokenizer == 'gpt2'
    except ValueError:
        return False


def get_file(repository, folder, name, needed=False):
    """Download a file of a repository unless it is there -> is it there now? The script ends if it is needed
    and the hub has none."""
    token = os.environ.get('HF_TOKEN')
    status = web.fetch(web.address(repository, name, ''), folder / name, known=(401, 403, 404),
                       headers={'Authorization': f'Bearer {token}'} if token else {},
                       otherwise="offline, name a folder that holds the model")
    if status in (401, 403):
        fail(f"{repository} does not exist here nor on the hub, or is behind a consent, for which HF_TOKEN "
             f"must hold a token")
    if status == 404 and needed:
        fail(f"{repository} on the hub has no {name}")
    return status == 200
