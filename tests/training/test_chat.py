"""Whole runs of video chat: learned, resumed, with frozen and trained language models."""

import json
import re
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy

from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives import flux_chat
from fluxvit_jax.objectives.flux_chat import CONNECTOR, LLM
from fluxvit_jax.training import train
from tests import hosts, tiny
from tests.models.chat_golden import write_stage1_folder, write_tensors


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_stage1_folder(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def captions(tiny_data, tmp_path_factory):
    return tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def config(tiny_data, captions, llm, finished):
    return tiny.make_chat(
        captions, tiny_data, llm, train__init_from=str(finished.workdir), train__epochs=5
    )


@pytest.fixture(scope="module")
def trained(config, compiled, tmp_path_factory):
    """A finished run. Read only."""
    workdir = tmp_path_factory.mktemp("chat") / "run"
    assert train.train(config, workdir) == 0
    return workdir


def lines(workdir) -> list[dict]:
    return [x for x in tiny.read_lines(workdir / "metrics.jsonl") if x["split"] == "train"]


def assert_same_steps(workdir, other) -> None:
    names = ("loss", "answer_24", "answer_12", "top1_12", "gradient_norm")
    found = ([[line[n] for n in names] for line in lines(w)] for w in (workdir, other))
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_run_learns(trained):
    found = lines(trained)
    assert len(found) == 20
    losses = [line["answer_24"] for line in found]
    assert losses[0] == pytest.approx(np.log(368), rel=0.2)  # of one word of so many
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    assert all(
        line["loss"] == pytest.approx(line["answer_24"] + line["answer_12"]) for line in found
    )


def test_only_the_projector_is_trained_and_the_language_model_is_in_no_checkpoint(trained):
    params = restore_params(trained)
    assert params.keys() == {*fluxvit.PARAMS, CONNECTOR}


def test_it_is_resumed_bit_for_bit(trained, config, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "20")
    assert train.train(config, workdir) == 0
    same = [(w / "metrics.jsonl").read_bytes() for w in (workdir, trained)]
    assert same[0] == same[1]
    params = [jax.tree.leaves(restore_params(w)) for w in (workdir, trained)]
    assert all(np.array_equal(*pair) for pair in zip(*params, strict=True))


ON_MESH = """
import sys
from tests import tiny
from fluxvit_jax.training import train

captions, data, llm, start, workdir = sys.argv[1:]
config = tiny.make_chat(
    captions, data, llm, train__init_from=start, train__epochs=5,
    parallel__mesh__data=2, parallel__mesh__fsdp=2, parallel__mesh__tensor=2,
)
sys.exit(train.train(config, workdir))
"""


def test_devices_change_nothing(trained, config, compiled, tmp_path):
    """Eight devices split the clips, the language model and its heads."""
    where = config.data.train, config.data.root, config.chat.llm, config.train.init_from
    (ended,) = hosts.run(
        *(tmp_path, compiled, *where, str(tmp_path / "run")),
        code=ON_MESH,
        devices=8,
        flags=False,
        folders=[tiny.ROOT],
        environments=[{}],
    )
    assert ended.status == 0, ended.err
    names = ("loss", "answer_24", "answer_12", "top1_12", "gradient_norm")
    ours, one = (
        [[line[n] for n in names] for line in lines(w)] for w in (tmp_path / "run", trained)
    )
    np.testing.assert_allclose(ours, one, rtol=1e-4)


def test_a_batch_in_parts_is_the_whole(trained, config, tmp_path):
    """The mean is over all labels of the batch, and captions are of several lengths."""
    parts = config.copy_and_resolve_references()
    parts.train.grad_accum_steps = 2
    assert train.train(parts, tmp_path / "run") == 0
    assert_same_steps(tmp_path / "run", trained)


def test_images_have_steps_of_their_own(config, tmp_path, capfd):
    """They have fewer tokens than the budgets."""
    entries = json.loads(Path(config.data.train).read_text())
    for number in range(16):
        name = str(tmp_path / f"{number}.png")
        cv2.imwrite(name, np.full((40, 50, 3), 15 * number, np.uint8))
        entries.append({"image": name, "caption": f"gray {number}"})
    (tmp_path / "both.json").write_text(json.dumps(entries))
    own = config.copy_and_resolve_references()
    own.data.train, own.data.root = str(tmp_path / "both.json"), "/"
    own.train.budgets, own.train.epochs = (24,), 1
    assert train.train(own, tmp_path / "run") == 0
    assert "compiled training step of images for 2 grids" in capfd.readouterr().err
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run"))


def test_the_language_model_can_be_trained_too(config, tmp_path):
    own = config.copy_and_resolve_references()
    own.chat.train, own.train.epochs = "projector+llm", 1
    assert train.train(own, tmp_path / "run") == 0
    params = restore_params(tmp_path / "run")
    assert params.keys() == {*fluxvit.PARAMS, CONNECTOR, LLM}
    start = language_model_files.read(
        config.chat.llm, language_model_files.shapes(flux_chat.llm_config(config))
    )
    moved = jax.tree.map(lambda x, old: not np.array_equal(x, old), params[LLM], start)
    assert all(jax.tree.leaves(moved))


def test_another_language_model_is_refused_on_resume(trained, config, tmp_path):
    llm = shutil.copytree(config.chat.llm, tmp_path / "llm")
    state = safetensors.numpy.load_file(llm / "model.safetensors")
    state["model.norm.weight"] += 1
    write_tensors(llm, state)
    own = config.copy_and_resolve_references()
    own.chat.llm, own.train.epochs = str(llm), 6
    with pytest.raises(UserError, match="begun with other data: other weights of the frozen llm"):
        train.train(own, trained)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chat__llm": ""}, "no language model: add --config.chat.llm=FOLDER"),
        ({"chat__layer": -9}, "config.chat.layer: -9, and Ti has 2 blocks; -2 is the first"),
        ({"chat__merge": 5}, "config.chat.merge: 24 tokens of train.budgets do not divide by 5"),
        ({"train__freeze": "none"}, 'flux_chat trains no video network; set it "all"'),
        ({"data__validation": "x.csv"}, "flux_chat is not evaluated on the way; leave it empty"),
        ({"data__grids__tokens": (8, 54)}, "24 tokens, and a grid may have 8"),
    ],
)
def test_bad_settings_are_one_line(config, tmp_path, changes, message):
    own = config.copy_and_resolve_references()
    for name, value in changes.items():
        own.update_from_flattened_dict({name.replace("__", "."): value})
    with pytest.raises(UserError, match=re.escape(message)):
        train.train(own, tmp_path / "run")
