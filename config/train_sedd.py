# SEDD with absorbing states (arXiv 2310.16834): score entropy, and a network that is told the time.
# Everything else is config/train_mdlm.py; sample with --rule=analytic for its own sampler.
out_dir = 'out-sedd'
objective = 'sedd'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, max_iters, dropout = 64, 10000, 0.1

cpu = dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=24, max_iters=2000, dropout=0.0)
