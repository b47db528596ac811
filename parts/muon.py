"""
Muon for the matrices of the blocks, AdamW for everything else.

Muon (kellerjordan.github.io/posts/muon) steps along the orthogonalised momentum: all directions of a matrix
move equally far.
"""
import torch


def orthogonal(G, steps=5):
    """G (m, n) with its singular values moved close to 1, by Newton-Schulz steps with Muon's coefficients."""
    tall = G.size(0) > G.size(1)
    X = G.T if tall else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X.T if tall else X


class Muon(torch.optim.Optimizer):
    """A step is lr sqrt(max(1, m / n)) long. As torch.optim.Muon, which always works in bfloat16; on a CPU
    without instructions for it a training step then takes 3.5 times as long as with float32 (NOTES.md)."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                buffer = self.state[p].setdefault('momentum_buffer', torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - group['momentum'])
                update = orthogonal(p.grad.lerp(buffer, group['momentum']).to(self.dtype))  # Nesterov's
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-group['lr'] * max(1, p.size(0) / p.size(1)) ** 0.5)


def optimizers(model, lr, muon_lr, weight_decay=0.0, dtype=torch.bfloat16):
    """[AdamW, Muon]: Muon, in `dtype`, for the matrices of the blocks, AdamW for the rest (their time input
    too). With muon_lr = 0 AdamW for all. One that would have nothing to do is left out; raises ValueError if
    nothing is trained."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            muon = muon_lr and 'blocks.' in name and 'film.' not in name and p.dim() == 2
            (matrices if muon else others).append(p)
    groups = [{'params': [p for p in others if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in others if p.dim() < 2], 'weight_decay': 0.0}]
    groups = [g for g in groups if g['params']]
    found = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))] if groups else []
    found += [Muon(matrices, muon_lr, weight_decay, dtype=dtype)] if matrices else []
    if not found:
        raise ValueError("all parameters of this model are frozen: there is nothing to train")
    return found
