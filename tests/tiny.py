"""A data set of small real videos and a recipe for runs of seconds, for tests of whole runs.

The recipe's argument is the folder of the data: `--config=tests/tiny.py:FOLDER`; with a teacher's
weights after it, `FOLDER,TEACHER`, it is that of distillation.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.checkpoints.workdir import write_config
from fluxvit_jax.config.checks import validate
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.network import model_config
from fluxvit_jax.config.variants import TEACHERS
from fluxvit_jax.convert import official_names, teacher
from fluxvit_jax.convert.official_names import INTERNVIDEO2
from fluxvit_jax.distributed import checksums
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.internvideo2 import InternVideo2, InternVideo2Config
from fluxvit_jax.objectives.base import objective_class
from tests import limited
from tests.data.videos import moving_texture, write_video

ROOT = Path(__file__).parents[1]
START = ROOT / "tests" / "start"
# XLA_FLAGS of all tests: most of their time would be compiling. Programs are
# slower and rounded otherwise. Later versions of XLA lack the others, and are quicker.
QUICK_TO_COMPILE = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    QUICK_TO_COMPILE += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",  # parts for threads cost more than they save
        "--xla_cpu_opt_preset=FAST_COMPILE",
    ]
CLASSES = 4
TINTS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
BAD = "bad.mp4"


def write_data(folder: Path) -> Path:
    """Videos of four tints, the class: train.csv lists 16, validation.csv 13 and one is no video.

    train_bad.csv lists the 16 and `BAD`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(28):
        texture = moving_texture(12 + i % 5, *((48, 64), (64, 48), (48, 48))[i % 3], seed=i)
        frames = (texture * 0.4 + TINTS[i % CLASSES] * 0.6).astype(np.uint8)
        write_video(folder / f"{i}.mp4", frames)
        rows.append(f"{i}.mp4,{i % CLASSES}")
    (folder / BAD).write_bytes((folder / "0.mp4").read_bytes()[:200])
    lists = {
        "train": rows[:16],
        "train_bad": [*rows[:16], f"{BAD},1"],
        "validation": [*rows[16:20], f"{BAD},2", *rows[20:]],
    }
    for name, lines in lists.items():
        (folder / f"{name}.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    return folder


def class_folders(data: Path, folder: Path, names: Sequence[str], videos: Iterable[int]) -> str:
    """Makes a folder of class folders with links to the videos of `write_data` of these numbers."""
    for number in videos:
        target = folder / names[number % CLASSES]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number}.mp4").symlink_to(data / f"{number}.mp4")
    return str(folder)


def get_config(argument: str) -> ConfigDict:
    folder, _, weights = argument.partition(",")
    return make_pretraining(folder, weights) if weights else _supervised(folder)


def _supervised(folder: str) -> ConfigDict:
    """20 steps of 8 clips on 20 grids; what draws random numbers is on, but for random erasing.

    Its noise would be most of a step's time in programs that are compiled quickly.
    """
    config = default_config("Ti")
    config.model.classes = CLASSES
    config.model.dtype = "float32"
    config.data.train = f"{folder}/train.csv"
    config.data.validation = f"{folder}/validation.csv"
    config.data.grids.frames = "2..11..1"
    config.data.grids.resolutions = "28..42..14"
    config.data.grids.tokens = (8, 99)
    config.data.clips_per_grid = 2
    config.data.repeated_aug = 2
    config.data.workers = 0
    config.data.augment.scale = (0.5, 1.0)
    config.train.batch_size = 8
    config.train.epochs = 5
    config.train.warmup_epochs = 1.0
    config.train.budgets = (24, 12)
    config.train.label_smoothing = 0.1
    config.train.mixup = 0.2
    config.train.cutmix = 0.2
    config.train.mixup_probability = 0.5
    config.train.random_erasing = 0.0
    config.train.ema_decay = 0.8
    config.optim.learning_rate = 2e-3
    config.optim.layer_decay = 0.9
    config.eval.settings = ((24, 6, 42), (12, 4, 28))
    config.eval.clips, config.eval.crops = 2, 1
    config.eval.batch_size = 4
    config.eval.every_epochs = 2
    config.search.budgets = (24, 12)
    config.search.frames = "4..6..2"
    config.search.resolutions = "28..42..14"
    config.search.timed_batch = 2
    config.checkpoint.every_steps = 2
    config.log.every_steps = 1
    return config


def write_teacher(path: Path) -> Path:
    """An InternVideo2-Ti with large random weights, as `convert` leaves one."""
    config = InternVideo2Config(
        **TEACHERS["InternVideo2-Ti"]._asdict(), frames=4, rows=3, columns=3, dtype="float32"
    )
    model = InternVideo2(config, nnx.Rngs(0))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape), shapes)
    params = jax.tree.map(np.float32, params)
    teacher.write(teacher.Teacher(official_names.to_official(params, INTERNVIDEO2), config), path)
    return path


