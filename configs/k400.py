r"""Kinetics-400: the second stage of fine-tuning, after K710 (table 15). NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/k400.py:base --workdir=runs/k400_base \
        --config.data.train=k400/train.csv --config.data.validation=k400/val.csv \
        --config.data.root=k400/videos --config.train.init_from=runs/k710_base

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single); `,recipe=paper`
(default: table 15) or `,recipe=released` (the official script for B with the parser's defaults,
here for every variant). FluxViT-L is not published: as B. Numbers, sources: configs/finetune.py.

Hardware: the official script uses 64 GPUs. On a TPU v5e-16 about 0.4 h (small), 0.6 h (base) or 2.2
h (large); base as released, 2 h. For base add --config.train.grad_accum_steps=2 (as released, 4).
For large add --config.train.grad_accum_steps=4 --config.parallel.mesh.fsdp=16
--config.model.scan=true. An estimate: configs/finetune.py, with what else to add on TPU.

Published top-1 of the paper, 4 x 3 views, plain | with Token Optimization:
    tokens      3072          2048          1024          512
    S       87.7 | 88.0   87.3 | 87.7   84.7 | 86.6   80.1 | 84.7
    B       89.6 | 90.0   89.3 | 89.7   87.3 | 88.9   84.7 | 87.4
Plain is 8 frames of 224 px at 2048 tokens (script), so for all four presumably
--config.eval.settings="((3072,12,224),(2048,8,224),(1024,4,224),(512,2,224))".
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("k400")
