r"""Your own videos: fine-tuning on a CSV of path,label. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/custom.py:base --workdir=runs/mine \
        --config.data.train=train.csv --config.data.validation=validation.csv \
        --config.data.root=videos --config.train.init_from=CHECKPOINT

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). A list has one
`path,label` a line, paths relative to the root; labels are names, or numbers from 0. A folder of
class folders will do. Classes are counted, unless --config.model.classes=12 says how many there
are. CHECKPOINT is a workdir or a file that fluxvit_jax.convert reads, of the same variant,
fine-tuned on any data set, K400 for most; a classifier of other classes starts afresh.

Numbers, sources: configs/finetune.py. Many are chosen, to be changed: --config.train.epochs=50, or
--config.data.augment.flip=0 where left and right are different classes.

Hardware: one accelerator; base needs about 27 GB (the GPU compiler's estimate), or a quarter of it
with --config.train.grad_accum_steps=4. A thousand videos are about 4 min (small) or 10 min (base)
of work for an H100. An estimate: configs/finetune.py.

Expected result: that of your data.
"""

from fluxvit_jax.recipes import finetune

get_config = finetune.recipe("custom")
