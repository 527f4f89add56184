r"""Kinetics-700: fine-tuning after K710. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/k700.py:base --workdir=runs/k700_base \
        --config.data.train=k700/train.csv --config.data.validation=k700/val.csv \
        --config.data.root=k700/videos --config.train.init_from=runs/k710_base

Argument: small, base or large; `,single=2048` trains one budget (Flux-Single). The paper has no
recipe for K700: every number is what it gives for K400, as InternVideo2's scripts do.

Sources: "table" is of the paper (arXiv 2503.14237), "script" exp/base/ft/k400/k400_single.sh of the
official code (commit 8e09613), "parser" the defaults of its run_flexible_finetune.py.

Hardware: on a TPU v5e-16 about 0.9 h (small), 1.3 h (base) or 5 h (large) for 530 thousand videos.
An estimate: 1.6, 4.8 and 15.6 TFLOP a clip at the 44, 53 and 45 % of the chip's peak that the TPU
compiler estimates (README). On TPU add --config.model.cls=inside: one token more than the budget
costs a tenth more. Where a batch does not fit, --config.train.accumulate=2 or more;
--mode=preflight tells.

Published result: none.
"""

from ml_collections import ConfigDict

from configs import common
from fluxvit_jax.config import REQUIRED, default_config


def get_config(argument: str = "base") -> ConfigDict:
    options = common.parse(argument)
    config = default_config(options.variant)

    config.model.classes = 700
    config.model.drop_path = 0.1  # table 15, K400
    config.model.scan = False  # blocks unrolled and remat by names: the quickest step that the
    config.model.remat = "names"  # TPU compiler estimates (16 clips of B a chip fit a v5e)

    # Official code: 6..24 frames, 112..336 px; script: 2048..6144 tokens. 41 grids.
    config.data.grids.frames = (6, 24, 2)
    config.data.grids.resolutions = (112, 336, 28)
    config.data.grids.tokens = (2048, 6144)
    config.data.repeats = 1  # table 15 does not list repeats: chosen
    config.data.grid_group = 8  # script: a grid for the 8 videos of a GPU
    config.data.workers = 16  # processes a host; chosen
    config.data.augment.crop = "random_resized"  # official code, as are scale and ratio
    config.data.augment.scale = (0.08, 1.0)
    config.data.augment.ratio = (3 / 4, 4 / 3)
    config.data.augment.flip = 0.5  # table 15, K400
    # Table 15, K400: RandAugment(9, 0.5), two operations as where timm is not told.
    config.data.augment.randaugment = "rand-m9-n2-mstd0.5-inc1"

    config.train.init_from = REQUIRED  # K710 fine-tuned weights, as table 15 for K400
    config.train.batch_size = 512  # table 15, K400
    # Table 15, K400: 5 for S, 3 for B, warm-up 1. L not published: as B.
    config.train.epochs = 5 if options.variant == "S" else 3
    config.train.warmup_epochs = 1.0
    config.train.budgets = options.budgets  # script: 3072, 2048, 1024
    config.train.align = 1.0  # official code
    config.train.label_smoothing = 0.0  # table 15, K400; the next three are not in it: chosen off
    config.train.mixup = 0.0
    config.train.cutmix = 0.0
    config.train.erase = 0.0

    # Official code: rates are for 256 clips, repeats counted. So 4e-4 at 512.
    # A batch size from the command line leaves them as they are.
    batches = config.train.batch_size / 256
    config.optim.learning_rate = 2e-4 * batches  # table 15, K400
    config.optim.min_learning_rate = 1e-6 * batches  # parser
    config.optim.warmup_learning_rate = 1e-6 * batches  # parser
    config.optim.b1, config.optim.b2 = 0.9, 0.999  # table 15, K400
    config.optim.eps = 1e-8  # parser
    config.optim.weight_decay = 0.05  # table 15, K400
    config.optim.layer_decay = 0.75  # script; not in table 15
    config.optim.clip_norm = 0.0  # parser: none

    # Budget, frames, resolution. 1024: the best cell of table 11 (S, K400) with the fewest tokens.
    # The others are chosen by us, with 1.5 to 2.3 tokens for each that is kept, as on the flat top
    # of that table. Token Optimization on your own data may find better ones.
    config.eval.settings = ((3072, 20, 224), (2048, 16, 196), (1024, 12, 168), (512, 8, 168))
    config.eval.clips, config.eval.crops = 4, 3  # as for K400
    return config
