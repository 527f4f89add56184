"""Accuracy at every token budget: `--mode=evaluate`, and the validation inside a training run.

Every video counts once, whatever the batch size and the number of devices or hosts. Its views
(temporal clips x spatial crops) go through the network one view of a batch at a time, so that
`eval.batch_size` clips are on the devices at once; the probabilities are averaged over the views.
A video that cannot be read is named with its reason and counts as wrong.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax import (
    atomic,
    checkpoint,
    distributed,
    parallel,
    planner,
    sharding,
    storage,
    weights,
)
from fluxvit_jax.budgets import PATCH, Grid, kept_tokens, nearest_head
from fluxvit_jax.config import flatten, model_config
from fluxvit_jax.data.annotations import Source, open_source
from fluxvit_jax.data.pipeline import evaluation_batches
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.selection import NOISY_SELECTORS
from fluxvit_jax.objectives.distillation import DECODERS
from fluxvit_jax.state import abstract_params

FOLDER = "evaluation"
PREDICTIONS = "predictions.jsonl"
TOP = 5  # classes that a prediction names
DIGITS = 6  # of the probabilities that are kept


class Setting(NamedTuple):
    """How a network is asked: a budget, the grid that it chooses its tokens from, and the head."""

    budget: int
    grid: Grid
    head: int


class Evaluation(NamedTuple):
    """What an evaluation finds.

    report: {"dataset", "views", "budgets", "failures"}, as in a workdir's `evaluation/*.json`;
        "top1" and "top5" are shares of all videos, those that failed included.
    predictions: a dict a video, {"id", "label", "predictions": {budget: [[class, probability],
        ...]}}, likeliest first; {"id", "label", "failure"} where it could not be read.
    """

    report: dict[str, Any]
    predictions: list[dict[str, Any]]

    def scalars(self) -> dict[str, float]:
        """{"top1_1024": .., "top5_1024": .., ..., "failed": ..} for the metrics."""
        budgets = self.report["budgets"].items()
        named = {f"{k}_{budget}": own[k] for budget, own in budgets for k in ("top1", "top5")}
        return named | {"failed": len(self.report["failures"])}

    def table(self) -> str:
        """A line a budget, in columns."""
        lines = ["budget  frames  resolution  tokens  head   top-1   top-5"]
        for budget, own in self.report["budgets"].items():
            lines.append(
                f"{budget:>6}  {own['frames']:>6}  {own['resolution']:>7} px  {own['tokens']:>6}  "
                f"{own['head']:>4}  {own['top1']:>6.2%}  {own['top5']:>6.2%}"
            )
        return "\n".join(lines)


def settings_of(config: ConfigDict) -> list[Setting]:
    """`eval.settings`, each with the head that was trained at the nearest budget."""
    return [
        Setting(budget, Grid.square(*size), nearest_head(budget, config.train.budgets))
        for budget, *size in config.eval.settings
    ]


def evaluate(
    params: dict,
    config: ConfigDict,
    source: Source,
    mesh: Mesh | None = None,
    stop: Callable[[], bool] = lambda: False,
    settings: Sequence[Setting] = (),
) -> Evaluation | None:
    """Accuracy of `params` on the videos of `source`.

    Args:
        params: the network's parameters, on the devices or as numpy arrays.
        mesh: the devices; all of them by default.
        settings: of different budgets; by default those of `eval.settings`.
        stop: asked after each batch; once it says True, evaluation ends and None is returned.

    Raises:
        UserError: there are no videos, or too little shared memory.
    """
    if not len(source):
        raise UserError("config.data.validation: there are no videos to evaluate on")
    mesh = mesh or parallel.make_mesh(config)
    params = parallel.place(params, sharding.shardings(params, mesh))
    settings = settings or settings_of(config)
    model = model_config(config, parallel.platform_of(mesh))
    programs = [predictor(model, setting, config.seed, mesh) for setting in settings]
    batch_size = parallel.filled(config.eval.batch_size, mesh)
    batches = evaluation_batches(
        config,
        source,
        [setting.grid for setting in settings],
        batch_size=batch_size,
        rows=parallel.own_rows(mesh, batch_size),
    )
    found = []
    with batches, progress_bar(len(source), desc="evaluating", unit="video") as bar:
        for batch in batches:
            likeliest = [
                top
                for k, program in enumerate(programs)
                for top in classify([program], params, batch["video"], batch[f"patches{k}"], mesh)
            ]
            own = [
                {
                    "number": int(number),
                    "id": str(batch["id"][row]),
                    "label": int(batch["label"][row]),
                    "failure": str(batch["failure"][row]),
                    "top": [top[row] for top in likeliest],
                }
                for row, number in enumerate(batch["video"])
                if number >= 0
            ]
            found += own
            bar.update(min(batch_size, len(source) - bar.n))
            if stop():
                return None
    # Hosts whose devices share clips have seen the same videos.
    by_number = {video["number"]: video for video in parallel.gather(found)}
    found = [by_number[number] for number in sorted(by_number)]
    return Evaluation(_report(config, source, settings, found), _predictions(settings, found))


@functools.cache
def predictor(model: FluxViTConfig, setting: Setting, seed: int, mesh: Mesh) -> Callable:
    """The one compiled program of a setting: adds a view's probabilities to those before.

    `add_view(params, total [b, classes], patches uint8 [b, P, 588], video int32 [b], view int32)`,
    the arrays of a batch cut over the devices. Selectors that draw their scores do so by seed,
    video and view alone.
    """
    graph = fluxvit.structure(model)

    def add_view(params, total, patches, video, view):
        network = fluxvit.merge(graph, fluxvit.for_passes(params, model))
        patches = fluxvit.normalise(patches, jnp.dtype(model.dtype))
        keys = None
        if model.selector in NOISY_SELECTORS:
            view_key = jax.random.fold_in(jax.random.key(seed), view)
            keys = jax.vmap(lambda number: jax.random.fold_in(view_key, number))(video)
        answer = network.on_grid(patches, setting.grid, setting.budget, setting.head, keys)
        return total + jax.nn.softmax(answer.logits)

    everywhere, cut = parallel.replicated(mesh), parallel.by_clip(mesh)
    return jax.jit(
        parallel.on_mesh(add_view, mesh),
        in_shardings=(None, cut, cut, cut, everywhere),  # parameters lie as they come
        out_shardings=cut,
        compiler_options=parallel.compiler_options(mesh),
    )


def classify(
    programs: Sequence[Callable],
    params: dict,
    video: np.ndarray,
    patches: np.ndarray,
    mesh: Mesh,
) -> list[list[list[tuple[int, float]]]]:
    """The likeliest classes by the mean over a host's views, for each program and video.

    programs: of settings of one grid, from `predictor`; video: int [b], numbers of the videos;
    patches: uint8 [b, V, P, 588], of the host's rows (`parallel.own_rows`).
    Returns, likeliest first, (class, probability) of `TOP` classes.
    """
    b, views = patches.shape[:2]
    classes = params["heads"]["bias"].shape[-1]
    start = {"total": np.zeros((b, classes), np.float32), "video": video.astype(np.int32)}
    placed = parallel.put(start, mesh)
    totals = before = [placed["total"]] * len(programs)
    for view in range(views):
        part = parallel.put({"patches": patches[:, view]}, mesh)["patches"]
        jax.block_until_ready(before)  # two views on the devices, not all of them
        before = totals
        totals = [
            program(params, total, part, placed["video"], np.int32(view))
            for program, total in zip(programs, totals, strict=True)
        ]
    return [_likeliest(parallel.local_rows(total) / views) for total in totals]


def _likeliest(probabilities: np.ndarray) -> list[list[tuple[int, float]]]:
    """The first `TOP` classes of each row, likeliest first: (class, probability)."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    return [
        [(int(c), round(float(row[c]), DIGITS)) for c in own]
        for row, own in zip(probabilities, order, strict=True)
    ]


