# Fine-tuning on questions and answers, GSM8K (arXiv 2110.14168), of the model of config/adapt_llama.py:
#   python data/gsm8k/prepare.py --tokenizer=out-adapt-llama
# Adapters of DiffuLLaMA's size (arXiv 2410.17891) and the embedding; --lora_rank=0 trains all. The twin to
# compare with: --objective=ar --init_from=HuggingFaceTB/SmolLM2-135M --out_dir=out-sft-ar
out_dir = 'out-sft'
init_from = 'out-adapt-llama'
objective = 'masked'
dataset = 'gsm8k'

block_size = 256
lora_rank, lora_alpha = 16, 32.0
batch_size, max_iters = 64, 5000
lr, muon_lr, weight_decay = 1e-4, 0.0, 0.0
lr_schedule, warmup_iters = 'cosine', 100
eval_interval = 250

cpu = dict(block_size=256, batch_size=4, max_iters=300, lr=1e-3, warmup_iters=20, ema_decay=0.99,
           eval_interval=100, eval_windows=50)
