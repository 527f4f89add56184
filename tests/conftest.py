"""What several test files share: one data set, one finished run, one cache of compiled programs."""

import fcntl
import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxtyping
import pytest
from ml_collections import ConfigDict

from tests import type_checks

# Before anything imports them: a call with other shapes than the annotations say is an error.
CHECKED = ["fluxvit_jax.models", "fluxvit_jax.objectives"]
jaxtyping.install_import_hook(CHECKED, f"{type_checks.__name__}.check")

from fluxvit_jax.distributed.compilation_cache import give_back_memory  # noqa: E402
from fluxvit_jax.training import setup, train, train_step  # noqa: E402
from tests import tiny  # noqa: E402
from tests.start import sitecustomize  # noqa: E402, F401

# For this process and those that it starts, before XLA looks.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *tiny.QUICK_TO_COMPILE])
# A shell starts its background jobs with SIGINT ignored, and processes that tests start and then
# interrupt would inherit that. A handler is not inherited: they begin with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


MOST_RESIDENT = 3 << 30  # bytes of a process of the tests, above which it forgets its programs
# The files that take longest, to be run first: two processes then end at about the same time.
LONGEST = (
    "training/test_train.py",
    "distributed/test_two_processes.py",
    "training/test_clip.py",
    "training/test_pretrain.py",
    "token_optimization/test_search.py",
    "training/test_chat.py",
    "training/test_trouble.py",
    "benchmarks/test_demo.py",
    "data/test_pipeline.py",
    "doctor/test_doctor.py",
    "preflight/test_preflight.py",
    "objectives/test_flux_clip.py",
    "distributed/test_mesh.py",
    "objectives/test_base.py",
    "objectives/test_flux_umt.py",
    "evaluation/test_evaluate.py",
    "test_docs.py",
    "benchmarks/test_gpu.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """Folder that all processes of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made by the first process that asks for it, while the others wait."""
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = Path(f"{folder}.unfinished")
            shutil.rmtree(making, ignore_errors=True)
            make(making)
            making.rename(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled(shared) -> Path:
    """Folder of compiled programs: what one test or process has compiled, the next ones load.

    JAX_COMPILATION_CACHE_DIR names one that stays.
    """
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or shared / "compiled")
    cache.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    os.environ |= tiny.caching(cache)  # of processes that tests start
    return cache


@pytest.fixture(scope="session")
def tiny_data(shared) -> Path:
    """The videos and lists of `tiny.write_data`. Read only."""
    return made_once(shared / "tiny", tiny.write_data)


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Equal training steps of one process are one jitted function, which JAX traces only once.

    A test that resumes a run would otherwise wait ten times longer for the step's tracing than for
    its steps. All that a step is made from tells it apart, except what only says where data are,
    how they are read and what is done between steps.
    """
    elsewhere = {
        "data": ("train", "root", "validation", "workers", "clip_seconds", "max_bad_fraction"),
        "train": ("init_from", "max_nonfinite", "early_stopping_epochs"),
    }
    made: dict[tuple, Any] = {}

    def key_of(config: ConfigDict, *more: Any) -> tuple:
        told = json.loads(config.to_json())
        for section in ("checkpoint", "log", "eval", "search"):
            del told[section]
        for section, fields in elsewhere.items():
            for field in fields:
                del told[section][field]
        return (json.dumps(told), *more)

    def make_optimizer(config: ConfigDict, steps: int, params: dict) -> Any:
        leaves, tree = jax.tree.flatten(params)
        key = key_of(config, steps, tree, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in made:
            made[key] = optimizer_of(config, steps, params)
        return made[key]

    def make_train_step(config: ConfigDict, objective: Any, optimizer: Any, mesh: Any) -> Any:
        key = key_of(config, objective, optimizer, mesh, train_step.accumulate)
        if key not in made:
            made[key] = step_of(config, objective, optimizer, mesh)
        return made[key]

    optimizer_of, step_of = setup.make_optimizer, train.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_optimizer", make_optimizer)
        patch.setattr(train, "make_train_step", make_train_step)
        yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Every program that JAX keeps takes megabytes, and each operation outside a jit is one."""
    yield
    if resident_bytes() > MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()
        give_back_memory()


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Programs that a test calls handle signals as programs do; later tests must not die of it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Run(NamedTuple):
    """A finished training run of the tiny recipe that nothing disturbed."""

    workdir: Path
    log: str  # what it wrote to stderr


@pytest.fixture(scope="session")
def finished(tiny_data, compiled, shared, tmp_path_factory) -> Run:
    """Read only: other tests use it as well.

    Each process has a copy of what the first one trained, since a workdir is of one at a time.
    """

    def train(folder: Path) -> None:
        process = tiny.start(tiny_data, folder / "run", compiled)
        _, log = process.communicate()
        assert process.returncode == 0, log
        (folder / "log").write_text(log.replace(str(folder / "run"), "WORKDIR"))

    trained = made_once(shared / "finished", train)
    workdir = tmp_path_factory.mktemp("run") / "finished"
    shutil.copytree(trained / "run", workdir)
    return Run(workdir, (trained / "log").read_text().replace("WORKDIR", str(workdir)))
