"""What a run says: numbers to metrics.jsonl and TensorBoard, one progress line to the terminal."""

import io
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory
from tqdm import tqdm

from fluxvit_jax import atomic, storage

FILE = "metrics.jsonl"


class EventObjects:
    """TensorBoard files in a bucket. tensorboardX's own way there ends at the first failure."""

    def directory_check(self, path: str) -> None:
        """Folders come with the objects in them."""

    def open(self, path: str) -> atomic.GrowingObject:
        return atomic.GrowingObject(storage.path_of(path))


register_writer_factory("gs", EventObjects())


class Metrics:
    """Named numbers of a run, by step and split. Only the first process writes.

    `metrics.jsonl` holds what follows from configuration and data alone, so that a run killed and
    resumed leaves the same file as an undisturbed one; what the clock says (clips a second) goes
    to TensorBoard only.

    In a bucket both are objects, written anew every half minute (TensorBoard's every two) and at
    `close`; `save` writes the lines, so that a checkpoint has all of those before it.
    """

    def __init__(self, workdir: storage.PathLike):
        self._workdir = storage.path_of(workdir)
        self._primary = jax.process_index() == 0
        self._file: atomic.LineFile | None = None
        self._tensorboard: SummaryWriter | None = None
        self._resumed_at = 0

    def write(
        self,
        step: int,
        split: str,
        scalars: Mapping[str, Any],
        timings: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one line `{"step": .., "split": .., <scalars>}` and flush it.

        Args:
            step: optimiser steps taken so far.
            split: "train", "validation", ...
            scalars: numbers or 0-d arrays; not-a-number and infinity become null in the file.
            timings: numbers that differ from run to run, for TensorBoard alone.
        """
        if not self._primary:
            return
        self._open()
        values = {name: _number(value) for name, value in scalars.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        line = json.dumps({"step": int(step), "split": split, **finite}, allow_nan=False)
        self._file.add(line)
        for name, value in {**values, **(timings or {})}.items():
            self._tensorboard.add_scalar(f"{split}/{name}", _number(value), int(step))

    def rewind(self, step: int) -> None:
        """Forget everything past `step`: a resumed run writes it again.

        Call it before the first `write`. A line cut short by a kill is dropped as well.
        """
        if not self._primary:
            return
        if self._file is not None:
            raise RuntimeError("rewind comes before the first write")
        self._resumed_at = step
        path = self._workdir / FILE
        with storage.errors(path):
            lines = path.read_text().splitlines() if path.exists() else None
        if lines is not None:
            kept = [line for line in lines if _within(line, step)]
            atomic.write(path, "".join(line + "\n" for line in kept))

    def save(self) -> None:
        """Returns when every line so far is in the file. Raises UserError if a bucket fails."""
        if self._file is not None:
            self._file.save()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            self._file = None

    def _open(self) -> None:
        if self._file is None:
            storage.make_folder(self._workdir)
            self._file = atomic.LineFile(self._workdir / FILE)
            self._tensorboard = SummaryWriter(
                str(self._workdir / "tensorboard"),
                purge_step=self._resumed_at + 1,  # TensorBoard drops older files' later events
                filename_suffix=f".after{self._resumed_at}",
            )


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


def _within(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """One line with step, epoch, loss, clips a second and time left.

    In a terminal the line renews itself; elsewhere a new one is printed every `every` steps.
    Only the first process shows it.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        clips_per_step: int,
        *,
        start_step: int = 0,
        every: int = 20,
        stream: TextIO | None = None,
    ):
        self._stream = stream or sys.stderr
        self._primary = jax.process_index() == 0
        self._terminal = self._stream.isatty()
        self._start_step = start_step
        self._steps_per_epoch = steps_per_epoch
        self._clips_per_step = clips_per_step
        self._every = every
        self._loss = "-"
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=self._stream if self._terminal and self._primary else io.StringIO(),
            bar_format="{desc} |{bar:20}| {remaining} left",
            dynamic_ncols=True,
            miniters=1,
            smoothing=0.1,
            disable=False,  # whatever TQDM_DISABLE says: this is the log, and needs the rate
        )

    @property
    def clips_per_second(self) -> float:
        """The recent rate, smoothed, without the first step; 0 until there is one."""
        now = self._bar.format_dict
        if now["rate"] is None:
            steps = now["n"] - now["initial"]
            return steps * self._clips_per_step / now["elapsed"] if steps else 0.0
        return now["rate"] * self._clips_per_step

    def advance(self, loss: float | None = None) -> None:
        """One more step is done. Give `loss` when it is at hand: fetching it waits for the device.

        The last loss given stays in the line.
        """
        if loss is not None:
            self._loss = f"{loss:.4g}"
        if self._bar.n == self._start_step:
            self._start_clock()
        else:
            self._bar.update()
        self._bar.set_description_str(self._facts(), refresh=False)
        if self._primary and not self._terminal and self._due():
            print(self._line("{desc}, {remaining} left"), file=self._stream, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside (an evaluation) from the rate and the time left."""
        self._bar.clear()
        yield
        self._bar.unpause()
        self._bar.refresh()

    def close(self) -> None:
        """Leave the line as it stands."""
        self._bar.close()

    def _start_clock(self) -> None:
        """Count the first step, but not its time, most of which is compilation."""
        self._bar.n += 1
        self._bar.initial = self._bar.last_print_n = self._bar.n
        self._bar.unpause()

    def _facts(self) -> str:
        step, total = self._bar.n, self._bar.total
        return (
            f"step {step}/{total}, epoch {step / self._steps_per_epoch:.2f}, loss {self._loss}, "
            f"{self.clips_per_second:.1f} clips/s"
        )

    def _line(self, bar_format: str) -> str:
        return self._bar.format_meter(**self._bar.format_dict | {"bar_format": bar_format})

    def _due(self) -> bool:
        return self._bar.n % self._every == 0 or self._bar.n == self._bar.total
