# LLaDA's recipe (arXiv 2502.09992) at nanoGPT's size: linear schedule, t uniform, weights 1 / t, the sum
# divided by all tokens, one text in a hundred cut to a random length. config/train_mdlm.py learns faster.
out_dir = 'out-llada'
objective = 'masked'
dataset = 'shakespeare_char'
schedule, t_law, loss_weight, random_length = 'linear', 'uniform', 'elbo', 0.01

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, max_iters, dropout = 64, 10000, 0.1

cpu = dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=24, max_iters=2000, dropout=0.0)
