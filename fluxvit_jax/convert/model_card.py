"""The model card, README.md, of a folder of weights: what is known of them, and was measured."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluxvit_jax.config.variants import NO_CLASSES, VARIANTS
from fluxvit_jax.convert.config_json import PretrainedConfig
from fluxvit_jax.data.class_names import DATASETS, dataset_of
from fluxvit_jax.grids import Grid

NAMED = 20  # classes that are listed
RECALLS = ("1", "5", "10")  # of retrieval


def model_card(
    state: Mapping[str, np.ndarray],
    config: PretrainedConfig,
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """The text of a card.

    state: the tensors. evaluations: the reports of `--mode=evaluate` that are of these weights.
    """
    model = config.model
    names = (n for n, v in VARIANTS.items() if (v.width, v.depth) == (model.width, model.depth))
    parameters = sum(tensor.size for tensor in state.values()) / 1e6
    grid = Grid(model.frames, model.rows, model.columns)
    title = "-".join(["FluxViT", *names])
    budgets = ", ".join(map(str, config.head_budgets))
    settings = [f"| {b} | {frames} | {side} px |" for b, frames, side in config.settings]
    return "\n".join(
        [
            *("---", "library_name: fluxvit_jax", "pipeline_tag: video-classification", "---"),
            *(f"# {title}", ""),
            "A video transformer that runs at any token budget. By `save_pretrained` or the",
            "converter of fluxvit_jax; torch_fluxvit.py beside it runs it in plain PyTorch.",
            "",
            *("| | |", "|---|---|"),
            f"| Parameters | {parameters:.1f} M |",
            f"| Width, depth, heads | {model.width}, {model.depth}, {model.heads} |",
            f"| Native grid | {grid} |",
            f"| Heads trained at | {budgets} tokens |",
            f"| Classes | {_classes(config)} |",
            *(["| Labels of a video | several: sigmoids, not a softmax |"] * config.multi_label),
            *("", "## Budgets", "", "| Tokens | Frames | Resolution |", "|---|---|---|", *settings),
            *("", "## Accuracy", ""),
            *(_accuracy(evaluations) or ["Not measured by this program."]),
            *_retrieval(evaluations),
            *("", "## Use", "", "```python", "import fluxvit_jax", ""),
            'model = fluxvit_jax.from_pretrained("FOLDER")  # or hf://OWNER/NAME',
            _example(config),
            *("```", ""),
        ]
    )


def _example(config: PretrainedConfig) -> str:
    tokens = config.asked()[-1][0]
    if config.model.classes == NO_CLASSES:
        return f'model(fluxvit_jax.read_video("a.mp4"), tokens={tokens}).pooled'
    return f'model.predict("a.mp4", tokens={tokens}, top=5)'


def _classes(config: PretrainedConfig) -> str:
    names, classes = config.class_names, config.model.classes
    if not names:
        return f"{classes}, names not known"
    if config.assumed_names:
        return f"{classes}, taken for those of {DATASETS[config.assumed_names]}"
    if dataset := dataset_of(names):
        return f"{classes}, of {DATASETS[dataset]}"
    listed = ", ".join(name.replace("|", "\\|") for name in names[:NAMED])
    return f"{classes}: {listed}{', ...' if len(names) > NAMED else ''}"


def _accuracy(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of a row for each evaluation and budget; none without evaluations.

    All evaluations are of weights with one label a video, or all of weights with several.
    """
    evaluations = [report for report in evaluations if "task" not in report]
    several = any("multi_label" in report for report in evaluations)
    measures = {"map": "mAP"} if several else {"top1": "Top-1", "top5": "Top-5"}
    heads = ["Videos", "Views", "Tokens", "Frames", "Resolution", *measures.values()]
    rows = []
    for report in evaluations:
        data = os.path.basename(str(report["data"]).rstrip("/"))
        videos = f"{report['dataset']['videos']} of {data}"
        failed = len(report["failures"])
        videos += f", {failed} unreadable" if failed else ""
        for tokens, row in report["budgets"].items():
            rows.append(
                f"| {videos} | {report['views']} | {tokens} | {row['frames']} | "
                f"{row['resolution']} px | "
                + " | ".join(f"{row[measure]:.2%}" for measure in measures)
                + " |"
            )
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows] if rows else []


def _retrieval(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of a row for each evaluation of retrieval and budget; none without evaluations."""
    heads = ["Pairs", "Tokens", "Frames", "Resolution"]
    heads += [f"{way} R@{k}" for way in ("Text to video", "Video to text") for k in RECALLS]
    rows = []
    for report in evaluations:
        if report.get("task") != "retrieval":
            continue
        pairs = f"{report['videos']} videos and {report['texts']} texts of {report['dataset']}"
        for tokens, row in report["budgets"].items():
            recalls = [
                f"{row['plain'][way]['recall'][k]:.1%}"
                for way in ("text_to_video", "video_to_text")
                for k in RECALLS
            ]
            cells = [pairs, tokens, str(row["frames"]), f"{row['resolution']} px", *recalls]
            rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]
    return ["", "## Retrieval", "", "By cosines.", "", *table]
