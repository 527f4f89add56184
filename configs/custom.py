r"""Your own videos: fine-tuning on a CSV of path,label. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/custom.py:base --workdir=runs/mine \
        --config.data.train=train.csv --config.data.validation=validation.csv \
        --config.data.root=videos --config.train.init_from=CHECKPOINT

Argument: small, base or large, and `,single=2048` trains one budget (Flux-Single); or tiny, for a
laptop. A list has one `path,label` a line, paths relative to the root; labels are names, or numbers
from 0. A folder of class folders will do. Classes are counted, unless --config.model.classes=12
says how many there are. CHECKPOINT is a workdir or a file that fluxvit_jax.convert reads, of the
same variant, fine-tuned on any data set, K400 for most; a classifier of other classes starts
afresh.

Numbers, sources: configs/finetune.py. Many are chosen, to be changed: --config.train.epochs=50, or
--config.data.augment.flip=0 where left and right are different classes.

Hardware: one accelerator; base needs about 27 GB (the GPU compiler's estimate), or a quarter of it
with --config.train.grad_accum_steps=4. A thousand videos are about 4 min (small) or 10 min (base)
of work for an H100. An estimate: configs/finetune.py.

Expected result: that of your data.

`tiny` is the demo's network and its small grids (configs/demo.py): some hundred clips of a few
classes take minutes on two CPU cores. It starts from the demo's weights, which come with the
package (builtin://ti); --config.train.init_from= starts from random ones. Epochs, augmentation and
weights were chosen by benchmarks/recipe_study.py; docs/real_video.md has the figures.
"""

from ml_collections import ConfigDict

from fluxvit_jax.data import places
from fluxvit_jax.errors import UserError
from fluxvit_jax.recipes import demo, finetune


def get_config(argument: str = "") -> ConfigDict:
    size, _, options = argument.partition(",")
    if size != "tiny":
        return finetune.recipe("custom")(argument)
    if options:
        raise UserError(f"{options!r}: tiny has no options")
    return _tiny()


def _tiny() -> ConfigDict:
    """The demo's config for other data; what differs was chosen on 224 clips of 10 classes."""
    config = demo.get_config()
    config.model.classes = 0  # counted in the data
    config.data.train = places.find("custom", places.TRAIN)
    config.data.validation = places.find("custom", places.VALIDATION)
    config.data.root = ""
    config.data.class_names = ""
    config.data.repeated_aug = 2
    config.data.workers = 2
    config.data.augment.scale = (0.4, 1.0)
    config.data.augment.ratio = (0.75, 1.33)
    config.train.init_from = "builtin://ti"
    config.train.epochs = 60
    config.train.warmup_epochs = 4.0
    config.log.every_steps = 10
    config.eval.every_epochs = 10
    return config
