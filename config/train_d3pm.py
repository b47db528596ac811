# D3PM with absorbing states (arXiv 2107.03006) in T = 1,000 steps; --T=100 is the same in fewer.
# Everything else is config/train_mdlm.py: the table compares the parameterizations alone.
out_dir = 'out-d3pm'
objective = 'd3pm'
dataset = 'shakespeare_char'
T = 1000

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, max_iters, dropout = 64, 10000, 0.1

cpu = dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=24, max_iters=2000, dropout=0.0)
