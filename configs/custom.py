r"""Your own videos: fine-tuning on a CSV of path,label and your number of classes. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/custom.py:base --workdir=runs/mine \
        --config.data.train=train.csv --config.data.validation=validation.csv \
        --config.data.root=videos --config.model.classes=12 --config.train.init_from=CHECKPOINT

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). A list has one
`path,label` a line, paths relative to the root, labels from 0. CHECKPOINT is a workdir or a file
that fluxvit_jax.convert reads, of the same variant; a classifier of another size starts afresh.

Sources: "table" is of the paper (arXiv 2503.14237), "script" exp/base/ft/k400/k400_single.sh of the
official code (commit 8e09613), "parser" the defaults of its run_flexible_finetune.py. The rest is
chosen, to be changed: --config.train.epochs=50.

Hardware: one accelerator; base needs about 27 GB (the GPU compiler's estimate), or a quarter of it
with --config.train.accumulate=4. A thousand videos are about 4 min (small) or 10 min (base) of work
for an H100, by 1.6 and 4.8 TFLOP a clip (paper's GFLOPs), small at the 24 % of its peak that
benchmarks.gpu measured (H200), base at 35 % (assumed), if decoding keeps up.

Expected result: that of your data.
"""

from ml_collections import ConfigDict

from configs import common
from fluxvit_jax.config import REQUIRED, default_config


def get_config(argument: str = "base") -> ConfigDict:
    options = common.parse(argument)
    config = default_config(options.variant)

    config.model.classes = 0  # the user says how many: --config.model.classes
    config.model.drop_path = 0.1  # table 15
    config.model.remat = "names"  # far less memory; 8 % more time, the TPU compiler estimates

    # Official code: 6..24 frames, 112..336 px; script: 2048..6144 tokens. 41 grids.
    config.data.grids.frames = (6, 24, 2)
    config.data.grids.resolutions = (112, 336, 28)
    config.data.grids.tokens = (2048, 6144)
    config.data.repeats = 2  # script; spares decoding
    config.data.grid_group = 8  # chosen: four videos, twice each
    config.data.workers = 8  # processes; chosen, set it to the cores there are
    config.data.augment.crop = "random_resized"  # official code, as are scale and ratio
    config.data.augment.scale = (0.08, 1.0)
    config.data.augment.ratio = (3 / 4, 4 / 3)
    config.data.augment.flip = 0.5  # 0 where left and right are different classes
    config.data.augment.randaugment = "rand-m7-n4-mstd0.5-inc1"  # parser

    config.train.init_from = REQUIRED  # fine-tuned weights of any data set, K400's for most
    config.train.batch_size = 64  # clips; chosen for one accelerator
    config.train.epochs = 20  # chosen
    config.train.warmup_epochs = 2.0  # chosen
    config.train.budgets = options.budgets  # script: 3072, 2048, 1024
    config.train.align = 1.0  # official code
    config.train.label_smoothing = 0.1  # parser
    config.train.mixup = 0.0  # chosen: off; parser: 0.8
    config.train.cutmix = 0.0  # chosen: off; parser: 1
    config.train.erase = 0.25  # parser
    config.train.accumulate = 1  # 2, 4 or 8 where memory is short: the same gradient

    # Official code: rates are for 256 clips, repeats counted. So 5e-5 at 64.
    # A batch size from the command line leaves them as they are.
    batches = config.train.batch_size / 256
    config.optim.learning_rate = 2e-4 * batches  # script
    config.optim.min_learning_rate = 1e-6 * batches  # parser
    config.optim.warmup_learning_rate = 1e-6 * batches  # parser
    config.optim.b1, config.optim.b2 = 0.9, 0.999  # script
    config.optim.eps = 1e-8  # parser
    config.optim.weight_decay = 0.05  # script
    config.optim.layer_decay = 0.75  # script
    config.optim.clip_norm = 0.0  # parser: none

    # Budget, frames, resolution. 1024: the best cell of table 11 (S, K400) with the fewest tokens.
    # The others are chosen by us, with 1.5 to 2.3 tokens for each that is kept, as on the flat top
    # of that table. Token Optimization on your own data may find better ones.
    config.eval.settings = ((3072, 20, 224), (2048, 16, 196), (1024, 12, 168), (512, 8, 168))
    config.eval.clips, config.eval.crops = 4, 3  # not published: as for K400
    return config
