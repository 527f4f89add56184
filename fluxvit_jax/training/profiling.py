"""Profiler traces of training steps: `config.log.profile_steps=10,20`.

The trace lies in `WORKDIR/profile`, for TensorBoard's profile plugin, XProf or Perfetto. Host 0
traces itself and its devices; the other hosts run the same program.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.config.fields import step_range
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.mesh import host_index
from fluxvit_jax.errors import UserError

FOLDER = "profile"

Tree = dict[str, Any]


def check_profile(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises UserError if a trace is to be written into a bucket."""
    if config.log.profile_steps and storage.is_remote(workdir):
        raise UserError(
            f"config.log.profile_steps: a trace is written to a disk, not to {workdir}; use a "
            "workdir of this machine for a few steps"
        )


class ProfiledStep:
    """The compiled training steps, with a trace of the calls for `log.profile_steps`.

    step_fn_of: the program of a step, by its number. Close it, so that a run that ends
    during the trace writes what it has.
    """

    def __init__(
        self,
        step_fn_of: Callable[[int], Callable[..., tuple[Tree, Tree]]],
        config: ConfigDict,
        workdir: epath.Path,
    ):
        self._step_fn_of = step_fn_of
        self._steps = step_range(config.log.profile_steps) if host_index() == 0 else range(0)
        self._folder = workdir / FOLDER
        self._tracing = False

    def __call__(self, step: int, state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """A step, (state, frozen, batch), by its number."""
        traced = step in self._steps
        if traced and not self._tracing:
            jax.block_until_ready((state, batch))  # so that no earlier step is in the trace
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        with annotation if traced else contextlib.nullcontext():
            results = self._step_fn_of(step)(state, frozen, batch)
        if traced and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()
        return results

    def close(self) -> None:
        """Ends the trace, if one is running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            say(f"trace written to {self._folder}")
