# Diffusion of the next sentence's latents, given those of the two before, by config/train_gpt2_vae.py. The
# size is the published LDLM's, 12 layers of 1,024. Not run by us yet: the learning rates are a guess.
out_dir = 'out-gpt2-latent'
objective = 'latent'
base = 'out-gpt2-vae'
dataset = 'wikitext2'

n_layer, n_head, n_embd, n_prev = 12, 16, 1024, 2
batch_size, max_iters = 256, 50000
lr, muon_lr, warmup_iters, ema_decay, ema_power = 1e-3, 0.01, 300, 0.9999, 2 / 3
eval_interval = 2000

cpu = dict(n_layer=2, n_head=2, n_embd=64, batch_size=8, max_iters=20)
