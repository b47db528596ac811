# Diffusion of the next window's latents: of 48 characters of tiny-shakespeare, by config/train_vae.py.
out_dir = 'out-latent'
objective = 'latent'
base = 'out-vae'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd = 6, 6, 384
batch_size, max_iters = 256, 20000
ema_decay, ema_power = 0.9999, 2 / 3

cpu = dict(n_layer=6, n_head=4, n_embd=256, batch_size=128, max_iters=2300, stride=24)
