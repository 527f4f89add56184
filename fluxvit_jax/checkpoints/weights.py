"""Weights of any form: a workdir, one of its steps, a folder, a .safetensors or .pth file.

Those on a hub or a web server are downloaded first.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from fluxvit_jax.checkpoints import download
from fluxvit_jax.checkpoints.workdir import write_class_names, write_config
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.convert import config_json, official_names, weight_files
from fluxvit_jax.convert.weight_files import FoundWeights, Pretrained
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit

EVALUATION = "evaluation"  # folder of a workdir that `--mode=evaluate` writes


def read_weights(
    source: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    default: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Pretrained:
    """The weights in `source` and their network.

    Args:
        source: a workdir (its best step), one of its steps, what `convert.weight_files` reads, or
            a name that `download.local_copy` knows, such as hf://OWNER/NAME.
        config: fields of `config.json` that go before those of `source`.
        default: such fields for what neither `source` nor `config` nor the weights tell.
        allow_missing: official names, or beginnings up to a dot ("head"), of tensors that may be
            missing; they start afresh.
        allow_unexpected: likewise of tensors that are left out.

    Raises:
        UserError: there are no such weights; they are damaged, not those of a FluxViT, or their
            network cannot be told.
    """
    source = download.local_copy(source)
    source = storage.path_of(source) if storage.is_remote(source) else Path(source)
    is_workdir = source.is_dir() and not (source / weight_files.WEIGHTS).exists()
    found = _find_workdir(source) if is_workdir else weight_files.find(source)
    return weight_files.complete(found, source, config, default, allow_missing, allow_unexpected)


def _find_workdir(workdir: storage.PathLike) -> FoundWeights:
    from fluxvit_jax.checkpoints import checkpointer  # late: Orbax takes seconds to import

    trained = checkpointer.restore(workdir)
    config = from_dict(trained.config)
    described = config_json.from_run_config(config, trained.class_names)
    state = official_names.to_official(fluxvit.network_params(trained.params))
    return FoundWeights(
        state,
        config_json.to_json(described),
        config_json.preprocessor_json(described),
        _evaluations(trained.step, config.model.selector.to_dict()),
    )


def _evaluations(step: epath.Path, selector: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The reports of `--mode=evaluate` in a workdir that are of one of its steps, newest last.

    selector: the run's own; reports of another one, which was tried for comparison, are left out.
    """
    workdir = step.parents[1]
    folder, found = workdir / EVALUATION, []
    with storage.errors(folder):
        paths = sorted(folder.glob("*.json")) if folder.exists() else []
        for path in sorted(paths, key=lambda path: path.stat().mtime):
            try:
                report = storage.parse_json(path.read_text())
            except (OSError, ValueError):
                continue  # the card lacks it
            own = report.get("checkpoint") == os.fspath(step.relative_to(workdir))
            if own and report.get("selector", selector) == selector:  # earlier reports do not tell
                found.append(report)
    return tuple(found)


def write_workdir(pretrained: Pretrained, workdir: str | os.PathLike) -> None:
    """Writes weights as the step 0 of a workdir, for `--mode=evaluate` and the like.

    Raises UserError: the workdir has checkpoints already, cannot be written, or no recipe can
    describe the network.
    """
    from fluxvit_jax.checkpoints import checkpointer  # late: Orbax takes seconds to import

    folder = epath.Path(workdir)
    recipe = config_json.to_run_config(pretrained.config)
    class_names = list(pretrained.config.class_names)
    if (folder / checkpointer.FOLDER).exists():
        raise UserError(f"{folder} has checkpoints already; use another workdir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with checkpointer.Checkpoints(folder, keep=1, every=1) as checkpoints:
        state = {"params": pretrained.params(), "step": np.int32(0)}
        checkpoints.save(0, state, {"class_names": class_names}, recipe)
    write_config(folder, recipe)
    write_class_names(folder, class_names)