def make_pretraining(folder: Path | str, weights: Path | str, **changes) -> ConfigDict:
    """The config of distillation from such a teacher on the same videos."""
    own = {
        **{"model__classes": 1, "data__validation": "", "data__grids__tokens": (32, 99)},
        **{"train__objective": "flux_umt", "train__budgets": (24, 8)},
        **{"train__mixup": 0.0, "train__cutmix": 0.0},
        **{"train__label_smoothing": 0.0, "distill__teacher": str(weights)},
        **{"distill__network": "InternVideo2-Ti", "distill__resolution": 42},
        **{"distill__tokens": 32, "distill__student_blocks": (0, 1)},
        **{"distill__teacher_blocks": (1, 3)},
    }
    return make_config(folder, **own | changes)


def make_config(folder: Path, **changes) -> ConfigDict:
    """The config with fields changed: "train__epochs=3" is train.epochs."""
    config = _supervised(str(folder))
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    validate(config)
    return config


def write_captions(data: Path, folder: Path) -> Path:
    """captions.json: the 16 training videos of `write_data`, each with two captions."""
    words = ("red", "green", "blue", "yellow")
    entries = [
        {
            "video": str(data / f"{number}.mp4"),
            "caption": [
                f"{form} {words[number % CLASSES]}, number {number}" for form in ("A", "The")
            ],
        }
        for number in range(16)
    ]
    path = folder / "captions.json"
    path.write_text(json.dumps(entries))
    return path


def make_clip(captions: Path, root: Path, **changes) -> ConfigDict:
    """The config of Flux-CLIP on such captions, with a text encoder from scratch."""
    own = {
        **{"data__train": str(captions), "data__root": str(root), "data__validation": ""},
        **{"model__classes": 1, "data__repeated_aug": 1, "train__objective": "flux_clip"},
        **{"train__mixup": 0.0, "train__cutmix": 0.0, "train__random_erasing": 0.0},
        **{"train__label_smoothing": 0.0, "clip__network": "Ti", "clip__train_text": True},
        **{"clip__temperature": 0.1, "optim__eps": 1e-5, "train__ema_decay": 0.0},
    }
    return make_config(root, **own | changes)


def make_chat(captions: Path, root: Path, llm: Path, **changes) -> ConfigDict:
    """The config of video chat, stage 1, on captions, with a language model's folder."""
    own = {
        **{"train__objective": "flux_chat", "train__freeze": "all", "chat__llm": str(llm)},
        **{"chat__merge": 3, "chat__text_tokens": 24, "train__align_weight": 0.0},
        **{"data__grids__tokens": (24, 54)},
        **{"optim__learning_rate": 3e-3, "optim__layer_decay": 1.0, "optim__weight_decay": 0.0},
    }
    return make_clip(captions, root, **own | changes)


def write_clip_run(workdir: Path, config: ConfigDict, seed: int = 0) -> Path:
    """A workdir of `make_clip`'s config with random weights, as if a run had ended there."""
    params = _random_params(config, seed)
    params["temperature"] = np.float32(config.clip.temperature)
    return _write_run(workdir, config, params)


def write_chat_run(workdir: Path, config: ConfigDict, seed: int = 0) -> Path:
    """Likewise of `make_chat`'s config."""
    return _write_run(workdir, config, _random_params(config, seed))


def _random_params(config: ConfigDict, seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed))
    params = fluxvit.init_params(model_config(config), keys[0])
    params |= objective_class(config).init_params(config, keys[1])
    rng = np.random.default_rng(seed)  # initial biases are 0, and hide what leaves them out
    return jax.tree.map(lambda x: np.float32(np.asarray(x) + rng.normal(0, 0.02, x.shape)), params)


def _write_run(workdir: Path, config: ConfigDict, params: dict) -> Path:
    workdir.mkdir(parents=True)
    with checkpointer.Checkpoints(workdir, keep=1, every=1) as checkpoints:
        state = {"params": params, "step": np.int32(0)}
        frozen = objective_class(config).frozen_identity(config)
        about = {"class_names": [], "frozen": frozen}
        checkpoints.save(0, state, about, config)
    write_config(workdir, config)
    return workdir


def caching(cache: Path) -> dict[str, str]:
    """The part of an environment by which programs are compiled once and then loaded."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Of a process on so many simulated devices. `cache`: keeps compiled programs."""
    path = f"{ROOT}{os.pathsep}{START}"
    own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | caching(cache)
    options = [f"--xla_force_host_platform_device_count={devices}"] * (devices > 1)
    own["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *options])
    return os.environ | own


def start(
    argument: Path | str,
    workdir: Path,
    cache: Path,
    *options: str,
    devices: int = 1,
) -> limited.Process:
    """The program, as a process of its own, on this recipe; see `environment`."""
    command = [sys.executable, "-m", "fluxvit_jax.main", f"--config={__file__}:{argument}"]
    return limited.Process(
        [*command, f"--workdir={workdir}", *options],
        env=environment(cache, devices),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_evaluation(workdir: Path) -> tuple[dict, list[dict]]:
    """The latest report of an evaluation, and its predictions."""
    reports = (workdir / "evaluation").glob("*.json")
    path = max(reports, key=lambda path: path.stat().st_mtime_ns)
    return json.loads(path.read_text()), read_lines(path.with_suffix(".predictions.jsonl"))


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, all of which must be intact."""
    lines = checksums.read_lines(path)
    assert len(lines) == len(path.read_text().splitlines())
    return lines
