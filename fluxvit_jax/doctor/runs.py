"""Checks of whole runs of `fluxvit_jax.main`: killed and resumed, and with a damaged checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.distributed import storage
from fluxvit_jax.doctor import videos
from fluxvit_jax.doctor.outcome import FailedError, Place

STEPS = 16
KILLED_AFTER = 4  # steps that have a checkpoint
ELSEWHERE = "see docs/faq.md for this line, or name another --workdir"
SLOW = "see what else the machine and the storage are doing"


def resume(place: Place) -> str:
    """Whether a run that is killed and resumed ends in the same bits as an undisturbed one."""
    undisturbed = _undisturbed(place)
    killed = storage.path_of(place.folder) / "killed"
    at = _train_and_kill(place, killed)
    log = _train(place, killed)
    if "going on from step" not in log:
        raise FailedError(f"killed at step {at}, it began anew", "see docs/faq.md")
    _compare(killed, undisturbed)
    return f"killed at step {at} of {STEPS}, resumed: weights and metrics bit-equal"


def damage(place: Place) -> str:
    """Whether a flipped bit in the newest checkpoint is noticed, and an older one taken."""
    undisturbed = _undisturbed(place)
    before = _params(undisturbed)
    state = undisturbed / checkpointer.FOLDER / str(STEPS) / "state"
    path = max(_files(state), key=lambda file: len(storage.read_bytes(file)))
    content = bytearray(storage.read_bytes(path))
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    log = _train(place, undisturbed)
    if "is damaged" not in log or f"going on from step {STEPS - 2} of" not in log:
        raise FailedError("a flipped bit in a checkpoint passed unnoticed", "see docs/faq.md")
    if not _equal(_params(undisturbed), before):
        raise FailedError("from the checkpoint before, weights end otherwise", "see docs/faq.md")
    return f"a flipped bit in step {STEPS} noticed, gone on from {STEPS - 2}, weights bit-equal"


def _undisturbed(place: Place) -> epath.Path:
    """The workdir of a run that nothing disturbed; the first check that needs it runs it."""
    workdir = storage.path_of(place.folder) / "undisturbed"
    if not (workdir / checkpointer.FOLDER / str(STEPS)).exists():
        _train(place, workdir)
    return workdir


def _start(place: Place, workdir: epath.Path) -> subprocess.Popen:
    scratch = Path(place.scratch)
    data = videos.write_dataset(scratch / "videos")
    caching = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "fluxvit_jax.main", f"--config={videos.RECIPE}"]
    command += [f"--workdir={workdir}", *videos.tiny_run(data, workers=1)]
    with open(scratch / "run.log", "w") as log:
        return subprocess.Popen(command, env=caching | os.environ, stdout=log, stderr=log)


def _train(place: Place, workdir: epath.Path) -> str:
    """Runs training to its end; returns what it printed."""
    process = _start(place, workdir)
    try:
        status = process.wait(max(0.0, place.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise FailedError("its time is over before a run of tiny steps ends", SLOW) from None
    finally:
        process.kill()
        process.wait()
    log = (Path(place.scratch) / "run.log").read_text()
    if status:
        _raise(status, log)
    return log


def _train_and_kill(place: Place, workdir: epath.Path) -> int:
    """Kills a run once it has some checkpoints; returns the step of the last one."""
    process = _start(place, workdir)
    try:
        while (step := _newest(workdir)) < KILLED_AFTER:
            if process.poll() is not None:
                _raise(process.returncode, (Path(place.scratch) / "run.log").read_text())
            if time.monotonic() > place.deadline:
                raise FailedError("its time is over before a checkpoint is written", SLOW)
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return step


def _raise(status: int, log: str) -> None:
    """Raises FailedError with the last line of a run that ended with a status."""
    line = (log.strip().splitlines() or ["nothing was said"])[-1].removeprefix("error: ")
    raise FailedError(f"training ends with status {status}: {line}", ELSEWHERE)


def _newest(workdir: epath.Path) -> int:
    folder = workdir / checkpointer.FOLDER
    names = storage.folders_in(folder) if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def _files(folder: epath.Path) -> list[epath.Path]:
    return [folder / name for name in storage.files_below(folder)]


def _compare(ours: epath.Path, plain: epath.Path) -> None:
    """Raises FailedError unless two runs have the same metrics and weights."""
    cure = "on GPUs, XLA_FLAGS=--xla_gpu_deterministic_ops=true makes sums the same every time"
    if not _equal(_params(ours), _params(plain)):
        raise FailedError("the weights of a resumed run differ from an undisturbed one's", cure)
    lines = [storage.read_bytes(workdir / "metrics.jsonl") for workdir in (ours, plain)]
    if lines[0] != lines[1]:
        raise FailedError("the metrics of a resumed run differ from an undisturbed one's", cure)


def _params(workdir: epath.Path) -> Any:
    jax.config.update("jax_platforms", "cpu")  # this process leaves the accelerator to the runs
    return checkpointer.restore_params(workdir / checkpointer.FOLDER / str(STEPS))


def _equal(ours: Any, plain: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, ours, plain))
