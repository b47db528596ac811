# A sentence VAE at the size of GPT-2 (124M): sentences of up to 64 byte pairs as 8 vectors of 128 numbers,
# by two adapters on the model of config/train_gpt2_ar.py. Not run by us yet: the learning rates are a guess.
#     python data/wikitext2/prepare.py --tokenizer=gpt2
#     python train.py config/train_gpt2_vae.py
out_dir = 'out-gpt2-vae'
objective = 'vae'
base = 'out-gpt2-ar'
dataset = 'wikitext2'

block_size, sentences, n_latent, d_latent = 64, True, 8, 128
short = 0.1
batch_size, grad_accum, max_iters = 64, 2, 20000
lr, muon_lr, kl_warmup, warmup_iters = 1e-3, 0.01, 5000, 300
eval_interval = 1000

cpu = dict(block_size=32, batch_size=4, grad_accum=1, max_iters=20)
