"""`--mode=evaluate` of a classifier: its table, and the files that people and programs read."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.weights import EVALUATION
from fluxvit_jax.data.class_names import numbered
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.splits import check_same_videos
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import raise_on_all_hosts
from fluxvit_jax.distributed.mesh import host_index, make_mesh
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.evaluate import Evaluation, evaluate
from fluxvit_jax.evaluation.finite import check_measured
from fluxvit_jax.evaluation.results import SUFFIX
from fluxvit_jax.evaluation.settings import Setting, planned_or_given
from fluxvit_jax.evaluation.trained_weights import Weights, check_class_names, open_named
from fluxvit_jax.evaluation.unreadable import check_readable, describe_failures, first_of
from fluxvit_jax.training.train_state import check_params_divide

NAME_LENGTH = 40  # letters of the data's name in the name of a report


def opened_validation(
    config: ConfigDict, loaded: Weights
) -> tuple[Source, Mesh, tuple[str, ...] | None]:
    """The videos of `data.validation`, the devices, and the class names, after all checks.

    Raises UserError as `run_weights`, on all hosts.
    """
    with raise_on_all_hosts():
        source = open_named(config, "data.validation", loaded)
        mesh = make_mesh(config)
        check_params_divide(config, mesh)
        check_readable(source, config.data.validation, config)
        names = check_class_names(config, loaded, {"data.validation": source})
    check_same_videos(validation=source)
    return source, mesh, names


def run_weights(config: ConfigDict, loaded: Weights, folder: epath.Path) -> int:
    """Evaluates weights on `data.validation`; prints a table.

    Writes `evaluation/NAME.json` and `evaluation/NAME.predictions.jsonl` of the folder, see
    `report_name`, and the page, tables and picture of `report.write`. `eval.plan` replaces the
    settings by those that a search chose: Token Optimization, the paper's "+TO".

    Returns the exit status, 0. Raises UserError: no videos, none that can be read, other class
    names, a plan of other weights, weights that give no finite numbers.
    """
    source, mesh, names = opened_validation(config, loaded)
    settings = planned_or_given(config, loaded.params)
    say(f"evaluating {loaded.origin} on {len(source)} videos")
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        evaluation = evaluate(
            loaded.params,
            config,
            source,
            mesh,
            settings=settings,
            after_batch=watchdog.alive,
            measure_calibration=not config.train.multi_label,
        )
    assert evaluation is not None  # nothing stops it
    tell(evaluation, report_name(config, source, settings, loaded), config, loaded, folder, names)
    return 0


def tell(
    evaluation: Evaluation,
    name: str,
    config: ConfigDict,
    loaded: Weights,
    folder: epath.Path,
    names: Sequence[str] | None,
) -> None:
    """Prints the table of an evaluation, and writes its files; host 0 does.

    name: of the files in the folder's `evaluation`; names: of the classes, if known.

    Raises UserError, on all hosts, if the network gave no finite numbers.
    """
    for budget, row in evaluation.report["budgets"].items():
        check_measured(row["loss"], loaded.origin, f"at budget {budget}")
    if host_index() != 0:
        return
    path = folder / EVALUATION / f"{name}.json"
    about = {"data": config.data.validation, "plan": config.eval.plan or None}
    about |= {"selector": config.model.selector.to_dict(), "dtype": config.model.dtype}
    about |= {"class_names": list(names or numbered(config.model.classes))}
    print(evaluation.table())  # before what may fail
    page = write(evaluation, path, {"checkpoint": loaded.origin} | about)
    failures, warning = evaluation.report["failures"], evaluation.report["warning"]
    if failures and not warning:
        print(describe_failures(len(failures), len(evaluation.predictions), first_of(failures)))
    print(f"written to {path} and {page.name}")
    if warning:
        print(f"warning: {warning}")


def write(evaluation: Evaluation, path: epath.Path, about: dict[str, Any]) -> epath.Path:
    """Writes a report with `about` in front, `NAME.predictions.jsonl` and what people look at.

    Returns the path of the page, see `report.write`.
    """
    # Importing matplotlib takes a second, and validation on the way draws nothing.
    from fluxvit_jax.evaluation import report

    storage.make_folder(path.parent)
    lines = [json.dumps(prediction) + "\n" for prediction in evaluation.predictions]
    predictions = path.with_suffix(SUFFIX)
    atomic.write(predictions, "".join(lines))
    atomic.write(path, json.dumps(about | evaluation.report, indent=1) + "\n")
    return report.write(predictions)


def report_name(
    config: ConfigDict,
    source: Source,
    settings: Sequence[Setting],
    loaded: Weights,
    cascade: str = "",
) -> str:
    """The name of a report's file, such as "lists-val-0a1b2c3d", of a plan "lists-val-plan-...".

    It begins with the folder and the name of the data. The digits are a hash of everything that
    tells evaluations of a workdir apart: path and content of the data, views, settings, selection
    of tokens, and weights from outside the workdir. So an evaluation replaces only its own report.

    cascade: all that tells it from others, if one is evaluated.
    """
    words, path = report_words(config.data.validation), config.data.validation
    about = {
        "data": path if storage.is_remote(path) else os.path.abspath(path),
        "videos": source.fingerprint,
        "views": str(views_of(config)),
        "settings": settings,
        "model": [config.model.selector.to_dict(), config.model.dtype, config.seed],
        "weights": loaded.origin if loaded.trained is None else "",
    }
    classifier = loaded.params.get(zero_shot.CLASSIFIER)
    if classifier is not None:  # of texts
        about["classes"] = hashlib.sha256(classifier["classes"].tobytes()).hexdigest()
    if cascade:
        about["cascade"] = cascade
    digits = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    plan = "cascade" if cascade else "plan" if config.eval.plan else ""
    kinds = (plan, "zero_shot" if classifier is not None else "")
    return "-".join(filter(None, (words, *kinds, digits)))


def report_words(data: str) -> str:
    """The folder and the name of a list or folder, for the name of a file."""
    path = storage.path_of(data)
    if not storage.is_remote(path):
        path = epath.Path(os.path.abspath(path))
    name = path.stem if path.is_file() else path.name
    return re.sub(r"[^\w.]+", "-", f"{path.parent.name}-{name}")[-NAME_LENGTH:].strip("-.")
