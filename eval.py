"""
Measure a checkpoint: -log p in nats and bits per token, exact or an upper bound, with its standard error.

    python eval.py --out_dir=out-mdlm                  # the dataset's validation split, all of it
    python eval.py --out_dir=out-mdlm --order=left     # the same network left to right: exact, another model
    python eval.py --out_dir=out-ar --input=my.txt     # another text

The text is cut into windows of the model's block size, each scored on its own; every objective sees
the same windows. The standard error is over windows and holds both the noise of the estimate and the
spread of the text.
"""
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from configurator import build, fail, help_text, read


@dataclass
class Config:
    out_dir: str = ''        # folder of the checkpoint; '': the newest out*/
    which: str = 'best'      # best | last
    ema: bool = True         # the averaged weights
    device: str = 'auto'     # auto | cpu | cuda | mps
    dtype: str = 'float32'   # of the networks: float32 | bfloat16 | auto
    seed: int = 1337         # equal seeds, equal figures
    input: str = ''          # a UTF-8 text to score; '': val.bin of the dataset
    windows: int = 0         # how many windows, evenly spread; 0: all
    draws: int = 8           # noise draws a window, for bounds
    order: str = ''          # '': the objective's own; left: a denoiser's exact likelihood left to right

    def __post_init__(self):
        if self.draws < 1 or self.windows < 0 or self.seed < 0:
            raise ValueError(f"draws={self.draws} must be at least 1, "
                             f"windows={self.windows} and seed={self.seed} not negative")
        if self.order not in ('', 'left'):
            raise ValueError(f"order={self.order!r} is not one of: left")


def text_windows(config, checkpoint, tokenizer, T, device):
    """Windows (N, T) of --input or of the dataset the checkpoint was trained on."""
    if config.input:
        try:
            text = Path(config.input).read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as e:
            fail(f"cannot read --input={config.input}: {e}")
        tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int16, device=device)
    else:
        dataset = checkpoint['run']['dataset']
        if common.load_meta(dataset) != checkpoint['tokenizer']:
            fail(f"data/{dataset} has been prepared anew from another text: score a text with --input=FILE")
        tokens = common.load_tokens(dataset, 'val', tokenizer.vocab_size, device)
    if len(tokens) < T:
        fail(f"the text has {len(tokens)} tokens, fewer than block_size={T}")
    return common.windows(tokens, T, config.windows)


def main(argv):
    files, _, flags = read(argv)
    if 'help' in flags:
        return print(help_text(__doc__, Config))
    config, = build({**files, **flags}, Config)
    device = common.pick_device(config.device)
    checkpoint = common.load(common.find_checkpoint(config.out_dir, config.which))
    model, tokenizer = common.load_model(checkpoint, device, config.ema)
    x = text_windows(config, checkpoint, tokenizer, model.config.block_size, device)

    nats = functools.partial(model.nats, n=config.draws)
    label = {'exact': 'exact', 'upper': 'upper bound'}[model.bound]
    if config.order and model.bound != 'exact':  # an autoregressive model's own order is left
        if not hasattr(model, 'nats_left'):
            fail(f"order={config.order} is not something {checkpoint['objective']} can do")
        nats, label = model.nats_left, 'exact, left to right'
    with common.autocast(device, common.pick_dtype(config.dtype, device)):
        mean, error = common.evaluate(nats, x, config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print("| objective | parameters | tokens seen | nats/char | bits/char | likelihood | windows |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {checkpoint['objective']} | {parameters / 1e6:.2f}M | {checkpoint['tokens'] / 1e6:.1f}M | "
          f"{mean:.4f} ± {error:.4f} | {mean / math.log(2):.4f} ± {error / math.log(2):.4f} | "
          f"{label} | {x.size(0)} of {x.size(1)} |")


if __name__ == '__main__':
    main(sys.argv[1:])
