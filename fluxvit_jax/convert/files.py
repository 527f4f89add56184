"""Weights in every form that they are kept in, read and written.

    a workdir, or one step of it    what training leaves
    a folder                        config.json, model.safetensors, preprocessor_config.json
    a .safetensors file             official names; ours name their config in the metadata
    a .pth file                     as the official code and DeepSpeed write it; likewise

Whatever the form, what is read is the same: tensors under their official names, in the dtype they
are kept in, and the network they belong to. Nothing fits by accident: tensors that are missing,
unexpected or of the wrong shape are refused unless they are named as allowed.
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

from fluxvit_jax import storage
from fluxvit_jax.config import from_dict
from fluxvit_jax.convert import config_json, names
from fluxvit_jax.convert.config_json import PretrainedConfig
from fluxvit_jax.convert.pth import read_pth
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives.distillation import DECODERS

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
NETWORK = "torch_fluxvit.py"  # goes along, so that PyTorch can run the folder without us
CLASS_NAMES = "classes.txt"  # in a workdir
EMBEDDED = "fluxvit_jax"  # where a single file keeps both configs, as JSON
PTH = (".pth", ".pt", ".bin")
# Of wrappers around the network: DistributedDataParallel, the official code's stages.
PREFIXES = ("module.", "backbone.", "encoder.", "vision_encoder.")


class Pretrained(NamedTuple):
    """Weights and the network they belong to.

    state: official name -> array, in the dtype of the file.
    notes: a line for each thing that was allowed and found.
    """

    state: dict[str, np.ndarray]
    config: PretrainedConfig
    notes: tuple[str, ...] = ()

    def params(self, dtype: np.dtype | type | None = None) -> dict[str, Any]:
        """Our nested parameter tree, in another dtype if one is given."""
        tree = names.from_official(self.state, self.config.model.heads)
        return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


class _Found(NamedTuple):
    """What a form holds, before anything is made of it."""

    state: dict[str, np.ndarray]
    config: dict[str, Any]
    preprocessor: dict[str, Any]


# ---------------------------------------------------------------------------------------------
# Reading


def read(
    source: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    default: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Pretrained:
    """The weights in `source`, of whichever form, and their network.

    Args:
        config: fields of `config.json` that go before those of `source`.
        default: such fields for what neither `source` nor `config` nor the weights tell.
        allow_missing: official names, or beginnings up to a dot ("head"), of tensors that may be
            missing; they start afresh.
        allow_unexpected: likewise of tensors that are left out.

    Raises:
        UserError: there are no such weights; they are damaged, not those of a FluxViT, or their
            network cannot be told.
    """
    source = storage.path_of(source) if storage.is_remote(source) else Path(source)
    found = _find(source)
    given = {**found.config, **(config or {})}
    state, notes = dict(found.state), []
    for name in names.unexpected(state):
        if is_named(name, allow_unexpected):
            del state[name]
            notes.append(f"{source}: {name} is left out")
    lacking = names.missing(state)
    if not all(is_named(name, allow_missing) for name in lacking):
        _check(state, source)
    described = config_json.describe(state, given, found.preprocessor, str(source), default)
    if lacking:
        fresh = _fresh(described)
        state |= {name: fresh[name].astype(_dtype_of(state)) for name in lacking}
        notes += [f"{source}: {name} is missing and starts afresh" for name in lacking]
    _check(state, source)
    return Pretrained(state, described, tuple(notes))


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file.

    Raises UserError if there is no such file or it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is JSON, but no object")
    return values


def _find(source: Path) -> _Found:
    if storage.is_remote(source) and (source.suffix or (source / WEIGHTS).exists()):
        raise UserError(f"{source}: of a bucket, only a workdir can be read; copy it here")
    if source.is_dir() and (source / WEIGHTS).exists():
        return _find_folder(source)
    if source.is_dir():
        return _find_workdir(source)
    found = _find_file(source)
    return found._replace(state=_without_prefixes(found.state, source))


def _find_file(source: Path) -> _Found:
    if not source.exists():
        raise UserError(f"{source}: there are no weights: no such file or folder")
    tensors, texts = _reader(source)(source)
    try:
        embedded = json.loads(texts.get(EMBEDDED, "{}"))
        config, preprocessor = embedded.get("config", {}), embedded.get("preprocessor", {})
    except (ValueError, AttributeError) as error:
        raise UserError(f"{source}: the config it carries is damaged: {error}") from error
    return _Found(tensors, config, preprocessor)


def _find_folder(folder: Path) -> _Found:
    tensors, _ = _read_safetensors(folder / WEIGHTS)
    config, preprocessor = (
        read_config(folder / name) if (folder / name).exists() else {}
        for name in (CONFIG, PREPROCESSOR)
    )
    return _Found(_without_prefixes(tensors, folder), config, preprocessor)


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
    return _read_safetensors(source / WEIGHTS)[0], config


def _find_workdir(workdir: Path) -> _Found:
    from fluxvit_jax import checkpoint  # late: Orbax takes seconds to import

    trained = checkpoint.restore(workdir)
    described = config_json.of_recipe(from_dict(trained.config))
    network = {name: own for name, own in trained.params.items() if name != DECODERS}
    state = names.to_official(network)
    return _Found(state, config_json.to_json(described), config_json.preprocessor_json(described))


def _reader(path: Path) -> Callable[[Path], tuple[dict[str, np.ndarray], dict[str, str]]]:
    if path.suffix == ".safetensors":
        return _read_safetensors
    if path.suffix in PTH:
        return read_pth
    raise UserError(f"{path}: is neither {', '.join(PTH)} nor .safetensors, a folder or a workdir")


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
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


def _check(state: Mapping[str, np.ndarray], source: Path) -> None:
    try:
        names.check(state)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def is_named(name: str, allowed: Sequence[str]) -> bool:
    """Whether a tensor is one of those allowed, by its name or its beginning up to a dot."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _fresh(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """The tensors of a network that was never trained, under their official names."""
    params = fluxvit.initialise(config.model, jax.random.key(0))
    return names.to_official(jax.tree.map(np.asarray, params))


def _dtype_of(state: Mapping[str, np.ndarray]) -> np.dtype:
    return next(iter(state.values())).dtype


# ---------------------------------------------------------------------------------------------
# Writing


def write(pretrained: Pretrained, target: str | os.PathLike) -> None:
    """Writes weights as .safetensors or .pth, by the suffix of `target`, or as a folder.

    Each file is there whole or not at all; files of these names are replaced.

    Raises UserError: the place cannot be written, or .pth is asked for without PyTorch installed.
    """
    target = Path(target)
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


def write_workdir(pretrained: Pretrained, workdir: str | os.PathLike) -> None:
    """Writes weights as the step 0 of a workdir, for `--mode=evaluate` and the like.

    Raises UserError: the workdir has checkpoints already, cannot be written, or no recipe can
    describe the network.
    """
    from fluxvit_jax import checkpoint  # late: Orbax takes seconds to import
    from fluxvit_jax.workdir import write_config

    workdir = Path(workdir)
    recipe = config_json.recipe_of(pretrained.config)
    if (workdir / checkpoint.FOLDER).exists():
        raise UserError(f"{workdir} has checkpoints already; use another workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if pretrained.config.class_names:
            recipe.data.class_names = str(workdir / CLASS_NAMES)
            (workdir / CLASS_NAMES).write_text("\n".join(pretrained.config.class_names) + "\n")
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written: {error.strerror or error}") from error
    with checkpoint.Checkpoints(workdir, keep=1, every=1) as checkpoints:
        checkpoints.save(0, {"params": pretrained.params(), "step": np.int32(0)}, {}, recipe)
    write_config(workdir, recipe)


def _write_folder(pretrained: Pretrained, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    _write_safetensors(pretrained, folder / WEIGHTS)
    for name, content in _configs(pretrained.config).items():
        text = json.dumps(content, indent=2) + "\n"
        file = folder / (CONFIG if name == "config" else PREPROCESSOR)
        replace(file, lambda path, text=text: path.write_text(text))
    replace(folder / NETWORK, lambda path: shutil.copyfile(Path(__file__).parent / NETWORK, path))


def _write_safetensors(pretrained: Pretrained, path: Path) -> None:
    write_tensors(pretrained.state, _configs(pretrained.config), path)


def write_tensors(state: Mapping[str, np.ndarray], configs: Mapping[str, Any], path: Path) -> None:
    """A .safetensors file that carries configs; OSError if it cannot be written."""
    # "format" is what the loaders of PyTorch and Transformers look for.
    texts = {"format": "pt", EMBEDDED: json.dumps(configs)}
    replace(path, lambda new: safetensors.numpy.save_file(state, new, metadata=texts))


def _write_pth(pretrained: Pretrained, path: Path) -> None:
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

    weights = {name: tensor(array) for name, array in pretrained.state.items()}
    whole = {"model": weights, EMBEDDED: json.dumps(_configs(pretrained.config))}
    replace(path, lambda new: torch.save(whole, new))


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
