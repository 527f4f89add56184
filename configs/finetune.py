r"""Fine-tuning on the data sets of the table below. NOT RUN HERE.

    python -m fluxvit_jax.main --config=configs/finetune.py:k400,base --workdir=runs/k400_base \
        --config.data.train=k400/train.csv --config.data.validation=k400/val.csv \
        --config.data.root=k400/videos --config.train.init_from=runs/k710_base

Argument: the data set, then small, base (default) or large; `,single=2048` trains one budget
(Flux-Single); for k400 also `,recipe=paper` (default: table 15) or `,recipe=released` (the official
script for B with the parser's defaults, here for every variant). configs/k400.py:small is the same
as configs/finetune.py:k400,small; the file of a data set tells its hardware and published results.

Without flags for the data it looks for train.csv and validation.csv (or val.csv, or the folders of
class folders train and val) in data/k400, or in k400 below the folder that the environment variable
FLUXVIT_DATA names. Without a workdir the run goes to runs/k400-base.

To change one number: --config.train.epochs=10, or in a file of your own, whose get_config sets
config.train.epochs = 10 in the config that finetune.get_config("k400,small") returns.
To add a data set: one entry in DATASETS and, for a name of its own, a file like configs/k600.py.

Sources: "table" is of the paper (arXiv 2503.14237), "script" exp/base/ft/k400/k400_single.sh of the
official code (commit 8e09613), "parser" the defaults of its run_flexible_finetune.py. FluxViT-L is
not published: as B where nothing else is said.

Hardware: the hours that recipes tell are estimates, from 1.6 (small), 4.8 (base; both the paper's
GFLOPs) and 15.6 (large) TFLOP a clip. TPU v5e: at the 44, 53 and 45 % of the chip's peak that the
TPU compiler estimates (docs/sharding.md). H100: small at the 24 % of its peak that benchmarks.gpu
measured (H200), the others at 35 % (assumed), if decoding keeps up. On TPU add
--config.model.cls=inside: one token more than the budget costs a tenth more. By the table in
docs/sharding.md a chip of v5e holds 48 clips of small, 16 of base or, with FSDP, 8 of large at a
time: --config.train.grad_accum_steps=2 or more splits a larger batch. --mode=preflight checks
whether it fits before you pay.

Published results: in the files of the data sets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED, default_config
from fluxvit_jax.data import places
from fluxvit_jax.errors import UserError
from fluxvit_jax.recipes import common


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Fields of `config.train` and `config.data.augment`."""

    randaugment: str
    label_smoothing: float
    mixup: float
    cutmix: float
    erase: float


