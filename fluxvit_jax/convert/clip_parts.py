"""What a folder of Flux-CLIP holds beside the network: what maps videos and texts into one space.

clip.safetensors   head (`vision_align`) and temperature (`temp`) under InternVideo2 CLIP's
                   names, text encoder (`text_encoder`) under MobileCLIP's; and the checksum of
                   the model.safetensors that they belong to
config.json        "text_encoder": its sizes
bpe_simple_vocab_16e6.txt.gz   the vocabulary of its tokenizer
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fluxvit_jax.convert import official_names, weight_files
from fluxvit_jax.convert.official_names import Architecture, affine, describe_faults, linear
from fluxvit_jax.convert.text_encoder_names import PREFIX, TEXT_ENCODER
from fluxvit_jax.data.tokenizer import VOCABULARY
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.checksums import sha256
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.text_encoder import TextEncoderConfig

FILE = weight_files.CLIP
ENTRY = "text_encoder"  # of config.json
SIZES = ("width", "depth", "heads", "hidden", "out")
BELONGS_TO = "model_sha256"
TEMPERATURE = "temp"
HEAD = Architecture(
    "Flux-CLIP's head",
    (*affine("norm", "vision_align.0", "E"), *linear("proj", "vision_align.1", "E", "D")),
    {},
    lambda found: {},
)
HEAD_PREFIX = "vision_align."


class ClipParts(NamedTuple):
    """Parameters as float32 numpy arrays, and the text encoder's shape.

    head: of `models.clip_head`; temperature: by which cosines are divided; text_encoder: of
    `models.text_encoder`.
    """

    head: dict[str, Any]
    temperature: float
    text_encoder: dict[str, Any]
    network: TextEncoderConfig


def write(parts: ClipParts, folder: Path) -> None:
    """Adds the parts to a folder that `weight_files.write` has just written.

    Raises UserError if it cannot be written.
    """
    tensors = {TEMPERATURE: np.array(parts.temperature, np.float32)}
    tensors |= official_names.to_official(parts.head, HEAD)
    text = official_names.to_official(parts.text_encoder, TEXT_ENCODER)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in text.items()}
    config = weight_files.read_config(folder / weight_files.CONFIG)
    config[ENTRY] = {name: getattr(parts.network, name) for name in SIZES}
    card = (folder / weight_files.CARD).read_text("utf-8")
    card += CARD.format(tokens=_fewest_tokens(folder))
    try:
        weight_files.replace(
            folder / VOCABULARY.name, lambda path: shutil.copyfile(VOCABULARY, path)
        )
        belongs = {BELONGS_TO: sha256(folder / weight_files.WEIGHTS)}
        weight_files.write_tensors(tensors, belongs, folder / FILE)
        text_of_config = json.dumps(config, indent=2) + "\n"
        weight_files.replace(
            folder / weight_files.CONFIG, lambda path: path.write_text(text_of_config)
        )
        weight_files.replace(
            folder / weight_files.CARD, lambda path: path.write_text(card, "utf-8")
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


CARD = """
## Videos and texts

Flux-CLIP: videos and texts have vectors in one space, in clip.safetensors.

```python
model = fluxvit_jax.from_pretrained("FOLDER")
model.encode_video("a.mp4", tokens={tokens}) @ model.encode_text(["a dog runs"]).T  # cosines
model.classify("a.mp4", ["opening a door", "closing a door"], tokens={tokens})
```
"""


def _fewest_tokens(folder: Path) -> int:
    """The smallest budget that the folder's preprocessor_config.json has a grid for."""
    settings = weight_files.read_config(folder / weight_files.PREPROCESSOR)["settings"]
    return min(setting["tokens"] for setting in settings)


def is_in(folder: Path) -> bool:
    """Whether a folder holds such parts, or says so."""
    config = folder / weight_files.CONFIG
    if not (folder / weight_files.WEIGHTS).exists():
        return False
    told = config.exists() and ENTRY in weight_files.read_config(config)
    return told or (folder / FILE).exists()


