"""A training run under kills, signals, a full disk, flipped bits, and clips that hang and crash.

    python -m benchmarks.soak --out=soak [--epochs=100] [--every=30] [--seed=0]

A small network is trained on 194 clips (`benchmarks.soak_recipe`), two of which make the decoder
hang and crash. Something happens to the run every `--every` seconds on average, and what ended is
started again with the same command, until the run is finished. At the end, parameters and metrics
must be, bit for bit, those of a run on as many CPU cores that nothing disturbed, in which the same
two clips are ordinary broken files. That one is kept: with --out/disturbed removed, as many epochs
are disturbed anew. With --epochs=20 it took 15 minutes on two busy CPU cores; the default is five
times as long. The full disk needs root, to mount a small one. Exit status: 0; 1 if anything was
not as it should.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np

from benchmarks.demo import run
from benchmarks.soak_recipe import CRASHES, HANGS, write_folder
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.checkpoints.workdir import METRICS
from fluxvit_jax.distributed import checksums
from fluxvit_jax.training.goodput import FILE as GOODPUT

DISK_MIB = 64
PATIENCE = 300  # seconds in which a run must end that was told to, or that has no room
FILLER = "filler"


def main() -> int:
    options = parse()
    out = options.out
    if (out / "disturbed").exists():
        sys.exit(f"{out} has an earlier soak: remove it, or name another folder")
    run("fluxvit_jax.data.synthetic", f"--out={out}/clips", "--train=192", "--validation=48")
    write_folder(out / "broken", out / "clips", broken=True)
    write_folder(out / "fatal", out / "clips", broken=False)
    cores = len(os.sched_getaffinity(0))  # with others the last bits differ
    undisturbed = Command(out / f"undisturbed-{cores}-cores", out / "broken", options.epochs)
    if undisturbed.start().wait():
        sys.exit(f"the undisturbed run failed: {undisturbed.log}")
    seconds = sum(undisturbed.spent().values())
    print(f"undisturbed: {seconds / 60:.1f} minutes", flush=True)
    with small_disk(out / "disk") as disk:
        folder = (disk or out) / "disturbed"
        disturbed = Command(folder, out / "fatal", options.epochs)
        soak = Soak(disturbed, disk, options)
        begin = time.monotonic()
        soak.run()
        faults = soak.faults + differences(disturbed, undisturbed)
        print(soak.table(time.monotonic() - begin, seconds))
        print("\n".join(faults) or "parameters and metrics: those of the undisturbed run, all bits")
        if disk:
            shutil.copytree(folder, out / "disturbed")
    return 1 if faults else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder (default: soak)")
    parser.add_argument("--epochs", type=int, default=100, help="of training (default: 100)")
    parser.add_argument(
        "--every", type=float, default=30, help="mean seconds between disturbances (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances (default: 0)")
    return parser.parse_args()


class Command:
    """The command of a run; each start adds to its log."""

    def __init__(self, workdir: Path, data: Path, epochs: int):
        self.workdir = workdir
        self.log = data.parent / f"{workdir.name}.log"
        self._arguments = [
            *(sys.executable, "-m", "fluxvit_jax.main"),
            f"--config=benchmarks/soak_recipe.py:{data}",
            f"--workdir={workdir}",
            f"--config.train.epochs={epochs}",
        ]
        cache = str(data.parent / "compiled")
        self._environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}

    def start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            return subprocess.Popen(self._arguments, env=self._environment, stdout=log, stderr=log)

    def spent(self) -> dict[str, float]:
        """Where the seconds of all starts went."""
        return json.loads((self.workdir / GOODPUT).read_text())["seconds"]

    def written_since(self, begin: int) -> str:
        """What the log has from byte `begin` on."""
        return self.log.read_bytes()[begin:].decode(errors="replace")


class Soak:
    """A run and what happens to it."""

    def __init__(self, command: Command, disk: Path | None, options: argparse.Namespace):
        self.faults: list[str] = []
        self._command = command
        self._disk = disk
        self._every = options.every
        self._random = random.Random(options.seed)
        self._happened: Counter[str] = Counter()
        self._starts = 0
        self._disturbances: dict[str, Callable[[subprocess.Popen], int | None]] = {
            "kill -9 of the run": self._kill,
            "SIGTERM": lambda process: self._stop(process, signal.SIGTERM),
            "SIGINT": lambda process: self._stop(process, signal.SIGINT),
            "kill -9 of a worker": self._kill_worker,
            "kill -9, then a bit of the newest checkpoint flipped": self._flip_checkpoint,
            "kill -9, then a bit of the newest metrics flipped": self._flip_metrics,
        }
        if disk:
            self._disturbances["disk full"] = self._fill_disk

    def run(self) -> None:
        """Starts the run again and again until it is finished."""
        finished = False
        while not finished and not self.faults:
            for damaged in self._command.workdir.glob("checkpoints/*.damaged"):
                shutil.rmtree(damaged)  # they would fill the small disk
            self._starts += 1
            begin = self._command.log.stat().st_size if self._command.log.exists() else 0
            finished = self._disturb(self._command.start())
            if "Traceback" in (said := self._command.written_since(begin)):
                self.faults.append(f"start {self._starts}: a traceback\n{said}")

    def _disturb(self, process: subprocess.Popen) -> bool:
        """Lets things happen until the process ends; whether the run is finished."""
        worker_killed = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(self._random.uniform(0, 2 * self._every))
                return self._check(process, status, {0}, "nothing")
            name = self._random.choice(list(self._disturbances))
            if name == "kill -9 of a worker" and worker_killed:
                continue  # a second one, at the same clip, would be charged to the clip
            begin = time.monotonic()
            expected = self._disturbances[name](process)
            self._happened[name] += 1
            if expected is None:
                worker_killed = True
                continue
            try:
                status = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                self.faults.append(f"start {self._starts}: {name}: not ended in {PATIENCE} s")
                return False
            (self._disk or Path()).joinpath(FILLER).unlink(missing_ok=True)
            seconds = time.monotonic() - begin
            print(f"start {self._starts}: {name}: status {status} in {seconds:.1f} s", flush=True)
            # It may have finished just before; signals act by default while Python itself starts.
            return self._check(process, status, {0, expected, 128 - expected}, name)

    def _check(self, process: subprocess.Popen, status: int, expected: set[int], name: str) -> bool:
        if status not in expected:
            log = self._command.log
            self.faults.append(f"start {self._starts}: {name}: status {status}; see {log}")
        return status == 0

    # --- What happens. Each returns the exit status that it leads to, None if the run goes on.

    def _kill(self, process: subprocess.Popen) -> int:
        process.kill()
        return -signal.SIGKILL

    def _stop(self, process: subprocess.Popen, number: signal.Signals) -> int:
        process.send_signal(number)
        return 128 + number

    def _kill_worker(self, process: subprocess.Popen) -> None:
        with suppress(OSError):  # the run may end meanwhile
            if workers := workers_of(process.pid):
                os.kill(self._random.choice(workers), signal.SIGKILL)

    def _fill_disk(self, process: subprocess.Popen) -> int:
        with suppress(OSError), open(self._disk / FILLER, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return 2

    def _flip_checkpoint(self, process: subprocess.Popen) -> int:
        process.kill()
        process.wait()
        steps = saved_steps(self._command.workdir)
        if len(steps) > 1:  # with all of them damaged a run would be refused
            newest = self._command.workdir / "checkpoints" / str(steps[-1])
            self._flip([path for path in newest.rglob("*") if path.is_file()])
        return -signal.SIGKILL

    def _flip_metrics(self, process: subprocess.Popen) -> int:
        """In lines that the next start writes again."""
        process.kill()
        process.wait()
        path = self._command.workdir / METRICS
        lines = checksums.read_lines(path) if path.exists() else []
        steps = saved_steps(self._command.workdir)
        if lines and steps and lines[-1]["step"] > steps[-1]:
            self._flip([path], last=40)
        return -signal.SIGKILL

    def _flip(self, files: list[Path], last: int | None = None) -> None:
        """Flips a bit of one of the files, in their `last` bytes."""
        path = self._random.choice([path for path in files if path.stat().st_size])
        content = bytearray(path.read_bytes())
        place = self._random.randrange(max(0, len(content) - (last or len(content))), len(content))
        content[place] ^= 1 << self._random.randrange(8)
        path.write_bytes(content)

    def table(self, seconds: float, undisturbed: float) -> str:
        """What happened, and what it cost."""
        spent = self._command.spent()
        shares = ", ".join(f"{name} {own / sum(spent.values()):.0%}" for name, own in spent.items())
        rows = [f"| {name} | {number} |" for name, number in sorted(self._happened.items())]
        return "\n".join(
            [
                "| what happened | times |",
                "|---|---|",
                *rows,
                f"{self._starts} starts in {seconds / 60:.1f} minutes, {undisturbed / 60:.1f} "
                f"undisturbed; {shares}",
            ]
        )


def workers_of(pid: int) -> list[int]:
    """The processes that read data for another one, once they have imported the decoder."""
    workers = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # threads and processes may end meanwhile
            for child in (thread / "children").read_text().split():
                if "libavcodec" in Path(f"/proc/{child}/maps").read_text():
                    workers.append(int(child))
    return workers


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


@contextmanager
def small_disk(folder: Path):
    """A file system of its own, or None where it cannot be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        print("a small disk cannot be mounted here: it is never full", flush=True)
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def differences(disturbed: Command, undisturbed: Command) -> list[str]:
    """What differs between two finished runs, and counted clips other than the two."""
    found, folders = [], (disturbed.workdir, undisturbed.workdir)
    ours, theirs = (jax.tree.leaves(restore_params(folder)) for folder in folders)
    if not all(map(np.array_equal, ours, theirs)):
        found.append("the parameters are not those of the undisturbed run")
    ours, theirs = ((folder / METRICS).read_bytes() for folder in folders)
    if ours != theirs:
        found.append("the metrics are not those of the undisturbed run")
    ours, theirs = (run.spent()["step"] for run in (disturbed, undisturbed))
    if ours < theirs / 2:
        found.append(f"goodput has {ours:.0f} s of steps, of the undisturbed run {theirs:.0f}")
    clips = {line["id"] for line in checksums.read_lines(disturbed.workdir / "bad_clips.jsonl")}
    if clips != {HANGS, CRASHES}:
        found.append(f"clips that were counted: {sorted(clips)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
