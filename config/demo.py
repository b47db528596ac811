# The first run (make demo): masked diffusion on tiny-shakespeare, characters, in a given time.
# minutes: as many steps as fit, by the speed of the first ones, on a GPU 10, on a CPU 5.
out_dir = 'out-demo'
objective = 'masked'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
batch_size, minutes, eval_interval, dropout = 64, 10.0, 0, 0.1

# A Mac, never tried: 4.7M parameters take 33 MFLOP a token; an M1 does 2.6 TFLOP/s (Apple), say half of it,
# 40,000 tokens/s: 2,600 steps of 32 x 256 in ten minutes.
mps = dict(n_layer=6, n_head=4, n_embd=256, batch_size=32, dropout=0.0)
cpu = dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=24, minutes=5.0, dropout=0.0)
