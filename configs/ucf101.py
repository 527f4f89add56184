r"""UCF101, split 1. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/ucf101.py:base --workdir=runs/ucf101_base \
        --config.data.train=ucf101/train1.csv --config.data.validation=ucf101/test1.csv \
        --config.data.root=ucf101/videos --config.train.init_from=runs/k400_base

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). The paper does not
have UCF101: the numbers are chosen, those of COIN (table 15) with smaller batches, from K400
weights. Numbers, sources: configs/finetune.py.

Hardware: on one H100 with --config.train.grad_accum_steps=2 about 0.7 h (small), 1 h (base) or 3 h
(large) for 9.5 thousand videos. An estimate: configs/finetune.py.

Published result: none.
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("ucf101")
