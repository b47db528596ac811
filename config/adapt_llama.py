# A LLaMA-style model becomes a masked diffusion model on WikiText-2 in its own tokens, first
#   python data/wikitext2/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M
# (or the folder or repository of another model, then --init_from= the same here). What it writes looks like
# its text, in WikiText-2 "<unk>" and " = = "; plain text of your own: data/text/prepare.py, --dataset=text.
out_dir = 'out-adapt-llama'
init_from = 'HuggingFaceTB/SmolLM2-135M'
objective = 'masked'
dataset = 'wikitext2'

block_size = 512
shift = True
batch_size, max_iters = 32, 2000
lr, muon_lr, weight_decay = 3e-4, 0.0, 0.1
lr_schedule, warmup_iters = 'cosine', 100
eval_interval = 250

# adapters on all matrices and the embedding (which is the head too)
cpu = dict(block_size=256, batch_size=4, max_iters=450, lora_rank=32, lr=1e-3, warmup_iters=20,
           ema_decay=0.99, eval_interval=150, eval_windows=25)
