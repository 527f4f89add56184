r"""Kinetics-600: fine-tuning after K710. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/k600.py:base --workdir=runs/k600_base \
        --config.data.train=k600/train.csv --config.data.validation=k600/val.csv \
        --config.data.root=k600/videos --config.train.init_from=runs/k710_base

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). The paper has no
recipe for K600: every number is what it gives for K400, as InternVideo2's scripts do. Numbers,
sources: configs/finetune.py.

Hardware: on a TPU v5e-16 about 0.6 h (small), 1 h (base) or 3.6 h (large) for 390 thousand videos.
For base add --config.train.grad_accum_steps=2. For large add --config.train.grad_accum_steps=4
--config.parallel.mesh.fsdp=16 --config.model.scan=true. An estimate: configs/finetune.py, with what
else to add on TPU.

Published result: none.
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("k600")
