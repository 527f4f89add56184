r"""HMDB51, split 1. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/hmdb51.py:base --workdir=runs/hmdb51_base \
        --config.data.train=hmdb51/train1.csv --config.data.validation=hmdb51/test1.csv \
        --config.data.root=hmdb51/videos --config.train.init_from=runs/k400_base

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). The paper does not
have HMDB51: the numbers are chosen, those of COIN (table 15) with smaller batches, from K400
weights. Numbers, sources: configs/finetune.py.

Hardware: on one H100 with --config.train.grad_accum_steps=2 about 0.3 h (small), 0.4 h (base) or
1.2 h (large) for 3.6 thousand videos. An estimate: configs/finetune.py.

Published result: none.
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("hmdb51")
