# Masked diffusion at the size of GPT-2 (124M), one pass over FineWeb's 10B tokens. Not run by us yet:
# the sizes are GPT-2's, the learning rates a guess.
#     python data/fineweb/prepare.py --shards=103
#     torchrun --nproc_per_node=8 train.py config/train_gpt2_mdlm.py
#     python train.py config/train_gpt2_mdlm.py --grad_accum=32     # one GPU, the same batch
out_dir = 'out-gpt2-mdlm'
objective = 'masked'
dataset = 'fineweb'

n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
batch_size, grad_accum, max_iters = 16, 4, 19500  # x 8 processes x 1024: 524,288 tokens an iteration
lr, muon_lr, weight_decay, warmup_iters, ema_decay = 1e-3, 0.02, 0.1, 300, 0.9995
eval_interval = 1000

cpu = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=4, grad_accum=1, max_iters=20)
