# Masked diffusion on tiny-shakespeare, characters: 10.7M parameters on a GPU, 1.8M on a CPU.
out_dir = 'out-mdlm'
objective = 'masked'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, max_iters, dropout = 64, 10000, 0.1

cpu = dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=24, max_iters=2000, dropout=0.0)
