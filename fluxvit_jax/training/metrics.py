"""Training metrics: metrics.jsonl, TensorBoard, Weights & Biases and the progress line."""

import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TextIO

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.checkpoints.workdir import METRICS
from fluxvit_jax.config.fields import flatten
from fluxvit_jax.distributed import atomic, checksums, storage
from fluxvit_jax.training.wandb_run import WandbRun


@contextmanager
def _without_torch() -> Iterator[None]:
    """Hides PyTorch from imports, unless it is imported already."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


# tensorboardX imports PyTorch where it finds it, which takes seconds, for tensors that we lack.
with _without_torch():
    from tensorboardX import SummaryWriter
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import register_writer_factory

SILENCE = 10  # seconds after which progress is said whatever the interval


class EventFile:
    """A TensorBoard file of this machine, which ends early on a full disk.

    tensorboardX writes in a thread. An error would end that thread with a traceback, and the run
    would wait for it forever; metrics.jsonl meets the same disk and raises.
    """

    def __init__(self, path: str):
        self._path = path
        self._file: io.BufferedWriter | None = open(path, "wb")  # noqa: SIM115

    def write(self, content: bytes) -> None:
        self._try(lambda file: file.write(content))

    def flush(self) -> None:
        self._try(lambda file: file.flush())

    def close(self) -> None:
        self._try(lambda file: file.close())
        self._file = None

    def _try(self, do: Callable[[io.BufferedWriter], object]) -> None:
        if self._file is None:
            return
        try:
            do(self._file)
        except OSError as error:
            self._file.raw.close()  # so that it does not try again to write what it still holds
            self._file = None
            logging.warning("%s ends here: %s", self._path, error.strerror)


class EventFiles:
    """Opens them for tensorboardX, which asks by the prefix of a path."""

    prefix = "file"

    def directory_check(self, path: str) -> None:
        os.makedirs(self._local(path), exist_ok=True)

    def open(self, path: str) -> EventFile:
        return EventFile(self._local(path))

    def _local(self, path: str) -> str:
        return path.removeprefix(f"{self.prefix}:")


class EventObjects:
    """TensorBoard files in a bucket. tensorboardX's own writer stops at the first failure."""

    def directory_check(self, path: str) -> None:
        """Nothing to do: folders appear with their objects."""

    def open(self, path: str) -> atomic.GrowingObject:
        return atomic.GrowingObject(storage.path_of(path))


register_writer_factory("gs", EventObjects())
register_writer_factory(EventFiles.prefix, EventFiles())


class _Files(NamedTuple):
    """What the metrics are written to."""

    lines: atomic.LineFile
    tensorboard: SummaryWriter
    wandb: WandbRun | None


