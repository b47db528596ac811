# The autoregressive model of config/train_ar.py (run that first) becomes a masked diffusion model: the same
# weights without the causal mask, trained on with config/train_mdlm.py's loss, on a CPU in half of its steps.
# Sizes are those of the checkpoint. --shift=False --anneal_iters=300 and both are the other three ways.
out_dir = 'out-adapt'
init_from = 'out-ar'
objective = 'masked'
dataset = 'shakespeare_char'

shift = True
batch_size, max_iters = 64, 10000

cpu = dict(batch_size=24, max_iters=1000)
