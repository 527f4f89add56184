"""Whole runs of distillation: they learn, go on after a kill, and fine-tuning starts from them."""

import json
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from fluxvit_jax import evaluate, train
from fluxvit_jax.checkpoint import restore_params
from fluxvit_jax.errors import UserError
from fluxvit_jax.objectives.distillation import DECODERS
from tests import tiny
from tests.test_train import saved_steps, split_of, steps_in

STEPS = 20


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """A teacher, and a mixture of all videos: half of them without flips, and twice as often."""
    folder = tmp_path_factory.mktemp("pretraining")
    rows = [f"{i}.mp4" for i in range(16)]
    (folder / "plain.txt").write_text("\n".join(rows[:8]) + "\n")
    (folder / "fixed.txt").write_text("\n".join(rows[8:]) + "\n")
    mixture = folder / "mixture.csv"
    mixture.write_text(
        f"list,root,weight,flip\nplain.txt,{tiny_data},1,yes\nfixed.txt,{tiny_data},2,no\n"
    )
    return SimpleNamespace(teacher=tiny.write_teacher(folder / "teacher"), mixture=str(mixture))


@pytest.fixture(scope="module")
def pretrained(tiny_data, data, compiled, tmp_path_factory):
    """A finished run, by the program."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    process = start(tiny_data, data, workdir, compiled)
    _, log = process.communicate()
    assert process.returncode == 0, log
    return SimpleNamespace(workdir=workdir, log=log)


def start(tiny_data, data, workdir, compiled, *options):
    recipe = f"{tiny_data},{data.teacher}"
    return tiny.start(recipe, workdir, compiled, f"--config.data.train={data.mixture}", *options)


def test_a_run_learns_to_agree(pretrained):
    lines = split_of(pretrained.workdir, "train")
    assert len(lines) == STEPS
    for name in lines[0]:
        if name.startswith("agreement_"):
            before, after = (
                np.mean([line[name] for line in own]) for own in (lines[:4], lines[-4:])
            )
            assert after > before + 0.05, name
    assert "agreement_block1_8" in lines[0] and "agreement_pooled_24" in lines[0]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert "the teacher is InternVideo2-Ti of" in pretrained.log
    assert "1 compiled training step for" in pretrained.log
    assert not split_of(pretrained.workdir, "validation")


def test_the_teacher_is_not_kept(pretrained):
    params = restore_params(pretrained.workdir)
    assert DECODERS in params and "teacher" not in params
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = pretrained.workdir / "checkpoints" / "20" / "state"
    written = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
    assert written < 5 * 4 * size  # parameters, two moments, the average


@pytest.mark.slow
def test_killed_and_resumed_is_as_undisturbed(pretrained, tiny_data, data, compiled, tmp_path):
    """Masks and mixture included: the same metrics and parameters to the bit."""
    workdir = tmp_path / "run"
    for end, number in [(5, signal.SIGKILL), (13, signal.SIGTERM)]:
        process = start(tiny_data, data, workdir, compiled, "--config.data.workers=2")
        while steps_in(workdir) < end and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate()
    assert 0 < saved_steps(workdir)[-1] < STEPS
    process = start(tiny_data, data, workdir, compiled)
    _, log = process.communicate()
    assert process.returncode == 0 and "going on from step" in log, log
    ours, theirs = workdir, pretrained.workdir
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    trees = [restore_params(w / "checkpoints/20", average=False) for w in (ours, theirs)]
    for own, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(own, other)


def test_fine_tuning_starts_from_it(pretrained, tiny_data, tmp_path, capsys):
    config = tiny.make_config(
        tiny_data, seed=1, train__init_from=str(pretrained.workdir), train__epochs=1,
        optim__learning_rate=1e-9, optim__min_learning_rate=0.0, optim__warmup_learning_rate=0.0,
        optim__weight_decay=0.0,
    )  # fmt: skip
    assert train.train(config, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "decoders are dropped, and a classifier for 4 classes and the align projectors" in said
    before = restore_params(pretrained.workdir)
    after = restore_params(tmp_path / "run", average=False)
    assert DECODERS not in after and after["heads"]["bias"].shape[-1] == 4
    for name in ("blocks", "pool", "patch_embed", "pos_embed", "gpe", "cls_token"):
        for own, other in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True):
            np.testing.assert_allclose(own, other, rtol=0, atol=1e-5)
    kernels = [tree["align"]["head"]["kernel"] for tree in (before, after)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.05  # of another seed


def test_it_has_no_classifier_to_evaluate(pretrained, tiny_data):
    with pytest.raises(UserError, match=r"is pre-trained and has no classifier; fine-tune from"):
        evaluate.run(tiny.make_config(tiny_data), str(pretrained.workdir))


def test_a_run_of_ours_can_be_the_teacher(pretrained, finished, tiny_data, tmp_path):
    """A supervised one, and a pre-trained one."""
    for workdir in (finished.workdir, pretrained.workdir):
        config = tiny.make_pretraining(
            tiny_data, workdir, distill__network="Ti", distill__frames=8, distill__resolution=56,
            distill__teacher_blocks=(0, 1), train__epochs=1,
        )  # fmt: skip
        assert train.train(config, tmp_path / workdir.parent.name) == 0


def refused(config, tmp_path) -> str:
    with pytest.raises(UserError) as caught:
        train.train(config, tmp_path / "refused")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused" / "config.json").exists()
    return str(caught.value)


def test_teachers_that_do_not_fit_are_refused(tiny_data, data, finished, tmp_path):
    weights = data.teacher
    make = tiny.make_pretraining
    grid = refused(make(tiny_data, weights, distill__frames=8), tmp_path)
    assert "not the InternVideo2-Ti that config.distill describes: frames is 4, not 8" in grid
    other = make(
        tiny_data, weights, distill__network="InternVideo2-1B", distill__teacher_blocks=(1, 3)
    )
    assert "width is 48, not 1408; depth is 4, not 40" in refused(other, tmp_path)
    ours = refused(make(tiny_data, finished.workdir), tmp_path)
    assert "a folder without model.safetensors" in ours
    lacking = shutil.copytree(weights, tmp_path / "lacking")
    tensors = safetensors.numpy.load_file(lacking / "model.safetensors")
    del tensors["blocks.2.mlp.fc1.weight"]
    safetensors.numpy.save_file(tensors, lacking / "model.safetensors")
    assert "missing: blocks.2.mlp.fc1.weight" in refused(make(tiny_data, lacking), tmp_path)
    absent = refused(make(tiny_data, tmp_path / "nowhere"), tmp_path)
    assert "nowhere" in absent and "no such file or folder" in absent
    missing = refused(make(tiny_data, ""), tmp_path)
    assert "no teacher: add --config.distill.teacher=WEIGHTS" in missing


def test_preflight(tiny_data, data, tmp_path, capsys):
    """The step with its teacher, and no evaluation."""
    from fluxvit_jax import preflight

    config = tiny.make_pretraining(tiny_data, data.teacher)
    config.preflight.topology = "cpu:1"
    config.preflight.bisect = False
    assert preflight.run(config, tmp_path) == 0
    report = json.loads((tmp_path / "preflight.json").read_text())["topologies"]["cpu:1"]
    assert list(report["programs"]) == ["training step"]
    assert report["programs"]["training step"]["memory"]["parts"]["teacher"] > 0
    flops = report["programs"]["training step"]["flops"]
    assert 1 <= flops["outside_attention_ratio"] < 2
