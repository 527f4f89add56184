"""`--mode=chat`: questions about a video, from the command line.

Without --question questions are read from the terminal, or a pipe, one a line, until it ends. On
the terminal an empty line ends it too; in a pipe empty lines are skipped. With --question one
answer is printed; of a folder of videos, one JSON object a line, in `OUT/answers.jsonl` too.
"""

import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.config.fields import FIELDS
from fluxvit_jax.data import durable_files
from fluxvit_jax.data.annotations import videos_below
from fluxvit_jax.deploy.chat import Chat, Conversation, FirstQuestion, load_chat
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.devices import enough_memory
from fluxvit_jax.distributed.mesh import make_mesh, mesh_over, round_up_to_shards
from fluxvit_jax.errors import UserError
from fluxvit_jax.reports.wording import count

ANSWERS = "answers.jsonl"


class Options(NamedTuple):
    """The flags of this mode, by their names."""

    checkpoint: str
    out: str
    video: str
    llm: str = ""
    tokens: int | None = None
    question: str = ""
    dtype: str | None = None


def run(options: Options, config: ConfigDict | None = None) -> int:
    """Answers questions; returns the exit status, 0.

    config: a recipe, if one was given: its `parallel.mesh` and `eval.batch_size` then hold. Without
        one, all devices share one copy of the networks.

    Raises UserError: no such weights, language model or video; a folder without a question, or
    with no video that can be read.
    """
    source = storage.path_of(options.video)
    if not options.video or not source.exists():
        raise UserError(f"--video={options.video}: no such file or folder")
    if source.is_dir() and not options.question:
        raise UserError(f"--video={options.video}: a folder needs one question for all: --question")
    mesh = make_mesh(config) if config else mesh_over("fsdp", jax.devices())
    chat = load_chat(options.checkpoint, options.llm, options.dtype or "float32", mesh)
    if source.is_dir():
        wanted = config.eval.batch_size if config else FIELDS["eval.batch_size"].default
        batch_size = round_up_to_shards(wanted, mesh)
        return _answer_folder(chat, Path(options.video), options, batch_size)
    begin = time.perf_counter()
    conversation = chat.open(options.video, options.tokens)
    _tell(f"{options.video}: read and encoded in {time.perf_counter() - begin:.1f} s, "
          f"{len(conversation.tokens)} tokens for the language model")  # fmt: skip
    if options.question:
        _say_answer(conversation, options.question)
    else:
        for question in _questions():
            _say_answer(conversation, question)
    return 0


def _questions() -> Iterator[str]:
    """The lines of stdin until it ends, without empty ones; on a terminal an empty one ends it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # of another encoding than the terminal's
    asks = sys.stdin.isatty()
    if asks:
        _tell("ask about the video; an empty line or Ctrl-D ends")
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        question = line.strip()
        if not line or (asks and not question):
            return
        if question:
            yield question


def _say_answer(conversation: Conversation, question: str) -> None:
    """Prints an answer as it comes, and how quickly it came."""
    begin, first, words = time.perf_counter(), 0.0, ""
    for piece in conversation.stream(question):
        first = first or time.perf_counter() - begin
        words += piece
        print(piece, end="", flush=True)
    print(flush=True)
    number, seconds = len(words.split()), time.perf_counter() - begin - first
    rate = f", then {(number - 1) / seconds:.1f} words a second" if number > 1 and seconds else ""
    _tell(f"first word after {first:.2f} s{rate}")


def _answer_folder(chat: Chat, folder: Path, options: Options, batch_size: int) -> int:
    """The answer about each video of a folder, or why it cannot be read, a JSON object a line."""
    videos = videos_below(folder)
    if not videos:
        raise UserError(f"--video={folder}: holds no videos")
    failed = 0
    too_large = (
        f"config.eval.batch_size: {batch_size} videos at once are more than the devices' memory "
        "takes; add a recipe, such as --config=mvbench, and a lower --config.eval.batch_size"
    )
    with (
        durable_files.one_run_at_a_time(Path(options.out), "--mode=chat"),
        _open_answers(Path(options.out)) as file,
        tqdm(total=len(videos), desc="answering", unit="video", disable=None) as bar,
    ):
        for first in range(0, len(videos), batch_size):
            part = videos[first : first + batch_size]
            with enough_memory(too_large):
                answers = _answers(chat, part, options, batch_size)
            for path, answer in zip(part, answers, strict=True):
                row = {"video": storage.display_name(path.relative_to(folder))}
                row["error" if isinstance(answer, UserError) else "answer"] = str(answer)
                failed += isinstance(answer, UserError)
                line = json.dumps(row, ensure_ascii=False)
                print(line, flush=True)
                file.write(f"{line}\n")
            file.flush()
            bar.update(len(part))
    if failed == len(videos):
        raise UserError(f"--video={folder}: none of {count(failed, 'video')} was answered: {line}")
    _tell(f"{count(len(videos) - failed, 'answer')}, {failed} failed, in {file.name}")
    return 0


def _open_answers(out: Path) -> TextIO:
    """The file for answers. Raises UserError if it cannot be written."""
    try:
        return (out / ANSWERS).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror or error}") from error


def _answers(
    chat: Chat, videos: Sequence[Path], options: Options, batch_size: int
) -> list[str | UserError]:
    """The answer about each of up to `batch_size` videos, or why there is none."""
    budget, frames, side = chat.setting(options.tokens)
    clips = np.zeros((batch_size, frames, side, side, 3), np.uint8)
    asked: list[FirstQuestion | None] = [None] * batch_size
    times: list[np.ndarray | None] = [None] * batch_size
    errors: dict[int, UserError] = {}
    for row, path in enumerate(videos):
        try:
            clip, message = chat.read(path, options.tokens)
        except UserError as error:
            errors[row] = error
        else:
            clips[row], times[row] = clip.frames, clip.times
            asked[row] = FirstQuestion(options.question, message=message)
    found = chat.ask_each(clips, asked, budget, times=times)
    return [errors.get(row, found[row]) for row in range(len(videos))]


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
