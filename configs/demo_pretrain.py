"""Flux-UMT at the demo's size: a student learns from a teacher on the demo's clips, no labels.

    python -m fluxvit_jax.main --config=configs/demo_pretrain.py --workdir=demo/pretrained \
        --config.distill.teacher=demo/multi

Argument: `flexible` (default) or `fixed` (one grid, as the ordinary way has it), with `,seed=N`.
The teacher is a trained run of configs/demo.py:multi; the student is of the same size.

Hardware: two CPU cores, five minutes. Expected result: README, by benchmarks/pretrain_study.py.
All numbers are ours, chosen for so small a network and so short a training; none is the paper's.
"""

from ml_collections import ConfigDict

from configs import demo
from fluxvit_jax.config import NO_CLASSES, REQUIRED, VARIANTS, default_config
from fluxvit_jax.errors import UserError

GRIDS = ("flexible", "fixed")


def get_config(argument: str = "flexible") -> ConfigDict:
    grids, seed = parse(argument)
    config = default_config("Ti")
    config.seed = seed

    config.model.classes = NO_CLASSES
    config.model.drop_path = 0.0
    config.model.dtype = "float32"  # CPUs are no faster in bfloat16
    config.model.scan = False

    config.data.train = "demo/clips/train.csv"
    config.data.root = "demo/clips"
    config.data.grids.frames = (8, 12, 2)
    config.data.grids.resolutions = (56, 56, 14)
    config.data.grids.tokens = (demo.BUDGETS[0], 192)
    config.data.workers = 1
    config.data.augment.scale = (0.75, 1.0)
    config.data.augment.ratio = (0.9, 1 / 0.9)
    config.data.augment.flip = 0.0  # left and right are different motions
    if grids == "fixed":
        frames, resolution = demo.FIXED_GRID
        config.data.grids.frames = (frames, frames, 1)
        config.data.grids.resolutions = (resolution, resolution, 14)

    config.train.objective = "distillation"
    config.train.batch_size = 16
    config.train.epochs = 10
    config.train.warmup_epochs = 0.7
    config.train.budgets = demo.BUDGETS
    config.distill.teacher = REQUIRED
    config.distill.network = "Ti"
    config.distill.frames = VARIANTS["Ti"].frames
    config.distill.resolution = VARIANTS["Ti"].resolution
    config.distill.tokens = demo.BUDGETS[0]
    config.distill.student_blocks = config.distill.teacher_blocks = (0, 1)

    config.optim.learning_rate = 2e-3
    config.optim.b2 = 0.98
    config.optim.layer_decay = 1.0  # nothing is pre-trained
    config.optim.clip_norm = 1.0
    config.checkpoint.every_steps = 500
    config.log.every_steps = 50
    return config


def parse(argument: str) -> tuple[str, int]:
    """Grids and seed. Raises UserError."""
    grids, seed = GRIDS[0], 0
    for part in filter(None, argument.split(",")):
        match part.partition("="):
            case (name, "", "") if name in GRIDS:
                grids = name
            case ("seed", "=", number) if number.isdecimal():
                seed = int(number)
            case _:
                raise UserError(f"{part!r} is none of {', '.join(GRIDS)}, seed=N")
    return grids, seed
