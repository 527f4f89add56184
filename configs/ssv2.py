r"""Something-Something v2. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/ssv2.py:base --workdir=runs/ssv2_base \
        --config.data.train=ssv2/train.csv --config.data.validation=ssv2/val.csv \
        --config.data.root=ssv2/videos --config.train.init_from=PRETRAINED

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). FluxViT's recipe is
not published: this is InternVideo2-S's for every variant (its scripts for B and L are mixed up),
with FluxViT's grids and budgets. Numbers, sources: configs/finetune.py. It starts from pre-trained
weights; K400 ones will do.

Hardware: on a TPU v5e-16 about 3.3 h (small), 8 h (base) or 31 h (large) for 169 thousand videos.
For base add --config.train.grad_accum_steps=2. For large add --config.train.grad_accum_steps=4
--config.data.clips_per_grid=8 --config.parallel.mesh.fsdp=16 --config.model.scan=true. An estimate:
configs/finetune.py, with what else to add on TPU.

Published top-1 of the paper, 2 x 3 views, plain | with Token Optimization:
    tokens      3072          2048          1024          512
    S       73.4 | 73.8   72.9 | 73.4   70.0 | 72.5   55.3 | 70.9
    B       75.3 | 75.6   75.1 | 75.5   72.0 | 75.1   56.8 | 73.9
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("ssv2")
