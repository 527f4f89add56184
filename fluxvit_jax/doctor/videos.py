"""Checks of reading: decoders, a broken file, and workers that die. Small videos are written."""

import multiprocessing
import os
import signal
from pathlib import Path

import av
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.config.loading import load_config
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.pipeline import train_batches
from fluxvit_jax.doctor.outcome import FailedError, Place

FRAMES, HEIGHT, WIDTH = 24, 96, 128
# Encoders of each codec, of which the first that FFmpeg has is taken.
CODECS = {
    "H.264": ("libx264", "libopenh264"),
    "HEVC": ("libx265",),
    "VP9": ("libvpx-vp9",),
    "AV1": ("libsvtav1", "libaom-av1"),
}
MOST_OFF = 10.0  # of 255, on average: what is left out by compression
VIDEOS, CLASSES, BATCHES = 8, 2, 4
RECIPE = "custom:tiny"


def write_video(path: Path, encoder: str = "", number: int = 0) -> np.ndarray:
    """Writes a video of moving waves; returns its frames, uint8 RGB [T, height, width, 3].

    encoder: by default one of H.264; number: of the video, each of which is another.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = np.stack(
        [
            np.stack(
                [
                    127 + 100 * np.sin((x + t * (number + 1)) / 20),
                    127 + 100 * np.sin((y + t) / 15),
                    np.full(x.shape, 20 * number + 60),
                ],
                -1,
            )
            for t in range(FRAMES)
        ]
    ).astype(np.uint8)
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(encoder or _encoder("H.264"), rate=12)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return frames


def _encoder(codec: str) -> str:
    """The name of an encoder that FFmpeg has; "" if it has none."""
    for name in CODECS[codec]:
        try:
            av.codec.Codec(name, "w")
            return name
        except av.codec.codec.UnknownCodecError:
            continue
    return ""


def write_dataset(folder: Path) -> Path:
    """Writes `VIDEOS` videos and the list of them; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(VIDEOS):
        write_video(folder / f"{number}.mp4", number=number)
    rows = [f"{number}.mp4,{number % CLASSES}" for number in range(VIDEOS)]
    (folder / "train.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return folder / "train.csv"


def tiny_run(data: Path, workers: int) -> list[str]:
    """Flags of a run of 16 steps on the list of `write_dataset`."""
    settings = {
        "model.classes": CLASSES,
        "model.scan": True,
        "data.train": data,
        "data.validation": "",
        "data.workers": workers,
        "data.repeated_aug": 1,
        "data.clips_per_grid": 4,
        "data.grids.frames": 4,
        "data.grids.resolutions": 28,
        "data.grids.tokens": "(16,16)",
        "train.init_from": "",
        "train.budgets": "(8,)",
        "train.batch_size": 4,
        "train.epochs": 8,
        "train.warmup_epochs": 1,
        "checkpoint.every_steps": 2,
        "checkpoint.keep": 9,
        "log.every_steps": 1,
    }
    return [f"--config.{name}={value}" for name, value in settings.items()]


def decoders(place: Place) -> str:
    """Whether videos of the usual codecs are decoded as they were, and a broken one is an error."""
    folder = Path(place.scratch) / "decoders"
    folder.mkdir(exist_ok=True)
    told, missing = [], []
    for codec in CODECS:
        encoder, path = _encoder(codec), folder / f"{codec}.mp4"
        if not encoder:
            missing.append(codec)
            continue
        expected = write_video(path, encoder)
        try:
            with Video(path) as video:
                off = np.abs(video.read(np.arange(FRAMES)) - expected.astype(np.int16)).mean()
        except (DecodeError, IndexError) as error:
            raise FailedError(f"{codec}: {error}", "pip install --upgrade av") from error
        if off > MOST_OFF:
            raise FailedError(f"{codec}: frames are off by {off:.0f} of 255", "reinstall av")
        told.append(codec)
    broken = folder / "broken.mp4"
    broken.write_bytes((folder / "H.264.mp4").read_bytes()[:300])
    try:
        with Video(broken) as video:
            video.read(np.arange(FRAMES))
    except DecodeError as error:
        if "\n" not in str(error):
            more = f"; without an encoder to try: {', '.join(missing)}" if missing else ""
            return f"{', '.join(told)}; a broken file is one line{more}"
    raise FailedError("a broken file is not told in one line", "reinstall av")


def workers(place: Place) -> str:
    """Whether a worker that is killed is replaced, and no batch changes."""
    data = write_dataset(Path(place.scratch) / "videos")
    expected = _batches(load_config(RECIPE, tiny_run(data, workers=0)), kill=False)
    found = _batches(load_config(RECIPE, tiny_run(data, workers=2)), kill=True)
    for number, (ours, plain) in enumerate(zip(found, expected, strict=True)):
        for name in plain:
            if not np.array_equal(ours[name], plain[name]):
                raise FailedError(
                    f"{name} of batch {number} differs after a worker was killed",
                    "--config.data.workers=0 does without them",
                )
    return f"one of two killed, {BATCHES} batches bit-equal"


def _batches(config: ConfigDict, kill: bool) -> list[dict[str, np.ndarray]]:
    """The first batches; with `kill`, a worker is killed after the first one."""
    source = open_source(config.data.train, config.data.root, config.model.classes)
    with train_batches(config, source) as batches:
        found = [next(batches)]
        if kill:
            pid = multiprocessing.active_children()[0].pid
            assert pid is not None  # it runs
            os.kill(pid, signal.SIGKILL)
        return found + [next(batches) for _ in range(BATCHES - 1)]
