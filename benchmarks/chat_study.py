"""Video chat on the demo's clips, end to end: answers about unseen photographs, several seeds.

    python -m benchmarks.chat_study --out=demo/chat_study [--clips=demo/clips] [--seeds=3]

A tiny language model is trained on texts alone (benchmarks/chat_decoder.py). For each seed, two
networks of one size are trained on the demo's classes: Flux-Multi, and one the ordinary way (a
fixed grid, every token). Between each of them and the language model, both frozen, a projector
learns to answer one question (configs/demo_chat.py): of Flux-Multi at three budgets in one run, of
the other on its grid. Answers about the validation clips are asked for at three budgets: on a plain
grid of just as many tokens, and, of Flux-Multi, on the demo's grids with selection ("+ TO").
Finished runs are kept, so the study can be stopped and started again. About half an hour a seed on
two idle cores, estimated; less with --networks, which takes those of benchmarks.method_study or
benchmarks.clip_study. --smoke runs all of it on a few clips in three minutes, and learns nothing.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fluxvit_jax
from benchmarks import chat_decoder
from benchmarks.clip_study import ROWS, Row
from benchmarks.demo import data_flags, run
from benchmarks.study import train
from fluxvit_jax.data.synthetic_captions import SPEEDS, WAYS
from fluxvit_jax.recipes import demo
from fluxvit_jax.reports.confidence_intervals import (
    Interval,
    mean_interval,
    paired_difference,
    share_interval,
)

QUESTION = "What moves, and which way?"
DECODER_STEPS = 400
ANSWER_TOKENS = 32
TURNS = ("clockwise", "counterclockwise")
SPEED_WORDS = tuple(words[0] for words in SPEEDS.values())  # of the first phrasing
# What is scored: all of an answer, what moves and how, which way, and how fast.
PARTS = ("whole answer", "event", "direction", "speed")
# Expected minutes of the study's parts, for the time that is left.
MINUTES = {"clips": 1, "decoder": 4, "network": 5, "projector": 6, "answers": 2}

Answers = dict[str, dict[str, str]]  # budget -> video -> answer


class Progress:
    """Prints what is done next, and about how long all of it still takes."""

    def __init__(self, parts: Sequence[str]):
        self._total, self._done, self._begin = sum(MINUTES[part] for part in parts), 0, time.time()

    def next(self, part: str, what: str) -> None:
        spent = (time.time() - self._begin) / 60
        left = self._total - self._done
        expected = left * (spent / self._done if self._done else 1)
        print(f"== {what}; {spent:.0f} min so far, about {expected:.0f} to go", flush=True)
        self._done += MINUTES[part]


def main() -> int:
    options = parse()
    methods = list(dict.fromkeys(row.method for row in ROWS))
    per_seed = ["network", "projector"] * len(methods) + ["answers"] * len(ROWS)
    progress = Progress(["clips", "decoder", *per_seed * options.seeds])
    progress.next("clips", "clips")
    few = ["--train=48", "--validation=12"] if options.smoke else []
    run("fluxvit_jax.data.synthetic", f"--out={options.clips}", *few)
    progress.next("decoder", "language model, on texts alone")
    conversations, decoder = make_conversations(options), make_decoder(options)
    answers: dict[str, list[Answers]] = {row.name: [] for row in ROWS}
    for seed in range(options.seeds):
        for method in methods:
            progress.next("network", f"network, {method}, seed {seed}")
            network = make_network(method, seed, options)
            progress.next("projector", f"projector, {method}, seed {seed}")
            train(
                options.out / f"chat-{method}-{seed}",
                f"configs/demo_chat.py:{method},seed={seed}",
                f"--config.data.train={conversations}",
                f"--config.data.root={options.clips}",
                f"--config.train.init_from={network}",
                f"--config.chat.llm={decoder}",
                *(["--config.train.epochs=2"] if options.smoke else []),
            )
        for row in ROWS:
            progress.next("answers", f"answers, {row.name}, seed {seed}")
            chat = options.out / f"chat-{row.method}-{seed}"
            answers[row.name].append(ask(chat, row, options.clips))
        report(answers, options)
    print((options.out / "study.md").read_text())
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chat_study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("demo/chat_study"), help="of the runs")
    parser.add_argument("--clips", type=Path, help="the demo's clips (default: demo/clips)")
    parser.add_argument("--seeds", type=int, help="runs of each row (default: 3)")
    parser.add_argument("--networks", type=Path, help="--out of a method_study or clip_study")
    parser.add_argument("--smoke", action="store_true", help="all of it on a few clips")
    options = parser.parse_args()
    options.clips = options.clips or (options.out if options.smoke else Path("demo")) / "clips"
    options.seeds = options.seeds or (1 if options.smoke else 3)
    return options


# ---------------------------------------------------------------------------------------------
# What is trained


def make_network(method: str, seed: int, options: argparse.Namespace) -> Path:
    """The workdir of a trained network: an earlier study's, or this one's."""
    name = f"{method}-seed-{seed}"
    if options.networks and (options.networks / name / "finished").exists():
        return options.networks / name
    short = ["--config.train.epochs=2", "--config.eval.every_epochs=2"] if options.smoke else []
    recipe = f"configs/demo.py:{method},seed={seed}"
    train(options.out / name, recipe, *data_flags(options.clips), *short)
    return options.out / name


def make_conversations(options: argparse.Namespace) -> Path:
    """The list of the training clips' conversations."""
    path = options.out / "conversations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(conversations_of(captions_of(options.clips, "train")), indent=0))
    return path


