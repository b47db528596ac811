"""
Muon for the matrices of the blocks, AdamW for everything else.

Muon (kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum: all directions of a matrix
move equally far. NorMuon (arXiv 2510.05491) also evens out its rows, the neurons.
"""
import torch

from parts.graphs import graphed

STEPS, COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)  # of Newton-Schulz, Muon's


def orthogonal(G, dtype=torch.float32):
    """G (b, m, n) with its singular values moved close to 1: X <- (a + b A + c A^2) X with A = X X', 5 times,
    in `dtype`; returned in it.

    A and its polynomials commute, so the products with X, the large ones, can wait: A alone is carried on,
    and the product Q of the polynomials meets X later. In float32 once, at the end; in bfloat16 that would
    blow up, and A comes from X anew every two steps (NOTES.md). A square X gains nothing by it.
    """
    tall, square = G.size(1) > G.size(2), G.size(1) == G.size(2)
    every = 1 if square else 2 if dtype == torch.bfloat16 else STEPS
    X = (G.mT if tall else G).to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for i in range(STEPS):
        if i % every == 0:
            A, Q = X @ X.mT, None
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        P.diagonal(dim1=1, dim2=2).add_(a)
        Q = P if Q is None else P @ Q
        if (i + 1) % every == 0 or i + 1 == STEPS:
            X = Q @ X
        else:
            A = P @ (P @ A)
    return X.mT if tall else X


def whole(G):
    """The matrices G, gathered from all processes if each has a part of them (tools/parallel.py)."""
    return G.full_tensor() if hasattr(G, 'full_tensor') else G


def part(G, like):
    """This process's part of the whole matrices G, if `like` is shared out among processes."""
    if not hasattr(like, 'full_tensor'):
        return G
    from torch.distributed.tensor import distribute_tensor  # takes a while
    return distribute_tensor(G, like.device_mesh, like.placements, src_data_rank=None)


def evened(update, squares):
    """(the matrices `update` (b, m, n) with every row divided by its root mean square over the last steps,
    then as long as before; the running mean squares `squares` (b, m, 1), brought up to date)."""
    length = update.norm(dim=(1, 2), keepdim=True)
    squares = squares.lerp(update.square().mean(-1, keepdim=True), 0.05)
    rows = update / (squares.sqrt() + 1e-8)
    return rows * (length / rows.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)), squares


class Muon(torch.optim.Optimizer):
    """A step is lr sqrt(max(1, m / n)) long. rows: even out the rows. Without, it is torch.optim.Muon, but
    for rounding: matrices of one shape are orthogonalised together, in `dtype`. Torch's always works in
    bfloat16; where a CPU has no instructions for it a training step takes 3.5 times as long (NOTES.md)."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16, rows=True):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

        def direction(G, squares):
            update = orthogonal(G, dtype).to(squares.dtype)
            return evened(update, squares) if rows else (update, squares)
        self.direction = graphed(direction)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                shapes.setdefault(p.shape, []).append(p)
            for (m, n), alike in shapes.items():
                grads = [p.grad for p in alike]
                for p in alike:
                    if 'momentum_buffer' not in self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                    if 'squares' not in self.state[p]:
                        self.state[p]['squares'] = torch.zeros(m, 1, device=p.device)
                buffers = [self.state[p]['momentum_buffer'] for p in alike]
                torch._foreach_lerp_(buffers, grads, 1 - group['momentum'])
                nesterov = torch.stack(torch._foreach_lerp(grads, buffers, group['momentum']))
                squares = [self.state[p]['squares'] for p in alike]
                update, new = self.direction(whole(nesterov), torch.stack(squares))
                torch._foreach_copy_(squares, new.unbind())
                torch._foreach_mul_(alike, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(alike, part(update, nesterov).unbind(),
                                    alpha=-group['lr'] * max(1, m / n) ** 0.5)


SMALL = ('film.', '.near', '.gate')  # of the blocks, but AdamW's: time input, convolutions, gates


def optimizers(model, lr, muon_lr, weight_decay=0.0, dtype=torch.bfloat16):
    """[AdamW, Muon]: Muon, in `dtype`, for the matrices of the blocks, AdamW for the rest, as for SMALL.
    With muon_lr = 0 AdamW for all. One that would have nothing to do is left out; raises ValueError if
    nothing is trained."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = 'blocks.' in name and p.dim() == 2 and not any(part in name for part in SMALL)
            (matrices if muon_lr and matrix else others).append(p)
    groups = [{'params': [p for p in others if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in others if p.dim() < 2], 'weight_decay': 0.0}]
    groups = [g for g in groups if g['params']]
    found = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))] if groups else []
    found += [Muon(matrices, muon_lr, weight_decay, dtype=dtype)] if matrices else []
    if not found:
        raise ValueError("all parameters of this model are frozen: there is nothing to train")
    return found