def read(folder: Path) -> ClipParts:
    """The parts in a folder, checked.

    Raises UserError: a file, a tensor or an entry of the config is missing, unexpected or of the
    wrong shape; they belong to another network; the vocabulary is another.
    """
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{folder}: {FILE} is missing, though {weight_files.CONFIG} speaks of it")
    tensors, texts = weight_files.read_safetensors(path)
    _check_belonging(path, texts)
    config = weight_files.read_config(folder / weight_files.CONFIG)
    _check_vocabulary(folder / VOCABULARY.name)
    head = {name: x for name, x in tensors.items() if name.startswith(HEAD_PREFIX)}
    text = {name.removeprefix(PREFIX): x for name, x in tensors.items() if name.startswith(PREFIX)}
    others = tensors.keys() - {*head, TEMPERATURE, *(f"{PREFIX}{name}" for name in text)}
    temperature = tensors.get(TEMPERATURE)
    faults = describe_faults(
        {
            "missing": [TEMPERATURE] * (temperature is None),
            "unexpected": sorted(others),
            "no number above 0": [TEMPERATURE] * (not _is_positive(temperature)),
        }
    )
    if faults:
        raise UserError(f"{path}: {faults}")
    try:
        parts = ClipParts(
            official_names.from_official(_float32(head), of=HEAD),
            float(tensors[TEMPERATURE].reshape(())),
            official_names.from_official(_float32(text), of=TEXT_ENCODER),
            _network(config, text),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_widths(parts, config, path)
    return parts


def _is_positive(temperature: np.ndarray | None) -> bool:
    """Whether it is one number above 0; of what is missing, nothing is said."""
    return temperature is None or (temperature.size == 1 and bool((temperature > 0).all()))


def _float32(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float32) for name, tensor in state.items()}


def _check_belonging(path: Path, texts: Mapping[str, str]) -> None:
    """Raises UserError unless the network beside is the one that the parts were trained with."""
    try:
        expected = storage.parse_json(texts[weight_files.EMBEDDED])[BELONGS_TO]
    except (KeyError, ValueError, TypeError):
        raise UserError(
            f"{path}: does not say which {weight_files.WEIGHTS} it belongs to; write the folder "
            "with save_pretrained or python -m fluxvit_jax.convert"
        ) from None
    if sha256(path.with_name(weight_files.WEIGHTS)) != expected:
        raise UserError(
            f"{path}: belongs to another {weight_files.WEIGHTS} than the one beside it; the folder "
            "is mixed from two models: write it again, or take both files from one"
        )


def _check_vocabulary(path: Path) -> None:
    try:
        known = path.read_bytes() == VOCABULARY.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not known:
        raise UserError(f"{path}: is another vocabulary than CLIP's, the only one known here")


def _network(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> TextEncoderConfig:
    """The shape of a text encoder by config.json, which its tensors must confirm.

    state: its tensors, complete, by MobileCLIP's names.
    """
    given = config.get(ENTRY)
    if not isinstance(given, Mapping) or sorted(given) != sorted(SIZES):
        raise UserError(
            f'{weight_files.CONFIG} needs "{ENTRY}" with {", ".join(SIZES)} and no more'
        )
    if wrong := [name for name in SIZES if type(given[name]) is not int or given[name] < 1]:
        raise UserError(f'{weight_files.CONFIG} says "{ENTRY}" {wrong[0]} {given[wrong[0]]!r}')
    official_names.check(state, TEXT_ENCODER)
    vocabulary, width = state["embedding_layer.weight"].shape
    told = {
        "width": width,
        "depth": TEXT_ENCODER.member_counts(state)["blocks"],
        "hidden": len(state["transformer.0.pre_norm_ffn.1.bias"]),
        "out": state["projection_layer"].shape[1],
    }
    if different := [name for name in told if told[name] != given[name]]:
        listed = ", ".join(f"{name} is {told[name]}, not {given[name]}" for name in different)
        raise UserError(f"{weight_files.CONFIG} contradicts the text encoder: {listed}")
    if width % given["heads"]:
        raise UserError(f"width {width} does not divide into {given['heads']} attention heads")
    context = state["positional_embedding.pos_embed.pos_embed"].shape[2]
    return TextEncoderConfig(**given, context=context, vocabulary=vocabulary)


def _check_widths(parts: ClipParts, config: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless the head leads from the network's vectors to the texts'."""
    found = parts.head["proj"]["kernel"].shape
    expected = (config.get("pool_width", found[0]), parts.network.out)
    if found != expected:
        raise UserError(
            f"{path}: vision_align maps width {found[0]} to {found[1]}, not {expected[0]} of the "
            f"network's vectors to {expected[1]} of the texts'"
        )
