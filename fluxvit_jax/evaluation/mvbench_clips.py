"""The clips of MVBench's questions, each an item that workers make.

Workers import this module, which does without JAX.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from fluxvit_jax.data.augmentation import resize_clip
from fluxvit_jax.data.clips import Clip, middle_square
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.host_share import Arrays, NumberedItems
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.data.supervised_workers import Quarantine, reading
from fluxvit_jax.evaluation import mvbench
from fluxvit_jax.evaluation.mvbench import Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionClips(NumberedItems):
    """The clips of questions: item i is that of question i, and padding beyond the last.

    An item has number: int64 [1], -1 for padding; failure: str [1], why the video cannot be read,
    else ""; clip: uint8 [1, frames, side, side, 3], zeros without a video; times: float64 [1,
    frames], the seconds of its frames, from the beginning of what is asked about, or zeros.

    squeeze: whether whole frames become the square, and not their middle. quarantine: videos that
    are not to be read, by path; see `supervised_workers`.
    """

    questions: Sequence[Question]
    frames: int
    side: int
    squeeze: bool
    quarantine: Quarantine = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> Arrays:
        square, failure = np.zeros((self.frames, self.side, self.side, 3), np.uint8), ""
        times = np.zeros(self.frames)
        if number < len(self.questions):
            question = self.questions[number]
            try:
                with reading(question.video, self.quarantine):
                    clip = read_middles(question, self.frames)
                    square, times = self._square(clip.frames), clip.times
            except DecodeError as error:
                failure = error.reason
        else:
            number = -1
        return {
            "number": np.array([number], np.int64),
            "failure": np.array([failure], np.str_),
            "clip": square[None],
            "times": times[None],
        }

    def _square(self, pixels: np.ndarray) -> np.ndarray:
        if self.squeeze:
            return resize_clip(pixels, self.side, self.side, cv2.INTER_CUBIC)
        return middle_square(pixels, self.side)


def read_middles(question: Question, frames: int) -> Clip:
    """The official frames of a question's video, at their size.

    Raises DecodeError.
    """
    if question.frame_rate:
        return _read_folder(question, frames)
    with open_clip(question.video) as video:
        rate = video.frame_rate if isinstance(video, Video) else None
        if not rate and question.seconds:
            raise DecodeError(
                question.video, "names no frame rate, and a part of it is asked about"
            )
        numbers = mvbench.segment_middles(len(video) - 1, frames, rate or 1.0, question.seconds)
        return Clip(video.read(numbers), numbers, _times(question, numbers, rate))


def _times(question: Question, numbers: np.ndarray, rate: float | None) -> np.ndarray:
    """Seconds of frames from the beginning of what is asked about; zeros without a rate."""
    if not rate:
        return np.zeros(len(numbers))
    begin = question.seconds[0] if question.seconds else 0.0
    return np.maximum(numbers / rate - begin, 0.0)


def _read_folder(question: Question, frames: int) -> Clip:
    """The same of a folder of frames, 00001.jpg and so on."""
    assert question.frame_rate is not None
    folder = Path(question.video)
    last = len(list(folder.glob("*.jpg"))) if folder.is_dir() else 0
    if not last:
        raise DecodeError(question.video, "is no folder of frames, 00001.jpg and so on")
    numbers = mvbench.segment_middles(last, frames, question.frame_rate, question.seconds, 1)
    found = []
    for number in numbers:
        pixels = cv2.imread(str(folder / f"{number:05}.jpg"))
        if pixels is None:
            raise DecodeError(question.video, f"its frame {number:05}.jpg cannot be read")
        found.append(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return Clip(np.stack(found), numbers, _times(question, numbers - 1, question.frame_rate))
