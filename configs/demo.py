"""The demo: FluxViT-Ti learns twelve motions from 2,400 small mp4 files on two CPU cores.

    make demo

writes the clips, runs this recipe and, for comparison, `:fixed`, and draws the result. Alone:

    python -m fluxvit_jax.data.synthetic --out=demo/clips
    python -m fluxvit_jax.main --config=configs/demo.py --workdir=demo/multi

Argument: `multi` (default: three budgets, aligned), `single` (one budget) or `fixed` (one grid,
every token: the ordinary way), with `,selector=KIND` (a kind of models/token_selection.py; `none`
goes with `single` and takes flexible grids that the budget holds), `,align=0` and `,seed=N`.

Hardware: two CPU cores, four minutes. Expected result: docs/benchmarks.md.
All numbers are ours, chosen for so small a network and so short a training; none is the paper's.
"""

from ml_collections import ConfigDict

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.data.synthetic import MOTIONS
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.token_selection import SELECTORS

METHODS = ("multi", "single", "fixed")
BUDGETS = (128, 64, 32)
FIXED_GRID = (8, 56)  # frames, pixels: 128 tokens

# Budget, frames, resolution. With selection: chosen from 6 to 16 frames on 720 other clips of the
# validation's photographs (`synthetic --seed=7`). It matters at 32 tokens, where 7 frames, in two
# groups, beat all others by 1 to 6 points.
FLUX_SETTINGS = ((128, 12, 56), (64, 8, 56), (32, 7, 56))
# Without, a budget is a smaller grid: the best of three on the validation clips, in its favor.
FIXED_SETTINGS = ((128, 8, 56), (64, 7, 42), (32, 8, 28))


def get_config(argument: str = "multi") -> ConfigDict:
    method, selector, align, seed = parse(argument)
    config = base_config(seed)

    config.model.classes = len(MOTIONS)
    config.model.selector.kind = selector
    config.data.validation = "demo/clips/validation.csv"
    config.data.class_names = "demo/clips/classes.txt"
    config.data.grids.frames = "6..12..2"
    config.data.grids.tokens = (96, 192)
    config.train.epochs = 13
    config.train.align_weight = align

    config.eval.settings = FLUX_SETTINGS
    config.eval.clips, config.eval.crops = 2, 1
    config.eval.batch_size = 48
    config.eval.every_epochs = 13
    config.search.budgets = BUDGETS
    config.search.frames = "4..12..2"
    config.search.resolutions = "28..84..14"

    if method != "multi":
        config.train.budgets = BUDGETS[:1]
    if method == "fixed":
        fix_grid(config)
    elif selector == "none":  # flexible grids of 112 to 128 tokens
        config.data.grids.frames = "5..14..1"
        config.data.grids.resolutions = "42..70..14"
    if selector == "none":
        config.data.grids.tokens = (BUDGETS[0] - 16, BUDGETS[0])
        config.eval.settings = FIXED_SETTINGS
    return config


def base_config(seed: int) -> ConfigDict:
    """What the demo and its pre-training (configs/demo_pretrain.py) share."""
    config = default_config("Ti")
    config.seed = seed

    config.model.drop_path = 0.0
    config.model.dtype = "float32"  # not all CPUs are faster in bfloat16
    config.model.scan = False

    config.data.train = "demo/clips/train.csv"
    config.data.root = "demo/clips"
    config.data.grids.resolutions = "56"
    config.data.workers = 1
    config.data.augment.scale = (0.75, 1.0)
    config.data.augment.ratio = (0.9, 1 / 0.9)
    config.data.augment.flip = 0.0  # left and right are different motions

    config.train.batch_size = 16
    config.train.warmup_epochs = 0.7
    config.train.budgets = BUDGETS

    config.optim.learning_rate = 2e-3
    config.optim.min_learning_rate = 1e-6
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = 1.0  # nothing is pre-trained
    config.optim.clip_norm = 1.0
    config.checkpoint.every_steps = 500
    config.log.every_steps = 50
    return config


def fix_grid(config: ConfigDict) -> None:
    """Trains on FIXED_GRID only."""
    frames, resolution = FIXED_GRID
    config.data.grids.frames = str(frames)
    config.data.grids.resolutions = str(resolution)


def parse(argument: str) -> tuple[str, str, float, int]:
    """Method, selector, weight of the alignment and seed. Raises UserError."""
    method, selector, align, seed = METHODS[0], "group_dynamic", 1.0, 0
    for part in filter(None, argument.split(",")):
        match part.partition("="):
            case (name, "", "") if name in METHODS:
                method = name
            case ("selector", "=", kind) if kind in SELECTORS:
                selector = kind
            case ("align", "=", ("0" | "1") as weight):
                align = float(weight)
            case ("seed", "=", number) if number.isdecimal():
                seed = int(number)
            case _:
                raise UserError(
                    f"{part!r} is none of {', '.join(METHODS)}, selector={'|'.join(SELECTORS)}, "
                    "align=0|1, seed=N"
                )
    if method == "fixed":
        selector = "none"
    if (method, selector) == ("multi", "none"):
        raise UserError("several budgets of one grid need a selector: use single,selector=none")
    return method, selector, align, seed
