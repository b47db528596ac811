# Masked diffusion on text8 (27 symbols) at the published size: 12 layers, 768 wide, 256 symbols, batch 512,
# a million iterations. Published, in bits per character of the test split: MDLM <= 1.40 (arXiv 2406.07524),
# MD4 <= 1.37 (2406.04329), autoregressive 1.23. Not run by us yet.
#     python data/text8/prepare.py
#     torchrun --nproc_per_node=8 train.py config/train_text8_mdlm.py
#     python train.py config/train_text8_mdlm.py --grad_accum=8     # one GPU, the same batch
out_dir = 'out-text8-mdlm'
objective = 'masked'
dataset = 'text8'

n_layer, n_head, n_embd, block_size = 12, 12, 768, 256
batch_size, grad_accum, max_iters = 64, 1, 1_000_000  # x 8 processes: 512 sequences an iteration
lr, muon_lr, warmup_iters, ema_decay = 1e-3, 0.01, 2000, 0.9999
eval_interval = 5000

cpu = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=4, max_iters=20)
