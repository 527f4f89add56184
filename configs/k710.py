r"""Kinetics-710 (K400, K600 and K700 merged): the first stage of fine-tuning. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/k710.py:base --workdir=runs/k710_base \
        --config.data.train=k710/train.csv --config.data.validation=k710/val.csv \
        --config.data.root=kinetics --config.train.init_from=PRETRAINED

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). Numbers of table 15,
sources: configs/finetune.py. It starts from Flux-UMT pre-trained weights (table 15), of which none
are published: use your own, or released K400 ones as a stand-in. FluxViT-L is not published:
InternVideo2-L's epochs (L14_ft_k710_f8.sh).

Hardware: on a TPU v5e-16 about 7 h (small), 11 h (base) or 28 h (large) for 650 thousand videos.
Add --config.train.grad_accum_steps=2 (small), 4 (base) or 8 (large). For large also add
--config.parallel.mesh.fsdp=16 --config.model.scan=true. An estimate: configs/finetune.py, with what
else to add on TPU.

Published result: none on K710 itself; its weights are what configs/k400.py starts from.
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("k710")
