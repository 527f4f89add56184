"""Files and folders of weights, read and written.

    a folder                config.json, model.safetensors, preprocessor_config.json, README.md
    a .safetensors file     official names; ours name their config in the metadata
    a .pth file             as the official code and DeepSpeed write it; likewise

Whatever the form, the result is the same: tensors under their official names, in the dtype of the
file, and their network. Nothing fits by accident: tensors that are missing, unexpected or of the
wrong shape are refused unless they are named as allowed. `checkpoints.weights` reads workdirs too.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from fluxvit_jax.convert import config_json, official_names
from fluxvit_jax.convert.config_json import PretrainedConfig
from fluxvit_jax.convert.model_card import model_card
from fluxvit_jax.convert.torch_pickle import read_pth
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"
EVALUATIONS = "evaluations.json"
WEIGHTS = "model.safetensors"
CLIP = "clip.safetensors"  # beside it, of Flux-CLIP; see `clip_parts`
NETWORK = "torch_fluxvit.py"  # goes along, so that PyTorch can run the folder without us
RUN = "checkpoints"  # folder by which a workdir is told
EMBEDDED = "fluxvit_jax"  # where a single file keeps both configs, as JSON
PTH = (".pth", ".pt", ".bin")
# Fields of a report that an `EVALUATIONS` holds, and "multi_label".
PUBLISHED = {"data", "dataset", "views", "class_names", "budgets", "failures"}
# Of wrappers around the network: DistributedDataParallel, the official code's stages.
PREFIXES = ("module.", "backbone.", "encoder.", "vision_encoder.")


class Pretrained(NamedTuple):
    """Weights and the network they belong to.

    state: official name -> array, in the dtype of the file.
    notes: a line for each thing that was allowed and found.
    evaluations: reports of `--mode=evaluate` that are of these weights, the newest last, for the
        model card and for temperatures.
    """

    state: dict[str, np.ndarray]
    config: PretrainedConfig
    notes: tuple[str, ...] = ()
    evaluations: tuple[dict[str, Any], ...] = ()

    def params(self, dtype: np.dtype | type | None = None) -> dict[str, Any]:
        """Our nested parameter tree, in another dtype if one is given."""
        tree = official_names.from_official(self.state, self.config.model.heads)
        return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


class FoundWeights(NamedTuple):
    """What a form holds, before anything is made of it; evaluations: see `Pretrained`."""

    state: dict[str, np.ndarray]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...] = ()


# ---------------------------------------------------------------------------------------------
# Reading


def complete(
    found: FoundWeights,
    source: storage.PathLike,
    config: Mapping[str, Any] | None = None,
    default: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Pretrained:
    """The weights that were found in `source`, checked, and their network.

    Arguments and errors: see `checkpoints.weights.read_weights`.
    """
    given = {**found.config, **(config or {})}
    state, notes = dict(found.state), []
    for name in official_names.unexpected(state):
        if is_named(name, allow_unexpected):
            del state[name]
            notes.append(f"{source}: {name} is left out")
    lacking = official_names.missing(state)
    if not all(is_named(name, allow_missing) for name in lacking):
        _check(state, source)
    described = config_json.describe(state, given, found.preprocessor, str(source), default)
    if not found.config and "id2label" not in given:  # we write no weights without a config
        described = config_json.assume_names(described)
    if lacking:
        fresh = _fresh(described)
        state |= {name: fresh[name].astype(_dtype_of(state)) for name in lacking}
        notes += [f"{source}: {name} is missing and starts afresh" for name in lacking]
    _check(state, source)
    changes = {*config_json.BEHAVIOUR, "groups"}.intersection(config or {})
    as_measured = not lacking and not changes
    evaluations = found.evaluations if as_measured else ()
    return Pretrained(state, described, tuple(notes), evaluations)


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file.

    Raises UserError if there is no such file or it holds something else.
    """
    try:
        values = storage.parse_json(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is JSON, but no object")
    return values


def find(source: Path) -> FoundWeights:
    """What a folder or a file of weights holds. Raises UserError if that cannot be read."""
    if storage.is_remote(source):
        raise UserError(f"{source}: of a bucket, only a workdir can be read; copy it here")
    if source.is_dir():
        return _find_folder(source)
    found = _find_file(source)
    return found._replace(state=_without_prefixes(found.state, source))


def _find_file(source: Path) -> FoundWeights:
    if not source.exists():
        raise UserError(f"{source}: there are no weights: no such file or folder")
    tensors, texts = _reader(source)(source)
    try:
        embedded = storage.parse_json(texts.get(EMBEDDED, "{}"))
        config, preprocessor = embedded.get("config", {}), embedded.get("preprocessor", {})
    except (ValueError, AttributeError) as error:
        raise UserError(f"{source}: the config it carries is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(preprocessor, dict):
        raise UserError(f"{source}: the config it carries is damaged: it is no object")
    return FoundWeights(tensors, config, preprocessor)


def _find_folder(folder: Path) -> FoundWeights:
    tensors, _ = read_safetensors(folder / WEIGHTS)
    config, preprocessor = (
        read_config(folder / name) if (folder / name).exists() else {}
        for name in (CONFIG, PREPROCESSOR)
    )
    return FoundWeights(
        _without_prefixes(tensors, folder), config, preprocessor, _read_evaluations(folder)
    )


def _read_evaluations(folder: Path) -> tuple[dict[str, Any], ...]:
    """What `_write_evaluations` wrote; UserError if the file holds something else."""
    path = folder / EVALUATIONS
    reports = read_config(path).get("evaluations") if path.exists() else []
    if not isinstance(reports, list) or not all(
        isinstance(report, dict) and report.keys() >= PUBLISHED for report in reports
    ):
        raise UserError(f"{path}: holds no evaluations; the folder can do without the file")
    return tuple(reports)


def read_tensors(source: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file, or of a folder's model.safetensors, as they are named there.

    Beside them the config that goes with them, as far as there is one.

    Raises UserError: there are none, or they are damaged.
    """
    source = Path(source)
    if not source.is_dir():
        found = _find_file(source)
        return dict(found.state), found.config
    if not (source / WEIGHTS).exists():
        raise UserError(f"{source}: a folder without {WEIGHTS}")
    config = read_config(source / CONFIG) if (source / CONFIG).exists() else {}
    return read_safetensors(source / WEIGHTS)[0], config


def _reader(path: Path) -> Callable[[Path], tuple[dict[str, np.ndarray], dict[str, str]]]:
    if path.suffix == ".safetensors":
        return read_safetensors
    if path.suffix in PTH:
        return read_pth
    raise UserError(f"{path}: is neither {', '.join(PTH)} nor .safetensors, a folder or a workdir")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a file. Raises UserError if it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as .safetensors: {error}") from error


def _without_prefixes(tensors: Mapping[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    state: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        bare = name
        while prefix := next((p for p in PREFIXES if bare.startswith(p)), ""):
            bare = bare.removeprefix(prefix)
        if bare in state:
            raise UserError(f"{source}: {bare} is there twice, once as {name}")
        state[bare] = tensor
    return state


def _check(state: Mapping[str, np.ndarray], source: storage.PathLike) -> None:
    try:
        official_names.check(state)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def is_named(name: str, allowed: Sequence[str]) -> bool:
    """Whether a tensor is one of those allowed, by its name or its beginning up to a dot."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _fresh(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """The tensors of a network that was never trained, under their official names."""
    params = fluxvit.init_params(config.model, jax.random.key(0))
    return official_names.to_official(jax.tree.map(np.asarray, params))


def _dtype_of(state: Mapping[str, np.ndarray]) -> np.dtype:
    return next(iter(state.values())).dtype


# ---------------------------------------------------------------------------------------------
# Writing


def write(pretrained: Pretrained, target: str | os.PathLike) -> None:
    """Writes weights as .safetensors or .pth, by the suffix of `target`, or as a folder.

    Each file is there whole or not at all; files of these names are replaced.

    Raises UserError: the place cannot be written, or is the workdir of a run, or .pth is asked for
    without PyTorch installed.
    """
    target = place(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".safetensors":
            _write_safetensors(pretrained, target)
        elif target.suffix in PTH:
            _write_pth(pretrained, target)
        else:
            _write_folder(pretrained, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error


def place(target: str | os.PathLike) -> Path:
    """Where weights are to be written.

    Raises UserError for a bucket, and for a workdir: its config.json would be replaced, and the run
    could not go on.
    """
    if storage.is_remote(target):
        raise UserError(f"{os.fspath(target)}: weights are written on this machine; copy them then")
    path = Path(target)
    if (path / RUN).exists():
        raise UserError(f"{path}: is the workdir of a run; write into another folder")
    return path


def _write_folder(pretrained: Pretrained, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CLIP).unlink(missing_ok=True)  # of the weights that were here
    _write_safetensors(pretrained, folder / WEIGHTS)
    for name, content in _configs(pretrained.config).items():
        text = json.dumps(content, indent=2) + "\n"
        replace(folder / (CONFIG if name == "config" else PREPROCESSOR), _writer(text))
    card = model_card(pretrained.state, pretrained.config, pretrained.evaluations)
    replace(folder / CARD, _writer(card))
    _write_evaluations(pretrained.evaluations, folder / EVALUATIONS)
    replace(folder / NETWORK, lambda path: shutil.copyfile(Path(__file__).parent / NETWORK, path))


def _write_evaluations(evaluations: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy and calibration, without what only concerns this machine: paths, names of videos."""
    reports: list[dict[str, Any]] = []
    for report in evaluations:
        if report.keys() >= PUBLISHED and "task" not in report:  # of accuracy at each budget
            data = os.path.basename(str(report["data"]).rstrip("/"))
            failures: list[dict] = [{} for _ in report["failures"]]
            own = {name: report[name] for name in sorted(PUBLISHED)}
            several = {name: report[name] for name in ("multi_label",) if name in report}
            reports.append(own | several | {"data": data, "failures": failures})
    if reports:
        replace(path, _writer(json.dumps({"evaluations": reports}, indent=1) + "\n"))
    else:
        path.unlink(missing_ok=True)  # of the weights that were here


def _writer(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text, "utf-8")


def _write_safetensors(pretrained: Pretrained, path: Path) -> None:
    write_tensors(pretrained.state, _configs(pretrained.config), path)


def write_tensors(state: Mapping[str, np.ndarray], configs: Mapping[str, Any], path: Path) -> None:
    """A .safetensors file that carries configs; OSError if it cannot be written."""
    # "format" is what the loaders of PyTorch and Transformers look for.
    texts = {"format": "pt", EMBEDDED: json.dumps(configs)}

    def save(new: Path) -> None:
        try:
            safetensors.numpy.save_file(dict(state), new, metadata=texts)
        except safetensors.SafetensorError as error:  # its kind of OSError
            raise OSError(error) from error

    replace(path, save)


def _write_pth(pretrained: Pretrained, path: Path) -> None:
    more = {EMBEDDED: json.dumps(_configs(pretrained.config))}
    write_torch_tensors(pretrained.state, path, more)


def write_torch_tensors(
    state: Mapping[str, np.ndarray], path: Path, more: Mapping[str, str] | None = None
) -> None:
    """A file of `torch.save` with tensors, below "model" if there is more.

    Raises UserError without PyTorch; OSError if it cannot be written.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: writing it needs PyTorch (pip install torch); .safetensors does not"
        ) from None

    def tensor(array: np.ndarray) -> "torch.Tensor":
        if array.dtype == ml_dtypes.bfloat16:  # unknown to torch.from_numpy
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    weights = {name: tensor(array) for name, array in state.items()}

    def save(new: Path) -> None:
        with new.open("wb") as file:
            try:
                torch.save({"model": weights, **more} if more else weights, file)
            except RuntimeError as error:  # on top of what the file has raised
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    replace(path, save)


def _configs(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    return {
        "config": config_json.to_json(config),
        "preprocessor": config_json.preprocessor_json(config),
    }


def replace(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Has a file written whole or not at all, in place of the one that is there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write_to(unfinished)
        unfinished.chmod(mode)  # safetensors leaves a file that nobody else may read
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
