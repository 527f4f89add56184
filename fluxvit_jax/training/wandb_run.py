"""Weights & Biases (the extra `wandb`): the same metrics as in TensorBoard, by `log.wandb`."""

import importlib.util
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.errors import UserError

RUN_ID = "wandb_id.txt"  # in the workdir; a resumed run goes on under its id


def check_wandb(config: ConfigDict) -> None:
    """Raises UserError if `log.wandb` names a project and wandb is not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.log.wandb={config.log.wandb}: wandb is not installed; "
            "pip install 'fluxvit_jax[wandb]'"
        )


class WandbRun:
    """A run of the project `log.wandb`, begun or gone on with."""

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        """Raises UserError if wandb refuses, for example without an API key."""
        import wandb

        self._wandb = wandb
        remote = storage.is_remote(workdir)
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                name=workdir.name,
                id=_run_id(workdir),
                resume="allow",
                dir=None if remote else str(workdir),
                config=config.to_dict(),
            )
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"config.log.wandb={config.log.wandb}: {reason}; or set WANDB_MODE=offline"
            ) from error
        # wandb's own steps cannot go back, as those of a resumed run do.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **scalars})

    def log_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """pictures: uint8 [height, width, 3] by their names."""
        images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log({"step": step, **images})

    def close(self) -> None:
        self._run.finish()


def _run_id(workdir: epath.Path) -> str:
    path = workdir / RUN_ID
    with storage.errors(path):
        if path.exists():
            return path.read_text().strip()
    run_id = secrets.token_hex(4)
    atomic.write(path, run_id + "\n")
    return run_id
