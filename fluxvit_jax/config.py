"""The configuration: variants of the network, every field with its default, and the checks.

A recipe in `configs/` starts from `default_config()` and sets what it needs; `load_config` reads
such a file together with what the command line overrides.
"""

from typing import NamedTuple

from ml_collections import ConfigDict


class Variant(NamedTuple):
    """Size of a network and the grid its position table is laid out on."""

    width: int
    depth: int
    heads: int
    frames: int  # of the native grid
    resolution: int  # of the native grid, pixels


# S and B as released (facts of the official checkpoints). The paper names L but no file of it is
# out: ViT-L's size on B's grid is the natural reading. Ti is ours, for the demo and the tests.
VARIANTS = {
    "Ti": Variant(192, 4, 3, frames=8, resolution=112),
    "S": Variant(384, 12, 6, frames=24, resolution=252),
    "B": Variant(768, 12, 12, frames=32, resolution=280),
    "L": Variant(1024, 24, 16, frames=32, resolution=280),
}


def default_config(variant: str = "B") -> ConfigDict:
    """Every field there is. Neutral values: no augmentation but crop and flip, no soft labels."""
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.variant = variant  # a key of VARIANTS
    config.model.classes = 400
    config.model.frames = VARIANTS[variant].frames  # native grid of the position table
    config.model.resolution = VARIANTS[variant].resolution  # native grid, pixels
    config.model.gelu = "tanh"  # the released weights' | "erf": the golden data's
    config.model.cls = "outside"  # of the token budget, as the official code | "inside": for TPU
    config.model.drop_path = 0.1
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan = True  # over the blocks: quick to compile; False: quicker steps
    config.model.remat = "none"  # | "names" | "full"
    config.model.selector = ConfigDict()
    config.model.selector.kind = "group_dynamic"
    config.model.selector.groups = 0  # of frames; 0: by the rule, as many as 4, 2 or 1
    config.model.selector.rounding = "exact"  # | "official": loses up to four tokens

    config.data = ConfigDict()
    config.data.train = ""  # CSV or text list, folder of class folders, or prepared folder
    config.data.validation = ""
    config.data.root = ""  # the lists' paths are relative to this
    config.data.class_names = ""  # file of names, one a line
    config.data.grids = ConfigDict()
    config.data.grids.frames = (6, 24, 2)  # start, last, step
    config.data.grids.resolutions = (112, 336, 28)  # start, last, step; pixels
    config.data.grids.tokens = (2048, 6144)  # fewest, most
    config.data.grid_group = 8  # clips that share a grid
    config.data.repeats = 1  # augmented clips of one decoded video
    config.data.workers = 2
    config.data.max_bad_fraction = 0.05  # of unreadable clips before training stops
    config.data.augment = ConfigDict()
    config.data.augment.crop = "random_resized"  # | "multi_scale"
    config.data.augment.scale = (0.08, 1.0)
    config.data.augment.ratio = (3 / 4, 4 / 3)
    config.data.augment.flip = 0.5
    config.data.augment.randaugment = ""  # as timm writes it: "rand-m7-n4-mstd0.5-inc1"

    config.train = ConfigDict()
    config.train.batch_size = 512  # clips a step over all devices, repeats included
    config.train.epochs = 5
    config.train.warmup_epochs = 1.0
    config.train.budgets = (3072, 2048, 1024)  # pass i ends in head i; one: Flux-Single
    config.train.align = 1.0  # weight of the alignment loss
    config.train.label_smoothing = 0.0
    config.train.mixup = 0.0
    config.train.cutmix = 0.0
    config.train.mixup_probability = 1.0
    config.train.erase = 0.0
    config.train.ema = 0.0  # decay; 0: no average is kept
    config.train.accumulate = 1  # gradients of so many parts of the batch
    config.train.init_from = ""  # checkpoint to start from
    config.train.compiled_steps = 1  # train steps compiled in all, for any number of grids

    config.optim = ConfigDict()
    config.optim.learning_rate = 8e-4  # for the whole batch: nothing scales it later
    config.optim.min_learning_rate = 1e-6
    config.optim.warmup_learning_rate = 1e-6
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = 0.75  # 1: the same rate for all
    config.optim.clip_norm = 0.0  # 0: no clipping

    config.eval = ConfigDict()
    config.eval.settings = ((3072, 20, 224), (2048, 16, 224), (1024, 12, 196), (512, 8, 168))
    config.eval.clips = 4
    config.eval.crops = 3
    config.eval.batch_size = 16  # videos over all devices
    config.eval.every_epochs = 1

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2

    config.log = ConfigDict()
    config.log.every_steps = 20
    return config
