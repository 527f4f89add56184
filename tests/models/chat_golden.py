"""Golden language models as folders, as Hugging Face has them."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.numpy

from fluxvit_jax.convert import language_model_files
from tests.models.golden import GOLDEN

CHAT = GOLDEN / "chat"
QWEN = np.load(CHAT / "qwen.npz")
MODELS = json.loads((CHAT / "qwen.json").read_text())["models"]
STAGE1 = np.load(CHAT / "stage1.npz")


@cache
def tensors(family: str) -> dict[str, np.ndarray]:
    prefix = f"{family}.weights."
    return {n.removeprefix(prefix): QWEN[n] for n in QWEN.files if n.startswith(prefix)}


def write_folder(folder: Path, family: str, files: int = 1) -> Path:
    """A folder of a golden model, its weights in one file or several."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MODELS[family]["config_json_as_on_the_hub"]
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors(family), files)
    return folder


def write_tensors(folder: Path, state: dict[str, np.ndarray], files: int = 1) -> None:
    if files == 1:
        safetensors.numpy.save_file(state, folder / language_model_files.WEIGHTS)
        return
    places = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: state[name] for name in sorted(state)[number::files]}
        safetensors.numpy.save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / language_model_files.INDEX).write_text(json.dumps(index))


def write_stage1_folder(folder: Path) -> Path:
    """The golden language model of stage 1 with its tokenizer, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((CHAT / "prompts.json").read_text())["model"]["config"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    shutil.copy(CHAT / "tokenizer.json", folder)
    state = {
        name.removeprefix("weights."): STAGE1[name]
        for name in STAGE1.files
        if name.startswith("weights.") and "mm_projector" not in name
    }
    write_tensors(folder, state)
    return folder
