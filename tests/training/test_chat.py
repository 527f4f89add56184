"""Whole runs of video chat: learned, resumed, with frozen and trained language models."""

import shutil

import jax
import numpy as np
import pytest

from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives.flux_chat import CONNECTOR
from fluxvit_jax.training import train
from tests import tiny
from tests.models.chat_golden import write_stage1_folder


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


def test_a_run_learns(trained):
    found = lines(trained)
    assert len(found) == 20
    losses = [line["answer_24"] for line in found]
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
