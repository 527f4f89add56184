r"""COIN, long instructional videos. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/coin.py:base --workdir=runs/coin_base \
        --config.data.train=coin/train.csv --config.data.validation=coin/test.csv \
        --config.data.root=coin/videos --config.train.init_from=runs/k400_base

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). Numbers of table 15,
sources: configs/finetune.py. Which weights it starts from is not published: K400's chosen.

Hardware: on one H100 with --config.train.grad_accum_steps=8 about 0.7 h (small), 1 h (base) or 3 h
(large) for 9 thousand videos. An estimate: configs/finetune.py.

Published top-1 of the paper, plain | with Token Optimization; nothing at 512 tokens:
    tokens      3072          2048          1024
    S       91.8 | 92.1   91.5 | 91.9   89.8 | 91.0
    B       93.9 | 94.1   93.7 | 93.9   92.5 | 93.2
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("coin")