TABLE_15 = Augmentation(
    randaugment="rand-m9-n2-mstd0.5-inc1",  # (9, 0.5); two operations as where timm is not told
    label_smoothing=0.0,
    mixup=0.0,  # not in the table, as the next two: chosen off
    cutmix=0.0,
    erase=0.0,
)
PARSER = Augmentation(  # FluxViT's and InternVideo2's
    randaugment="rand-m7-n4-mstd0.5-inc1", label_smoothing=0.1, mixup=0.8, cutmix=1.0, erase=0.25
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What differs between data sets.

    epochs, warmup_epochs: of S, B and L. learning_rate: for 256 clips, repeats counted.
    """

    classes: int
    batch_size: int  # clips, repeats counted
    epochs: tuple[int, int, int]
    warmup_epochs: tuple[float, float, float]
    learning_rate: float
    class_names: str = ""  # whose names ship; lists and folders may have names of their own
    repeats: int = 1  # not in table 15: chosen
    grid_group: int = 8  # script: a grid for the 8 videos of a GPU
    flip: float = 0.5  # table 15
    augmentation: Augmentation = TABLE_15
    eval_clips: int = 4  # of 3 crops; K400: table 15's results, script; others: chosen, as K400
    workers: int = 16  # processes a host; chosen
    scan: bool = False  # blocks unrolled: the quickest step that the TPU compiler estimates


K400 = Dataset(
    classes=400,
    batch_size=512,  # table 15
    epochs=(5, 3, 3),  # table 15
    warmup_epochs=(1.0, 1.0, 1.0),  # table 15, script
    learning_rate=2e-4,  # table 15, script; 4e-4 at 512
    class_names="k400",
)
COIN = Dataset(
    classes=180,
    batch_size=512,  # table 15
    epochs=(40, 25, 25),  # table 15
    warmup_epochs=(5.0, 5.0, 5.0),  # table 15
    learning_rate=5e-4,  # table 15; 1e-3 at 512
)

DATASETS = {
    "k400": K400,
    # The paper has no recipe for K600 and K700: as K400, as InternVideo2's scripts do.
    "k600": replace(K400, classes=600, class_names="k600"),
    "k700": replace(K400, classes=700, class_names="k700"),
    "k710": Dataset(
        classes=710,
        batch_size=1024,  # table 15
        epochs=(35, 20, 14),  # table 15; L: InternVideo2-L's (L14_ft_k710_f8.sh)
        warmup_epochs=(5.0, 5.0, 2.0),  # likewise
        learning_rate=2e-4,  # table 15; 8e-4 at 1024
        class_names="k710",
    ),
    # FluxViT's is not published: InternVideo2-S's for every variant (its scripts for B and L are
    # mixed up). Here "script" is its full_tuning/ssv2/S14_ft_ssv2_f8.sh, "parser" the defaults of
    # its run_finetuning.py.
    "ssv2": Dataset(
        classes=174,
        batch_size=512,  # script: 8 GPUs of 32 videos, twice each
        epochs=(30, 30, 30),  # script
        warmup_epochs=(5.0, 5.0, 5.0),  # script
        learning_rate=5e-4,  # script; 1e-3 at 512
        class_names="ssv2",
        repeats=2,  # script
        grid_group=16,  # chosen: as the released K400 recipe, 8 videos twice
        flip=0.0,  # a mirrored "left to right" is another class
        augmentation=PARSER,
        eval_clips=2,  # the paper's six views
    ),
    "coin": COIN,
    # Not in the paper; chosen: COIN's, whose 512 clips would make few steps an epoch.
    "ucf101": replace(COIN, classes=101, class_names="ucf101", batch_size=128),
    "hmdb51": replace(COIN, classes=51, class_names="hmdb51", batch_size=128),
    "custom": Dataset(
        classes=0,  # counted in the data
        batch_size=64,  # chosen for one accelerator
        epochs=(20, 20, 20),  # chosen
        warmup_epochs=(2.0, 2.0, 2.0),  # chosen
        learning_rate=2e-4,  # script; 5e-5 at 64
        repeats=2,  # script; spares decoding
        grid_group=8,  # chosen: four videos, twice each
        flip=0.5,  # 0 where left and right are different classes
        augmentation=replace(PARSER, mixup=0.0, cutmix=0.0),  # chosen: no mixing
        workers=8,  # chosen: set it to the cores there are
        scan=True,  # quick to compile
    ),
}

# Data sets with a second recipe: the official script with the parser's defaults.
RELEASED = {
    "k400": replace(
        K400,
        batch_size=1024,  # script: 64 GPUs of 8 videos, twice each; so the rate is 8e-4
        epochs=(5, 5, 5),  # script
        repeats=2,  # script
        grid_group=16,  # script: a grid for each GPU
        augmentation=PARSER,
    )
}


def get_config(argument: str = "") -> ConfigDict:
    """The config of "DATASET,VARIANT,single=TOKENS,recipe=NAME". Raises UserError."""
    name, _, options = argument.partition(",")
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"the data set comes first (k400,small): {name!r} is none of {known}")
    return recipe(name)(options)


def recipe(name: str) -> Callable[..., ConfigDict]:
    """The `get_config` of the file of one data set; its argument leaves the data set out."""
    return partial(_finetune, name)


def _finetune(name: str, argument: str = "") -> ConfigDict:
    options = common.parse(argument, recipes=("paper", "released") if name in RELEASED else ())
    dataset = (RELEASED if options.recipe == "released" else DATASETS)[name]
    size = "SBL".index(options.variant)
    config = default_config(options.variant)

    config.model.classes = dataset.classes
    config.model.drop_path = 0.1  # table 15, script; InternVideo2's script for SSv2
    config.model.scan = dataset.scan
    # Far less memory: unrolled, 16 clips of B a chip fit a v5e. 8 % more time where blocks are
    # scanned. Both are estimates of the TPU compiler.
    config.model.remat = "names"

    config.data.train = places.find(name, places.TRAIN)
    config.data.validation = places.find(name, places.VALIDATION)
    config.data.class_names = dataset.class_names
    # Official code: 6..24 frames, 112..336 px; script: 2048..6144 tokens. 41 grids.
    config.data.grids.frames = "6..24..2"
    config.data.grids.resolutions = "112..336..28"
    config.data.grids.tokens = (2048, 6144)
    config.data.repeated_aug = dataset.repeats
    config.data.clips_per_grid = dataset.grid_group
    config.data.workers = dataset.workers
    config.data.augment.crop = "random_resized"  # official code, as are scale and ratio
    config.data.augment.scale = (0.08, 1.0)
    config.data.augment.ratio = (3 / 4, 4 / 3)
    config.data.augment.flip = dataset.flip
    config.data.augment.randaugment = dataset.augmentation.randaugment

    config.train.init_from = REQUIRED  # which weights: see the file of the data set
    config.train.batch_size = dataset.batch_size
    config.train.epochs = dataset.epochs[size]
    config.train.warmup_epochs = dataset.warmup_epochs[size]
    config.train.budgets = options.budgets  # script: 3072, 2048, 1024
    config.train.align_weight = 1.0  # official code
    config.train.label_smoothing = dataset.augmentation.label_smoothing
    config.train.mixup = dataset.augmentation.mixup
    config.train.cutmix = dataset.augmentation.cutmix
    config.train.random_erasing = dataset.augmentation.erase

    # Official code: rates are for 256 clips, repeats counted. A batch size from the command line
    # leaves them as they are.
    batches = dataset.batch_size / 256
    config.optim.learning_rate = dataset.learning_rate * batches
    config.optim.min_learning_rate = 1e-6 * batches  # parser
    config.optim.warmup_learning_rate = 1e-6 * batches  # parser
    config.optim.b1, config.optim.b2 = 0.9, 0.999  # table 15, script
    config.optim.eps = 1e-8  # parser
    config.optim.weight_decay = 0.05  # table 15, script
    config.optim.layer_decay = 0.75  # script; not in table 15
    config.optim.clip_norm = 0.0  # parser: none

    # Budget, frames, resolution. 1024: the best cell of table 11 (S, K400) with the fewest tokens.
    # The others are chosen by us, with 1.5 to 2.3 tokens for each that is kept, as on the flat top
    # of that table. Token Optimization on your own data may find better ones.
    config.eval.settings = ((3072, 20, 224), (2048, 16, 196), (1024, 12, 168), (512, 8, 168))
    config.eval.clips, config.eval.crops = dataset.eval_clips, 3
    return config
