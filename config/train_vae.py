# A sentence VAE on tiny-shakespeare: windows of 48 characters as 8 vectors of 64 numbers. Encoder and
# decoder are the model of config/train_ar.py (run that first) under two adapters; --whole=True trains two
# copies of it, --n_latent=1 --d_latent=256 makes one vector of a window.
out_dir = 'out-vae'
objective = 'vae'
base = 'out-ar'
dataset = 'shakespeare_char'

block_size, n_latent, d_latent = 48, 8, 64
short = 0.1
batch_size, max_iters = 64, 20000

cpu = dict(batch_size=32, max_iters=2400)
