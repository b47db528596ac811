# A sentence VAE on tiny-shakespeare: windows of 48 characters as 8 vectors of 64 numbers. Encoder and
# decoder are the model of config/train_ar.py (run that first) under two adapters; --whole=True trains two
# copies of it, --n_latent=1 --d_latent=256 makes one vector of a window.
out_dir = 'out-vae'
objective = 'vae'
base = 'out-ar'
dataset = 'shakespeare_char'

block_size = 48
batch_size, max_iters = 64, 20000

cpu = dict(max_iters=1700)