def progress_bar(total: float, **options: Any) -> tqdm:
    """Shown by the first host: renewed in a terminal, elsewhere a line every half minute."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        leave=False,
        disable=parallel.host_index() != 0,
        mininterval=0.2 if terminal else 30,
        delay=0 if terminal else 30,
        **options,
    )


def tokens_kept(model: FluxViTConfig, grid: Grid, budget: int) -> int:
    """Tokens that a budget keeps of a grid, CLS among them where it takes one of the places."""
    inside = model.cls == "inside"
    return kept_tokens(grid, budget - inside, model.rounding) + inside


def _report(
    config: ConfigDict, source: Source, settings: Sequence[Setting], found: Sequence[dict]
) -> dict[str, Any]:
    read = [video for video in found if not video["failure"]]
    model, budgets = model_config(config), {}
    for k, (budget, grid, head) in enumerate(settings):
        classes = [[c for c, _ in video["top"][k]] for video in read]
        labels = [video["label"] for video in read]
        pairs = list(zip(labels, classes, strict=True))
        budgets[str(budget)] = {
            "frames": grid.frames,
            "resolution": grid.rows * PATCH,
            "tokens": tokens_kept(model, grid, budget),
            "head": head,
            "top1": sum(label == top[0] for label, top in pairs) / len(found),
            "top5": sum(label in top for label, top in pairs) / len(found),
            "decoded": len(read),
            "failed": len(found) - len(read),
        }
    return {
        "dataset": {"videos": len(source), "fingerprint": source.fingerprint},
        "views": f"{config.eval.clips}x{config.eval.crops}",
        "budgets": budgets,
        "failures": [
            {"id": video["id"], "reason": video["failure"]} for video in found if video["failure"]
        ],
    }


def _predictions(settings: Sequence[Setting], found: Sequence[dict]) -> list[dict[str, Any]]:
    def row(video: dict) -> dict[str, Any]:
        about = {"id": video["id"], "label": video["label"]}
        if video["failure"]:
            return about | {"failure": video["failure"]}
        tops = zip(settings, video["top"], strict=True)
        return about | {"predictions": {str(setting.budget): top for setting, top in tops}}

    return [row(video) for video in found]


# ---------------------------------------------------------------------------------------------
# --mode=evaluate


def run(config: ConfigDict, workdir: str) -> int:
    """Evaluates the best checkpoint of a workdir on `data.validation`; prints a table.

    Writes `evaluation/<name of the data>.json` and `evaluation/predictions.jsonl`. A workdir
    without checkpoints takes the weights of `train.init_from`. With `eval.plan`, at the cells that
    the search chose: Token Optimization, the "+TO" of the paper.

    Returns the exit status, 0. Raises UserError: no data, no checkpoint, one of another model, a
    plan of other weights.
    """
    if not config.data.validation:
        raise UserError("no data to evaluate on: add --config.data.validation=LIST")
    with distributed.together():
        source = open_source(config.data.validation, config.data.root, config.model.classes)
        mesh = parallel.make_mesh(config)
        sharding.check(config, abstract_params(config), mesh)
    distributed.check_same_videos(validation=source)
    folder = storage.path_of(workdir)
    params, origin, _ = load_weights(config, folder)
    settings = _planned(config, params) if config.eval.plan else ()
    parallel.say(f"evaluating {origin} on {len(source)} videos")
    evaluation = evaluate(params, config, source, mesh, settings=settings)
    if parallel.host_index() == 0:
        path = write(evaluation, folder, name_of(config.data.validation), origin)
        print(evaluation.table())
        if failures := evaluation.report["failures"]:
            first = f"{failures[0]['id']}: {failures[0]['reason']}"
            print(f"{len(failures)} videos could not be read and count as wrong; {first}")
        print(f"written to {path}")
    return 0


def write(evaluation: Evaluation, workdir: epath.Path, name: str, origin: str) -> epath.Path:
    """Writes report and predictions into a workdir; returns the path of the report."""
    folder = workdir / FOLDER
    storage.make_folder(folder)
    lines = [json.dumps(prediction) + "\n" for prediction in evaluation.predictions]
    atomic.write(folder / PREDICTIONS, "".join(lines))
    path = folder / f"{name}.json"
    about = {"checkpoint": origin} | evaluation.report
    atomic.write(path, json.dumps(about, indent=1) + "\n")
    return path


def name_of(data: str) -> str:
    """A file name for a data set: "lists/val.csv" -> "val", "k400:test" -> "k400-test"."""
    path = storage.path_of(data)
    return (path.stem if path.is_file() else path.name).replace(":", "-") or "data"


def _planned(config: ConfigDict, params: dict) -> list[Setting]:
    """The cell of selection that the report `eval.plan` chose for each budget."""
    report = distributed.from_first_host(lambda: planner.read_report(config.eval.plan))
    planner.check_weights(report, params, config.eval.plan)
    cells = planner.chosen_cells(report)
    if not cells:
        raise UserError(f"{config.eval.plan}: chose no cells that select; let --mode=search finish")
    return [
        Setting(cell["budget"], Grid.square(cell["frames"], cell["resolution"]), cell["head"])
        for cell in cells
    ]


class Weights(NamedTuple):
    """Parameters, as numpy arrays, where they are from, and the config they were trained with.

    trained: of a run's checkpoint, as a nested dict; None for other weights.
    """

    params: dict
    origin: str
    trained: dict | None


def load_weights(config: ConfigDict, workdir: epath.Path) -> Weights:
    """The best checkpoint of a workdir; without any, the weights of `train.init_from`.

    Raises UserError: there are none, or they are of another network.
    """
    expected = abstract_params(config)
    if (workdir / checkpoint.FOLDER).exists() or not config.train.init_from:
        step, params, trained = checkpoint.restore(workdir)
        if DECODERS in params:
            raise UserError(
                f"{step} is pre-trained and has no classifier; fine-tune from it first: "
                f"--config.train.init_from={workdir}"
            )
        _check_same_network(trained, config, step)
        # Converted weights are kept in the dtype of the file they come from.
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
        checkpoint.check_fit(params, expected, step)
        return Weights(params, str(step.relative_to(step.parents[1])), trained)
    path = config.train.init_from
    params, _ = weights.load(path, model_config(config))
    checkpoint.check_fit(params, expected, path)
    return Weights(params, path, None)


def _check_same_network(trained: dict, config: ConfigDict, step: Any) -> None:
    """What no tensor's shape tells, but makes another network of the same weights."""
    for name in ("model.variant", "model.gelu", "model.cls", "train.budgets"):
        before, now = (json.dumps(flatten(side).get(name)) for side in (trained, config))
        if before != now:
            raise UserError(f"{step} was trained with config.{name}={before}, not {now}")