class Metrics:
    """Scalars and pictures of a run, by step and split, written by host 0.

    `metrics.jsonl` holds only numbers that follow from config and data, so that a run killed and
    resumed leaves the same file as an undisturbed one. Timings, pictures and the config as text go
    to TensorBoard only, and to Weights & Biases if `log.wandb` asks for it.

    In a bucket both are objects, written again every half minute (TensorBoard's every two) and by
    `close`. `save` writes the lines, so that they are there before a checkpoint.
    """

    def __init__(self, workdir: storage.PathLike, config: ConfigDict | None = None):
        self._workdir = storage.path_of(workdir)
        self._config = config
        self._primary = jax.process_index() == 0
        self._files: _Files | None = None  # open after a write
        self._resumed_at = 0

    def write(
        self,
        step: int,
        split: str,
        scalars: Mapping[str, Any],
        timings: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends one line `{"step": .., "split": .., <scalars>}` and flushes it.

        Args:
            step: optimizer steps taken so far.
            split: "train", "validation", ...
            scalars: numbers or 0-d arrays; not-a-number and infinity become null in the file.
            timings: numbers that differ from run to run, for TensorBoard only.
        """
        if not self._primary:
            return
        files = self.open()
        values = {name: _number(value) for name, value in scalars.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        files.lines.add(checksums.to_line({"step": int(step), "split": split} | finite))
        named = {
            f"{split}/{name}": _number(value)
            for name, value in (values | dict(timings or {})).items()
        }
        for name, value in named.items():
            files.tensorboard.add_scalar(name, value, int(step))
        if files.wandb:
            files.wandb.log(int(step), named)

    def write_pictures(self, step: int, split: str, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds pictures, uint8 [height, width, 3] by their names, to TensorBoard."""
        if not self._primary or not pictures:
            return
        files = self.open()
        for name, picture in pictures.items():
            # As JPEG: TensorBoard's file in a bucket is written again as a whole.
            _, jpeg = cv2.imencode(".jpg", picture[..., ::-1])
            height, width, _ = picture.shape
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=jpeg.tobytes()
            )
            summary = Summary(value=[Summary.Value(tag=f"{split}/{name}", image=image)])
            files.tensorboard.file_writer.add_summary(summary, int(step))
        if files.wandb:
            named = {f"{split}/{name}": picture for name, picture in pictures.items()}
            files.wandb.log_pictures(int(step), named)

    def rewind(self, step: int) -> None:
        """Removes all lines after `step`: a resumed run writes them again.

        Call it before the first `write`. Damaged lines are dropped as well.
        """
        if not self._primary:
            return
        if self._files is not None:
            raise RuntimeError("rewind comes before the first write")
        self._resumed_at = step
        path = self._workdir / METRICS
        if path.exists():
            lines = checksums.read_lines(path)
            checksums.write_lines(path, [line for line in lines if line["step"] <= step])

    def save(self) -> None:
        """Returns once every line so far is in the file. Raises UserError if a bucket fails."""
        if self._files is not None:
            self._files.lines.save()

    def close(self) -> None:
        if self._files is not None:
            self._files.tensorboard.close()
            self._files.lines.close()
            if self._files.wandb:
                self._files.wandb.close()
            self._files = None

    def open(self) -> _Files:
        """Opens the files on host 0, if that is not done yet; the first write does so as well.

        Raises UserError if Weights & Biases refuses.
        """
        self._files = self._files or self._open()
        return self._files

    def _open(self) -> _Files:
        storage.make_folder(self._workdir)
        folder, config = str(self._workdir / "tensorboard"), self._config
        wandb = WandbRun(config, self._workdir) if config and config.log.wandb else None
        tensorboard = SummaryWriter(
            folder if storage.is_remote(folder) else f"{EventFiles.prefix}:{folder}",
            purge_step=self._resumed_at + 1,  # TensorBoard drops older files' later events
            filename_suffix=f".after{self._resumed_at}",
        )
        if config:
            fields = "\n".join(f"    {name} = {value!r}" for name, value in flatten(config).items())
            tensorboard.add_text("config", fields, self._resumed_at)  # Markdown of code
        return _Files(atomic.LineFile(self._workdir / METRICS), tensorboard, wandb)


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


class Progress:
    """One line with step, epoch, loss, clips a second and time left, on host 0.

    In a terminal the line updates in place. Elsewhere a new one is printed every `every` steps, and
    with any step that ends `SILENCE` seconds after the last line.
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
        self._told = time.monotonic()
        self._loss = "-"
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=self._stream if self._terminal and self._primary else io.StringIO(),
            bar_format="{desc} |{bar:20}| {remaining} left",
            dynamic_ncols=True,
            miniters=1,
            smoothing=0.1,
            disable=False,  # regardless of TQDM_DISABLE: the log needs the rate
        )

    @property
    def clips_per_second(self) -> float:
        """The smoothed rate without the first step; 0 before the second one."""
        now = self._bar.format_dict
        if now["rate"] is None:
            steps = now["n"] - now["initial"]
            return steps * self._clips_per_step / now["elapsed"] if steps else 0.0
        return now["rate"] * self._clips_per_step

    def advance(self, loss: float | None = None) -> None:
        """Counts a step. Without `loss`, which the device may not have yet, the last one stays."""
        if loss is not None:
            self._loss = f"{loss:.4g}"
        if self._bar.n == self._start_step:  # count the first step without its time: compilation
            self._bar.n += 1
            self._bar.initial = self._bar.last_print_n = self._bar.n
            self._bar.unpause()
        else:
            self._bar.update()
        step, total = self._bar.n, self._bar.total
        self._bar.set_description_str(
            f"step {step}/{total}, epoch {step / self._steps_per_epoch:.2f}, loss {self._loss}, "
            f"{self.clips_per_second:.1f} clips/s",
            refresh=False,
        )
        due = step % self._every == 0 or step == total
        due |= time.monotonic() - self._told >= SILENCE
        if self._primary and not self._terminal and due:
            self._told = time.monotonic()
            line_format = {"bar_format": "{desc}, {remaining} left"}
            line = self._bar.format_meter(**self._bar.format_dict | line_format)
            print(line, file=self._stream, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context, of an evaluation, whose time counts neither in the rate nor the time left."""
        self._bar.clear()
        yield
        self._bar.unpause()
        self._bar.refresh()

    def close(self) -> None:
        """Closes the bar and leaves the line as it is."""
        self._bar.close()
