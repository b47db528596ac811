# Block diffusion (BD3-LM, arXiv 2503.09573): blocks of 4 from left to right, masked diffusion inside.
# Longer blocks learn better from fewer masks: --block_length=16 --mask_low=0.2 --mask_high=0.6
# A step costs 2.3 of config/train_mdlm.py's on a CPU: it reads the text twice, noisy and clean.
out_dir = 'out-block4'
objective = 'block'
dataset = 'shakespeare_char'
block_length = 4

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, max_iters, dropout = 64, 10000, 0.1

cpu = dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=24, max_iters=2000, dropout=0.0)
