"""Programs of the package, run in the process of the tests, which has imported JAX already."""

import runpy
import sys
import warnings

import grain  # noqa: F401 - defines its flags now, before `run_module` looks which are new
import pytest
from absl import flags

from fluxvit_jax import command_line
from fluxvit_jax.distributed import hosts


def run_module(module: str, *arguments: str) -> int:
    """The exit status of `python -m MODULE ARGUMENTS`. Flags are left as before."""
    known = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: it is imported already
        patch.setattr(sys, "argv", [module, *arguments])
        # JAX only looks for other processes before its first computation.
        patch.setattr(hosts, "_connect", lambda *_: None)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            for name in set(flags.FLAGS) - known:  # but not those of libraries
                own = flags.FLAGS.find_module_defining_flag(name) == command_line.__name__
                if own or name.split(".")[0] == "config":
                    delattr(flags.FLAGS, name)
    return 0
