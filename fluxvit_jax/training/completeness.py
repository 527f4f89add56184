"""What a training run lacks, all in one message, with the command that lacks nothing."""

import os
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.fields import REQUIRED, flatten
from fluxvit_jax.config.loading import shipped
from fluxvit_jax.data import class_names, places
from fluxvit_jax.data.prepared_source import split_of
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.objectives.base import objective_class

# Fields with paths, and what stands for theirs in a command to fill in.
PATHS = {
    "data.train": "TRAIN.csv",
    "data.validation": "VALIDATION.csv",
    "data.root": "FOLDER",
    "data.class_names": "NAMES.txt",
    "train.init_from": "WEIGHTS",
    "distill.teacher": "TEACHER",
    "clip.text_encoder": "TEXT_ENCODER",
    "chat.llm": "LANGUAGE_MODEL",
}


class Gap(NamedTuple):
    """Something that a run lacks. open: the field says nothing; otherwise no such file exists."""

    field: str
    words: str
    open: bool


def check_complete(
    config: ConfigDict, recipe: str, workdir: storage.PathLike, argv: Sequence[str]
) -> None:
    """Raises UserError, of several lines, if a run lacks what it needs before it can train.

    A single path that leads nowhere is left to the part that opens it, which knows more.

    recipe: "FILE:ARGUMENT", or "" if the config is that of the workdir's run; argv: the command
    line, to be completed.
    """
    gaps = list(_gaps(config, storage.path_of(workdir)))
    needed = [gap for gap in gaps if gap.field != "data.validation" or not gap.open]
    if not needed or (len(needed) == 1 and not needed[0].open):
        return
    lines = ["this run lacks, before it can train:", *(f"  {gap.words}" for gap in gaps)]
    filled = {f"--config.{gap.field}": PATHS[gap.field] for gap in gaps}
    kept = [word for word in argv[1:] if word.partition("=")[0] not in filled]
    command = shlex.join([*kept, *(f"{flag}={value}" for flag, value in filled.items())])
    lines += [
        "The command with all of it; replace the words in capitals:",
        f"  python -m fluxvit_jax.main {command}",
    ]
    if recipe:
        folder, file = places.data_folder(places.name_of(recipe)), recipe.partition(":")[0]
        file = shipped().get(file, file)
        lines.append(f"Data were looked for in {folder}. The top of {file} tells more.")
    raise UserError("\n".join(lines))


def _gaps(config: ConfigDict, workdir: storage.PathLike) -> Iterator[Gap]:
    values = flatten(config)
    objective = objective_class(config)
    resumes = (storage.path_of(workdir) / checkpointer.FOLDER).exists()
    wanted = {
        "data.train": f"videos to train on: {objective.training_data}",
        "train.init_from": "weights to start from: a workdir, a folder, .safetensors or .pth "
        "(--config.train.init_from= starts from random ones)",
        "distill.teacher": "weights of the teacher, from python -m fluxvit_jax.convert",
        "clip.text_encoder": "weights of the text encoder, such as mobileclip_blt.pt "
        "(--config.clip.text_encoder= --config.clip.train_text=True trains one)",
        "chat.llm": "the folder of a language model, such as a copy of Qwen2.5-7B-Instruct",
    }
    if objective.labelled:
        wanted["data.validation"] = "videos to validate on, likewise (may be left out)"
    for field in PATHS:
        value = values[field]
        if field == "train.init_from" and resumes:
            continue  # the checkpoint has the weights
        if value == REQUIRED or (not value and field in ("data.train", "data.validation")):
            if field in wanted:
                yield Gap(field, wanted[field], True)
        elif field == "data.class_names" and class_names.is_dataset(value):
            continue
        elif value and "://" not in value and not os.path.exists(split_of(value)[0]):
            yield Gap(field, f"{value}: no such file or folder (config.{field})", False)
