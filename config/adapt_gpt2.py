# GPT-2 (124M) becomes a masked diffusion model, DiffuGPT's recipe (arXiv 2410.17891) on FineWeb: shift,
# attention opened over 10,000 steps, weights 1/t. One GPU of 80 GB: 64 x 8 windows of 1,023 tokens a step,
# [BOS] in front. Not run by us at this size.
out_dir = 'out-adapt-gpt2'
init_from = 'gpt2'
objective = 'masked'
dataset = 'fineweb'

block_size = 1023
shift, anneal_iters = True, 10000
t_law, loss_weight = 'uniform', 'elbo'
batch_size, grad_accum, max_iters = 64, 8, 20000
lr, muon_lr, weight_decay = 3e-4, 0.0, 0.1
lr_schedule, warmup_iters = 'cosine', 2000
eval_interval = 1000

# adapters and the embedding alone, short texts: something to watch, not a model
cpu = dict(block_size=127, batch_size=8, grad_accum=1, max_iters=300, anneal_iters=0, lora_rank=32, lr=1e-3,
           warmup_iters=20, eval_interval=100, eval_windows=50, t_law='bell', loss_weight='flat')
