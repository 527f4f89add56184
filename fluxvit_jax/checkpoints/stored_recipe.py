"""The recipe of a run that exists: `--config` where the command names its workdir alone."""

from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.workdir import read_config
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.distributed import storage


def is_run(workdir: str) -> bool:
    """Whether there is a run in a workdir. Raises UserError for a config that cannot be read."""
    return read_config(storage.path_of(workdir)) is not None


def get_config(workdir: str) -> ConfigDict:
    """The config of the run in a workdir. Raises UserError for values that cannot be."""
    return from_dict(read_config(storage.path_of(workdir)) or {})
