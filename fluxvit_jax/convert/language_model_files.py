"""Language models in Hugging Face folders: config.json and .safetensors, in one file or several.

Neither PyTorch nor Transformers is needed. Weights are read tensor by tensor, each device's share
by itself, in the dtype they are wanted in: a host never holds the whole model.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from fluxvit_jax.convert import weight_files
from fluxvit_jax.convert.weight_files import CONFIG, WEIGHTS
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import LanguageModel, LanguageModelConfig

Tree = dict[str, Any]

INDEX = f"{WEIGHTS}.index.json"
CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# Fields of config.json that are numbers from 1.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"),
)
SAMPLED_BYTES = 4096  # of each tensor, for a fingerprint

# Ours, within a layer -> theirs, and whether the matrix is transposed.
LAYER = {
    "norm1/scale": ("input_layernorm.weight", False),
    "q/kernel": ("self_attn.q_proj.weight", True),
    "k/kernel": ("self_attn.k_proj.weight", True),
    "v/kernel": ("self_attn.v_proj.weight", True),
    "q/bias": ("self_attn.q_proj.bias", False),
    "k/bias": ("self_attn.k_proj.bias", False),
    "v/bias": ("self_attn.v_proj.bias", False),
    "q_norm/scale": ("self_attn.q_norm.weight", False),
    "k_norm/scale": ("self_attn.k_norm.weight", False),
    "proj/kernel": ("self_attn.o_proj.weight", True),
    "norm2/scale": ("post_attention_layernorm.weight", False),
    "gate/kernel": ("mlp.gate_proj.weight", True),
    "up/kernel": ("mlp.up_proj.weight", True),
    "down/kernel": ("mlp.down_proj.weight", True),
}
WHOLE = {
    "token_embed": ("model.embed_tokens.weight", False),
    "norm/scale": ("model.norm.weight", False),
    "output/kernel": ("lm_head.weight", True),
}


def read_config(folder: str | os.PathLike) -> LanguageModelConfig:
    """The model that a folder's config.json describes.

    Raises UserError: there is none, it is of another family, or asks for what is not built here.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no language model: there is no {CONFIG}")
    values = weight_files.read_config(path)
    family = values.get("model_type")
    if family not in list(CLASSES):
        raise UserError(f"{path}: model_type {family!r} is none of {', '.join(CLASSES)}")
    for name in SIZES:
        if values.get(name) is not None and (type(values[name]) is not int or values[name] < 1):
            raise UserError(f"{path}: {name} {values[name]!r} is no number from 1")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters {rope!r} are no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        f"rope_type {kind!r}": kind != "default",
        "use_sliding_window": values.get("use_sliding_window", False),
        f"hidden_act {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
        "mlp_bias": values.get("mlp_bias", False),
        "attention_bias": family != "qwen2" and values.get("attention_bias", False),
    }
    for what, asked in unsupported.items():
        if asked:
            raise UserError(f"{path}: {what} is not supported")
    try:
        heads = values["num_attention_heads"]
        return LanguageModelConfig(
            width=values["hidden_size"],
            depth=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_size=values.get("head_dim") or values["hidden_size"] // heads,
            hidden=values["intermediate_size"],
            vocabulary=values["vocab_size"],
            context=values["max_position_embeddings"],
            rope_theta=float(values.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            epsilon=float(values["rms_norm_eps"]),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied=values.get("tie_word_embeddings", False),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: describes no whole model: {error}") from error


def shapes(config: LanguageModelConfig) -> Tree:
    """Shapes of the parameters, float32."""
    return jax.eval_shape(lambda: fluxvit.split(LanguageModel(config, nnx.Rngs(0)))[1])


def read(folder: str | os.PathLike, expected: Tree) -> Tree:
    """A model's parameters as `expected` has them: shapes, dtypes and shardings of its leaves.

    Raises UserError: tensors are missing, left over or of another shape, or cannot be read.
    """
    with TensorFiles.open(Path(folder)) as files:
        files.check(expected)

        def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> Any:
            own = jax.tree_util.keystr(path, simple=True, separator="/")

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                return files.part(own, like.shape, index).astype(like.dtype)

            if like.sharding is None:
                return part(tuple(slice(None) for _ in like.shape))
            return jax.make_array_from_callback(like.shape, like.sharding, part)

        return jax.tree_util.tree_map_with_path(leaf, expected)


def write(folder: str | os.PathLike, config: LanguageModelConfig, params: Tree) -> None:
    """A model as a folder that `read_config` and `read`, and Transformers, take.

    params: ours, as `read` returns them; each tensor keeps its dtype. A tokenizer is not written.

    Raises UserError: no family has both biases and normalized heads, or a file cannot be written.
    """
    target = Path(folder)
    values = _values(config, str(params["token_embed"].dtype))
    state: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        own = jax.tree_util.keystr(path, simple=True, separator="/")
        state |= _split(own, np.asarray(leaf))

    def save(new: Path) -> None:
        safetensors.numpy.save_file(state, new, metadata={"format": "pt"})

    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / INDEX).unlink(missing_ok=True)  # of a model in several files that was here
        weight_files.replace(target / WEIGHTS, save)
        text = json.dumps(values, indent=2) + "\n"
        weight_files.replace(target / CONFIG, lambda new: new.write_text(text))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{target}: cannot be written: {error}") from error


def fingerprint(folder: str | os.PathLike) -> str:
    """sha256 over the names, dtypes and shapes of a folder's tensors and the start of each.

    Unlike one over all bytes it costs no second reading of a large model.
    """
    digest = hashlib.sha256()
    with TensorFiles.open(Path(folder)) as files:
        for name in sorted(files.tensors):
            found = files.tensors[name].get_slice(name)
            shape = found.get_shape()
            rows = max(1, SAMPLED_BYTES // (2 * max(1, int(np.prod(shape[1:])))))
            start = np.ascontiguousarray(found[: min(rows, shape[0])])
            digest.update(f"{name} {found.get_dtype()} {shape}".encode())
            digest.update(start.tobytes()[:SAMPLED_BYTES])
    return digest.hexdigest()


class TensorFiles(NamedTuple):
    """The open files of a folder: tensor -> the file it is in."""

    folder: Path
    tensors: Mapping[str, Any]

    @staticmethod
    @contextlib.contextmanager
    def open(folder: Path) -> "Iterator[TensorFiles]":
        """Opens them. Raises UserError: there are none, or one is missing or damaged."""
        with contextlib.ExitStack() as stack:
            tensors: dict[str, Any] = {}
            for path in _files(folder):
                try:
                    file = stack.enter_context(safetensors.safe_open(path, framework="np"))
                    tensors |= dict.fromkeys(file.keys(), file)
                except (OSError, ValueError, safetensors.SafetensorError) as error:
                    raise UserError(f"{path}: cannot be read as .safetensors: {error}") from error
            yield TensorFiles(folder, tensors)

    def check(self, expected: Tree) -> None:
        """Raises UserError unless the tensors are those of a model, each of its shape."""
        layers = expected["layers"]["norm1"]["scale"].shape[0]
        if layers > len(self.tensors):
            raise UserError(
                f"{self.folder}: is not the model of its {CONFIG}: {len(self.tensors)} tensors are "
                f"too few for {layers} layers"
            )
        wanted: dict[str, tuple[int, ...]] = {}
        for path, like in jax.tree_util.tree_leaves_with_path(expected):
            own = jax.tree_util.keystr(path, simple=True, separator="/")
            for name, shape in _theirs(own, like.shape).items():
                wanted[name] = shape
        tied = "output" not in expected
        found = self.tensors.keys() - ({WHOLE["output/kernel"][0]} if tied else set())
        found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
        for names, what in ((wanted.keys() - found, "lacks"), (found - wanted.keys(), "has also")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(
                    f"{self.folder}: is not the model of its {CONFIG}: {what} {min(names)}{more}"
                )
        for name, shape in sorted(wanted.items()):
            own_shape = tuple(self.tensors[name].get_slice(name).get_shape())
            if own_shape != shape:
                raise UserError(
                    f"{self.folder}: {name} is {list(own_shape)}, and {CONFIG} says {list(shape)}"
                )

    def part(self, own: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter of ours, `own` of `shape`, that may be stacked over layers."""
        names = list(_theirs(own, shape))
        if own in WHOLE:
            return self._slice(names[0], index, WHOLE[own][1])
        transposed = LAYER[own.removeprefix("layers/")][1]
        return np.stack([self._slice(name, index[1:], transposed) for name in names[index[0]]])

    def _slice(self, name: str, index: tuple[slice, ...], transposed: bool) -> np.ndarray:
        try:
            found = self.tensors[name].get_slice(name)
            return found[index[::-1]].T if transposed else found[index]
        except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{self.folder}: {name} cannot be read: {error}") from error


def _theirs(own: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Their tensors, one for each layer, and shapes that make up a parameter of ours."""
    if own in WHOLE:
        name, transposed = WHOLE[own]
        return {name: shape[::-1] if transposed else shape}
    name, transposed = LAYER[own.removeprefix("layers/")]
    inner = shape[:0:-1] if transposed else shape[1:]
    return {f"model.layers.{number}.{name}": inner for number in range(shape[0])}


def _split(own: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Their tensors of a parameter of ours."""
    names = list(_theirs(own, array.shape))
    transposed = (WHOLE.get(own) or LAYER[own.removeprefix("layers/")])[1]
    parts = [array] if own in WHOLE else list(array)
    return {
        name: np.ascontiguousarray(part.T if transposed else part)
        for name, part in zip(names, parts, strict=True)
    }


def _values(config: LanguageModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model, the inverse of `read_config`."""
    if config.qkv_bias and config.qk_norm:
        raise UserError(f"no model of {', '.join(CLASSES)} has both qkv_bias and qk_norm")
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }


def _files(folder: Path) -> list[Path]:
    """The files of weights in a folder, as its index lists them."""
    if (folder / INDEX).is_file():
        try:
            index = storage.parse_json((folder / INDEX).read_text())
            names = {Path(name).name for name in index["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / INDEX}: cannot be read: {error}") from error
        paths = [folder / name for name in sorted(names)]
    else:
        paths = [folder / WEIGHTS]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{folder}: no weights of a language model: there is no {path.name}")
    return paths