def conversations_of(captions: Mapping[str, Sequence[str]]) -> list[dict]:
    """Items of a list: the question about each video, and the first caption as the answer."""
    return [
        {
            "video": video,
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": texts[0]},
            ],
        }
        for video, texts in captions.items()
    ]


def make_decoder(options: argparse.Namespace) -> Path:
    """The folder of the language model, which all seeds share."""
    folder = options.out / "decoder"
    if not (folder / "config.json").exists():  # which is written last
        answers = [texts[0] for texts in captions_of(options.clips, "train").values()]
        steps = 20 if options.smoke else DECODER_STEPS
        chat_decoder.write_decoder(folder, QUESTION, answers, steps)
    return folder


def captions_of(clips: Path, split: str) -> dict[str, list[str]]:
    """Video -> its captions, of a split of the demo's clips."""
    entries = json.loads((clips / f"{split}_captions.json").read_text())
    found = {}
    for entry in entries:
        videos = entry["video"] if isinstance(entry["video"], list) else [entry["video"]]
        found |= dict.fromkeys(sorted(videos), entry["caption"])
    return found


# ---------------------------------------------------------------------------------------------
# What is asked


def ask(workdir: Path, row: Row, clips: Path) -> Answers:
    """A run's answers about the validation clips at a row's settings; kept beside the run."""
    settings = "-".join(f"{frames}x{pixels}" for _, frames, pixels in row.settings)
    path = workdir / f"answers-{settings}.json"
    if path.exists():
        return json.loads(path.read_text())
    chat = fluxvit_jax.load_chat(workdir)
    chat.settings = list(row.settings)
    videos = captions_of(clips, "validation")
    answers: Answers = {}
    for budget, *_ in row.settings:
        answers[str(budget)] = {
            video: chat.ask(clips / video, QUESTION, budget, ANSWER_TOKENS)
            for video in tqdm(videos, f"{row.name}, {budget} tokens", mininterval=5)
        }
    path.write_text(json.dumps(answers, indent=1))
    return answers


def meaning_of(text: str) -> dict[str, str]:
    """The parts of a caption's first phrasing, or of an answer, by `PARTS`."""
    words = text.split()
    ways, speeds = (
        [word for word in words if word in known] for known in ((*WAYS, *TURNS), SPEED_WORDS)
    )
    event = [word for word in words if word not in ways + speeds]
    parts = (text.strip(), " ".join(event), " ".join(ways), " ".join(speeds))
    return dict(zip(PARTS, parts, strict=True))


def hits(
    answers: Mapping[str, str], captions: Mapping[str, Sequence[str]], part: str
) -> list[bool]:
    """Of which videos a part of the answer is right, in the order of `captions`.

    Videos whose caption lacks the part, as a zoom's lacks a direction, are left out.
    """
    pairs = [
        (meaning_of(answers[video])[part], meaning_of(texts[0])[part])
        for video, texts in captions.items()
    ]
    return [own == true for own, true in pairs if true]


def chance(
    training: Mapping[str, Sequence[str]], captions: Mapping[str, Sequence[str]], part: str
) -> float:
    """The share that is right if the commonest part of the training captions is always said."""
    said, true = (
        [own for texts in split.values() if (own := meaning_of(texts[0])[part])]
        for split in (training, captions)
    )
    return true.count(Counter(said).most_common(1)[0][0]) / len(true)


# ---------------------------------------------------------------------------------------------
# The table


def report(answers: Mapping[str, Sequence[Answers]], options: argparse.Namespace) -> None:
    """Writes study.md: shares (%) with 95 % intervals, and paired differences of the methods."""
    captions = captions_of(options.clips, "validation")
    training = captions_of(options.clips, "train")
    budgets = [str(budget) for budget in demo.BUDGETS]
    seeds = min(map(len, answers.values()))
    lines = [
        f"{len(captions)} clips of unseen photographs, {seeds} seed(s). Chance: always saying the "
        "commonest answer of the training clips, or its commonest part.",
        "",
        "| Right (%) | | " + " | ".join(f"{b} tokens" for b in budgets) + " | chance |",
        "|---" * (len(budgets) + 3) + "|",
    ]
    for part in PARTS:
        right = {
            name: [np.array([hits(own[b], captions, part) for own in runs]) for b in budgets]
            for name, runs in answers.items()
        }
        guess = f"{100 * chance(training, captions, part):.1f}"
        for name, values in right.items():
            lines.append(f"| {part} | {name} | {' | '.join(map(share, values))} | {guess} |")
        base, *others = right.values()
        for name, values in zip(list(right)[1:], others, strict=True):
            cells = " | ".join(map(difference, values, base))
            lines.append(f"| {part} | difference: {name} | {cells} | |")
    (options.out / "study.md").write_text("\n".join(lines) + "\n")


def share(right: np.ndarray) -> str:
    """Percentage of answers that are right, bool [seeds, videos], with its interval over videos."""
    seeds, videos = right.shape
    if seeds == 1:
        interval = share_interval(int(right.sum()), videos)
    else:
        interval = mean_interval(right.mean(axis=0))
    return _cell(float(right.mean()), interval)


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Points by which a is above b, bool [seeds, videos], over the same videos."""
    if len(a) == 1:
        return _cell(*paired_difference(a[0], b[0]), sign="+")
    values = a.mean(axis=0) - b.mean(axis=0)
    return _cell(float(values.mean()), mean_interval(values), sign="+")


def _cell(value: float, interval: Interval, sign: str = "") -> str:
    low, high = interval
    return f"{100 * value:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


if __name__ == "__main__":
    sys.exit(main())
