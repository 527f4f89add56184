"""`--mode=evaluate`: what `config.eval.task` measures."""

from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.adaptive import evaluate_adaptive
from fluxvit_jax.data.annotations import open_source, read_class_names
from fluxvit_jax.data.list_rows import text_of
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import raise_on_all_hosts
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import (
    chat_questions,
    evaluate_mode,
    multiple_choice,
    retrieve,
    vectors,
    zero_shot,
)
from fluxvit_jax.evaluation.trained_weights import Weights, weights_with_config
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.objectives.flux_clip import HEAD, TEMPERATURE


def run(config: ConfigDict, workdir: str) -> int:
    """Measures what `eval.task` says; see `evaluate_mode`, `evaluate_adaptive`, `retrieve`, ...

    Returns the exit status, 0.
    """
    task = task_of(config)
    if config.eval.cascade and task not in ("accuracy", "zero_shot"):
        raise UserError(f"config.eval.cascade: classifies videos, and eval.task is {task}")
    match task:
        case "retrieval":
            return retrieve.run(config, workdir)
        case "multiple_choice":
            return multiple_choice.run(config, workdir)
        case "mvbench":
            return chat_questions.run(config, workdir)
    folder = storage.path_of(workdir)
    weights_of = zero_shot_weights if task == "zero_shot" else weights_with_config
    measure = evaluate_adaptive.run_weights if config.eval.cascade else evaluate_mode.run_weights
    return measure(*weights_of(config, folder), folder)


def task_of(config: ConfigDict) -> str:
    """`eval.task`, or what "auto" stands for."""
    if config.eval.task != "auto":
        return config.eval.task
    return objective_class(config).task


def zero_shot_weights(config: ConfigDict, folder: epath.Path) -> tuple[ConfigDict, Weights]:
    """The weights of a run with a classifier of texts, and the config of its network.

    Raises UserError: no run of Flux-CLIP, no data, no class names.
    """
    with raise_on_all_hosts():
        if not config.data.validation:
            raise UserError("no data to evaluate on: add --config.data.validation=LIST")
        names, prompts = class_names(config), read_prompts(config.eval.prompts)
        weights = retrieve.read_weights(config, folder)
        mesh = make_mesh(config)
    say(f"{len(names)} classes by {len(prompts)} prompts each")
    own = retrieve.with_evaluation(config, weights.config)
    texts = vectors.of_texts(weights.params, own, zero_shot.texts_of_classes(names, prompts), mesh)
    classifier = zero_shot.classifier(
        weights.params[HEAD], float(weights.params[TEMPERATURE]), texts, len(prompts)
    )
    own.model.classes = len(names)
    params = weights.params | classifier
    trained = None if retrieve.outside_source(config, folder) else weights.config.to_dict()
    return own, Weights(params, weights.origin, trained, tuple(names))


def class_names(config: ConfigDict) -> Sequence[str]:
    """The names in `data.class_names`, or those of the folders or labels of `data.validation`."""
    if config.data.class_names:
        return read_class_names(config.data.class_names)
    names = open_source(config.data.validation, config.data.root).class_names
    if not names:
        raise UserError(
            f"config.data.validation={config.data.validation}: its labels are numbers; add "
            "--config.data.class_names=FILE, a name a line, or the name of a data set, such as k400"
        )
    return names


def read_prompts(path: str) -> Sequence[str]:
    """The prompts of a file, one a line; without one, the official 16.

    Raises UserError: it cannot be read, is empty, or a line has no {} for the class.
    """
    if not path:
        return zero_shot.PROMPTS
    lines = [line.strip() for line in text_of(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no prompts; write one a line, such as: a video of {{}}")
    for line in lines:
        try:
            zero_shot.check_prompt(line)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return lines
