"""Flux-CLIP at the demo's size: clips and captions of the demo, a text encoder from scratch.

    python -m fluxvit_jax.main --config=configs/demo_clip.py --workdir=demo/clip \
        --config.train.init_from=demo/multi

Argument: `multi` (default: three budgets on flexible grids) or `fixed` (one grid, every token),
with `,seed=N`. The network starts from a trained run of configs/demo.py, of the same argument. It
is evaluated on unseen photographs by `--mode=evaluate --workdir=demo/clip`.

Hardware: two CPU cores, about ten minutes. Expected result: docs/clip.md.
All numbers are ours, chosen for so small a network and so short a training; none is the paper's.
"""

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.errors import UserError
from fluxvit_jax.recipes import demo

METHODS = ("multi", "fixed")


def get_config(argument: str = "multi") -> ConfigDict:
    method, seed = parse(argument)
    config = demo.get_config(f"{method},seed={seed}")

    config.model.classes = NO_CLASSES
    config.data.train = "demo/clips/train_captions.json"
    config.data.validation = "demo/clips/validation_captions.json"
    config.data.class_names = ""

    config.train.objective = "flux_clip"
    config.train.init_from = REQUIRED
    config.train.batch_size = 48
    config.train.epochs = 20
    config.train.warmup_epochs = 1.0

    config.clip.network = "Ti"
    config.clip.train_text = True
    config.clip.temperature = 0.07
    config.optim.learning_rate = 1e-3
    return config


def parse(argument: str) -> tuple[str, int]:
    """Method and seed. Raises UserError."""
    method, seed = METHODS[0], 0
    for part in filter(None, argument.split(",")):
        match part.partition("="):
            case (name, "", "") if name in METHODS:
                method = name
            case ("seed", "=", number) if number.isdecimal():
                seed = int(number)
            case _:
                raise UserError(f"{part!r} is none of {', '.join(METHODS)}, seed=N")
    return method, seed
