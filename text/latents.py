"""
The windows of a text as latents, for latent.py: encoded once, kept on disk.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from text import files


@torch.no_grad()
def cached(encoder, windows, folder, rows=256):
    """Latents (N, n, d) float16 of all `windows` (a windows.Passages) by the VAE `encoder`, `rows` at once.
    They are kept in the folder, in a file whose name is a hash of both, and on the device of the windows."""
    key = hashlib.sha256(f'{windows.W} {encoder.config.sentences}'.encode())
    for t in (*encoder.state_dict().values(), windows.tokens, windows.start):
        key.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    path, device = Path(folder, f'latents-{key.hexdigest()[:16]}.npy'), windows.start.device
    if not path.exists():
        shape = len(windows), encoder.config.n_latent, encoder.config.d_latent
        parts = torch.arange(len(windows), device=device).split(rows)
        with files.writing(path) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr='<f2', fortran_order=False, shape=shape))
            for part in tqdm(parts, desc=f'latents of {len(windows)} windows', disable=None):
                f.write(encoder.encode(windows.window(part)).half().cpu().numpy().tobytes())
    return torch.from_numpy(np.load(path)).to(device)


class Latents:
    """Rows of latents z (N, n, d) of `windows` (a windows.Passages) with those before them; see rows.py."""

    def __init__(self, windows, z):
        self.windows, self.z = windows, z

    def inputs(self, i):
        """Of windows i (B,): latents z (B, n, d); before (B, n_prev, n, d), those of the windows before, the
        nearest last; there (B, n_prev) bool: which of these exist."""
        j = self.windows.before(i, self.windows.n_prev)
        return dict(z=self.z[i].float(), before=self.z[j.clamp(min=0)].float(), there=j >= 0)

    def batch(self, B):
        return self.inputs(torch.randint(len(self.windows), (B,), device=self.z.device)), B * self.windows.W

    def all(self, most=0):
        return self.inputs(self.windows.spread(most))

    def report(self, B):
        return ''
