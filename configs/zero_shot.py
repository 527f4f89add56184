r"""Classification by the names of the classes, by Flux-CLIP. NOT RUN HERE.

    python -m fluxvit_jax.main --mode=evaluate --config=configs/zero_shot.py:k400,base \
        --workdir=runs/clip_base --config.data.validation=k400/val.csv \
        --config.data.root=k400/videos

Argument: the data set (k400, k600, k700, ucf101, hmdb51, mit, custom), then small, base (default)
or large. The names of the classes ship; the list of custom has names in place of numbers, or
--config.data.class_names=FILE. The prompts are the official 16; --config.eval.prompts=FILE has
others, one a line, with {} for the class.

The score of a class is the mean of its prompts' cosines, as in the official code, without dual
softmax, which would use the balance of the test set's classes. Frames and resizing are those of the
official evaluation. Its splits of UCF101 and HMDB51, of which there are three, are not known.
"""

from ml_collections import ConfigDict

from fluxvit_jax.data import places
from fluxvit_jax.data.class_names import is_dataset
from fluxvit_jax.errors import UserError
from fluxvit_jax.recipes import clip

DATASETS = ("k400", "k600", "k700", "ucf101", "hmdb51", "mit", "custom")


def get_config(argument: str = "") -> ConfigDict:
    """The config of "DATASET,VARIANT". Raises UserError."""
    name, _, options = argument.partition(",")
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"the data set comes first (k400,base): {name!r} is none of {known}")
    config = clip.get_config(options)
    config.eval.task = "zero_shot"
    config.data.validation = places.find(name, places.VALIDATION)
    config.data.class_names = name if is_dataset(name) else ""
    return config
