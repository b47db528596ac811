"""
Changes to what a denoiser says before a rule chooses among it: a denoiser in, a denoiser out,
(xt (B, T), t (B,)) -> log p(x0 | xt) (B, T, V), normalised.
"""
import torch


def guided(denoise, given, mask_id, scale):
    """Classifier-free guidance (LLaDA arXiv 2502.09992): (1 + scale) times log p with the given tokens, less
    scale times log p without them. What an earlier block of a long text wrote is given too."""
    def guided_denoise(xt, t):
        logp, without = denoise(torch.cat([xt, xt.masked_fill(given, mask_id)]), torch.cat([t, t])).chunk(2)
        towards = ((1 + scale) * logp - scale * without).log_softmax(-1)
        return torch.where((xt == mask_id)[..., None], towards, logp)
    return guided_denoise


def penalised(logp, xt, penalty):
    """Tokens that a text already has are made less likely: their log p (B, ..., V) times the penalty, which
    is above 1 (CTRL arXiv 1909.05858, of log p in place of logits). xt (B, T): the text, others than the V
    tokens are not written yet."""
    V = logp.size(-1)
    there = torch.zeros(len(xt), V + 1, dtype=torch.bool, device=xt.device)
    there = there.scatter(1, xt.clamp(max=V), True)[:, :V].view(len(xt), *[1] * (logp.dim() - 2), V)
    return torch.where(there, logp * penalty, logp).log_softmax(-1)


def without_repeating(denoise, penalty):
    return lambda xt, t: penalised(denoise(xt, t), xt, penalty)


def without(denoise, ids):
    """The tokens with these ids are not written (LLaDA's logits_eos_inf)."""
    def free(xt, t):
        logp = denoise(xt, t)
        return logp.index_fill(-1, torch.tensor(ids, device=logp.device), -torch.inf).log_softmax(-1)
    return free


LAST = 1e9  # what lowers a score, so that only scores as low as this one are lower


def late(score, logp, ids):
    """score(log p (B, T, V)) -> (B, T), by which tokens are written: as if the ids did not exist, and behind
    all others where the likeliest token is one of them (LLaDA's confidence_eos_eot_inf)."""
    if not ids:
        return score(logp)
    ids = torch.tensor(ids, device=logp.device)
    others = logp.index_fill(-1, ids, -torch.inf).log_softmax(-1)
    return score(others) - LAST * torch.isin(logp.argmax(-1), ids)
