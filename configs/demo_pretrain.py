"""Flux-UMT at the demo's size: a student learns from a teacher on the demo's clips, no labels.

    python -m fluxvit_jax.main --config=configs/demo_pretrain.py --workdir=demo/pretrained \
        --config.distill.teacher=demo/multi

Argument: `flexible` (default) or `fixed` (one grid, as the ordinary way has it), with `,seed=N`.
The teacher is a trained run of configs/demo.py:multi; the student is of the same size.

Hardware: two CPU cores, five minutes. Expected result: docs/pretraining.md.
All numbers are ours, chosen for so small a network and so short a training; none is the paper's.
"""

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.config.variants import NO_CLASSES, VARIANTS
from fluxvit_jax.errors import UserError
from fluxvit_jax.recipes import demo

GRIDS = ("flexible", "fixed")


def get_config(argument: str = "flexible") -> ConfigDict:
    grids, seed = parse(argument)
    config = demo.base_config(seed)

    config.model.classes = NO_CLASSES
    config.data.grids.frames = "8..12..2"
    config.data.grids.tokens = (demo.BUDGETS[0], 192)
    if grids == "fixed":
        demo.fix_grid(config)

    config.train.objective = "flux_umt"
    config.train.epochs = 10
    config.distill.teacher = REQUIRED
    config.distill.network = "Ti"
    config.distill.frames = VARIANTS["Ti"].frames
    config.distill.resolution = VARIANTS["Ti"].resolution
    config.distill.tokens = demo.BUDGETS[0]
    config.distill.student_blocks = config.distill.teacher_blocks = (0, 1)
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
