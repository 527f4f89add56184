"""Whole runs of distillation: they learn, go on after a kill, and fine-tuning starts from them."""

import contextlib
import io
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.loading import load_config
from fluxvit_jax.convert import teacher
from fluxvit_jax.data.pipeline import training_source
from fluxvit_jax.data.teacher_targets import open_cached_targets, pack
from fluxvit_jax.distributed.mesh import make_mesh, shard_batch
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import tasks
from fluxvit_jax.grids import capacity
from fluxvit_jax.objectives.base import check_objective, objective_class
from fluxvit_jax.objectives.flux_umt import DECODERS
from fluxvit_jax.training import cache_targets, train
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, initial_state
from fluxvit_jax.training.train_step import device_batch, make_objective, make_train_step
from tests import limited, tiny
from tests.training.test_train import grid_batch, saved_steps, split_of, steps_in

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
    """A finished run, and what it wrote to stderr."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    config = tiny.make_pretraining(tiny_data, data.teacher, data__train=data.mixture)
    with contextlib.redirect_stderr(io.StringIO()) as log:
        assert train.train(config, workdir) == 0
    return SimpleNamespace(workdir=workdir, log=log.getvalue())


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
def test_weight_decay_does_not_reach_the_teacher(tiny_data, data, compiled):
    """Steps that decay every kernel by half leave the teacher as it was loaded, to the bit."""
    config = tiny.make_pretraining(
        tiny_data, data.teacher, optim__weight_decay=0.5, optim__learning_rate=1.0,
        optim__warmup_learning_rate=1.0, train__budgets=(24,),
    )  # fmt: skip
    mesh, grids = make_mesh(config), admissible_grids(config)
    optimizer = make_optimizer(config, STEPS, abstract_params(config))
    state, frozen = (
        initial_state(config, optimizer, mesh),
        objective_class(config).load_frozen(config, mesh),
    )
    loaded = jax.tree.map(np.array, frozen)
    kernel = np.array(state["params"]["heads"]["kernel"])
    step = make_train_step(config, make_objective(config, grids, "cpu"), optimizer, mesh)
    batch = device_batch(grid_batch([grids[i] for i in (0, 7, 11, 5)], capacity(grids)))
    for _ in range(2):
        state, measured = step(state, frozen, shard_batch(batch, mesh))
    assert np.isfinite(measured["loss"])
    jax.tree.map(np.testing.assert_array_equal, frozen, loaded)
    teacher = {leaf.shape for leaf in jax.tree.leaves(loaded) if leaf.ndim > 2}
    assert teacher and not teacher & {leaf.shape for leaf in jax.tree.leaves(state["opt_state"])}
    # The loss does not reach the classifiers, so what changes them is the decay alone.
    np.testing.assert_allclose(state["params"]["heads"]["kernel"], kernel / 4, rtol=1e-5)


def test_stopped_and_resumed_is_as_undisturbed(
    pretrained, tiny_data, data, compiled, tmp_path, capsys
):
    """Masks and mixture included: the same metrics and parameters to the bit."""
    workdir = tmp_path / "run"
    process = start(tiny_data, data, workdir, compiled, "--config.data.workers=2")
    limited.wait_until(lambda: steps_in(workdir) >= 12, process)
    process.terminate()
    _, log = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, log
    assert f"stopped at step {saved_steps(workdir)[-1]}; the same command goes on" in log
    assert saved_steps(workdir)[-1] == steps_in(workdir) < STEPS
    config = tiny.make_pretraining(tiny_data, data.teacher, data__train=data.mixture)
    assert train.train(config, workdir) == 0
    assert "going on from step" in capsys.readouterr().err
    ours, theirs = workdir, pretrained.workdir
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    trees = [restore_params(w / "checkpoints/20", average=False) for w in (ours, theirs)]
    for own, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.slow
def test_fine_tuning_starts_from_it(pretrained, tiny_data, tmp_path, capsys):
    config = tiny.make_config(
        tiny_data, seed=1, train__init_from=str(pretrained.workdir), train__epochs=1,
        train__budgets=(24,), data__validation="",
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


def test_what_a_finished_run_says_to_type_next(tiny_data, data):
    for variant, name in (("Ti", "custom:tiny"), ("S", "k400:small"), ("B", "k400:base")):
        config = tiny.make_pretraining(tiny_data, data.teacher, model__variant=variant)
        (command,) = objective_class(config).next_commands(config, "RUN")
        assert command == f"main --config={name} --config.train.init_from=RUN"
        assert load_config(name).model.variant == variant


def test_pre_training_goes_on_with_the_decoders(pretrained, tiny_data, data, capsys):
    source = str(pretrained.workdir)
    config = tiny.make_pretraining(tiny_data, data.teacher, train__init_from=source)
    initial = objective_class(config).load_initial(config)
    trained = restore_params(pretrained.workdir)[DECODERS]
    jax.tree.map(np.testing.assert_array_equal, initial, {DECODERS: trained})
    other = {"distill__student_blocks": (1,), "distill__teacher_blocks": (3,)}
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in other.items()})
    assert objective_class(config).load_initial(config) == {}
    assert "its decoders are for other layers or another teacher" in capsys.readouterr().err


def test_it_has_no_classifier_to_evaluate(pretrained, tiny_data):
    with pytest.raises(UserError, match=r"is pre-trained and has no classifier; fine-tune from"):
        tasks.run(tiny.make_config(tiny_data), str(pretrained.workdir))


@pytest.mark.slow
def test_a_run_of_ours_can_be_the_teacher(pretrained, finished, tiny_data, tmp_path):
    """A supervised one, which has no decoders, is loaded; a step with a pre-trained one is made."""
    trees = []
    for workdir in (finished.workdir, pretrained.workdir):
        config = tiny.make_pretraining(
            tiny_data, workdir, distill__network="Ti", distill__frames=8, distill__resolution=56,
            distill__teacher_blocks=(0, 1), train__epochs=1, train__budgets=(24,),
        )  # fmt: skip
        frozen = objective_class(config).load_frozen(config, make_mesh(config))
        params = restore_params(workdir)
        jax.tree.map(np.testing.assert_array_equal, frozen["blocks"], params["blocks"])
        trees.append(jax.tree.structure(frozen))
    assert trees[0] == trees[1]
    assert train.train(config, tmp_path / "run") == 0


def refused(config, tmp_path) -> str:
    message = refused_by(train.train, config, tmp_path / "refused")
    assert not (tmp_path / "refused" / "config.json").exists()
    return message


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


@pytest.mark.slow
def test_preflight(tiny_data, data, tmp_path, capsys):
    """The step with its teacher, and no evaluation."""
    from fluxvit_jax import preflight

    config = tiny.make_pretraining(tiny_data, data.teacher, train__budgets=(24,))
    config.preflight.topology = "cpu:1"
    config.preflight.find_max_batch_size = False
    assert preflight.run(config, tmp_path) == 0
    report = json.loads((tmp_path / "preflight.json").read_text())["topologies"]["cpu:1"]
    assert list(report["programs"]) == ["training step"]
    assert report["programs"]["training step"]["memory"]["parts"]["frozen weights"] > 0
    flops = report["programs"]["training step"]["flops"]
    assert 1 <= flops["outside_attention_ratio"] < 2


# --- Lessons computed before


@pytest.fixture(scope="module")
def cached(tiny_data, data, tmp_path_factory):
    """A config whose plan repeats after two epochs, and a finished cache of it in small shards."""
    folder = tmp_path_factory.mktemp("cache")
    config = tiny.make_pretraining(
        tiny_data, data.teacher, data__train=data.mixture, data__sampling_period_epochs=2,
        distill__cache=str(folder), train__epochs=3, train__budgets=(24,),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_targets, "SHARD_BYTES", 250_000)
        assert cache_targets.run(config) == 0
    return config


@pytest.mark.slow
def test_a_run_from_the_cache_is_that_with_the_teacher(cached, compiled, tmp_path):
    """Also in later epochs, whose clips are those of the plan's, and by workers."""
    about = json.loads((Path(cached.distill.cache) / "cache.json").read_text())
    assert about["samples"] == 2 * 16 * 2 and about["shards"] > 1
    with_teacher = cached.copy_and_resolve_references()
    with_teacher.distill.cache = ""
    from_cache = cached.copy_and_resolve_references()
    from_cache.distill.teacher = ""  # not needed any more
    from_cache.data.workers = 1
    assert train.train(with_teacher, tmp_path / "teacher") == 0
    assert train.train(from_cache, tmp_path / "cache") == 0
    lines = [split_of(tmp_path / name, "train") for name in ("teacher", "cache")]
    for own, other in zip(*lines, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_caching_goes_on_where_it_stopped(cached, tmp_path, capsys, monkeypatch):
    folder = Path(shutil.copytree(cached.distill.cache, tmp_path / "cache"))
    shards = sorted(folder.glob("*.array_record"))
    before = shards[1].read_bytes()
    shards[1].unlink()
    about = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(about | {"finished": False}))
    config = cached.copy_and_resolve_references()
    config.distill.cache = str(folder)
    assert "holds no finished cache; make one with --mode=cache" in refused(config, tmp_path)
    monkeypatch.setattr(cache_targets, "SHARD_BYTES", 250_000)
    written = []
    monkeypatch.setattr(cache_targets, "pack", lambda *own: written.append(1) or pack(*own))
    assert cache_targets.run(config) == 0
    assert shards[1].read_bytes() == before
    assert 0 < len(written) < 64
    assert cache_targets.run(config) == 0
    assert "is finished: 64 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    "field, value, difference",
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("data.augment.flip", 0.25, "data.augment.flip: 0.5 -> 0.25"),
        ("data.sampling_period_epochs", 1, "data.sampling_period_epochs: 2 -> 1"),
        ("distill.teacher_blocks", (0, 3), r"distill.teacher_blocks: (1, 3) -> (0, 3)"),
        ("model.cls", "inside", "model.cls: outside -> inside"),
    ],
)
def test_a_cache_of_another_plan_is_refused(cached, tmp_path, field, value, difference):
    config = cached.copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    for message in (refused(config, tmp_path), refused_by(cache_targets.run, config)):
        assert f"was made with another plan ({difference})" in message


def test_other_videos_and_damage_are_refused(cached, tiny_data, tmp_path):
    config = cached.copy_and_resolve_references()
    config.data.train = f"{tiny_data}/train.csv"
    assert "another plan (videos: " in refused(config, tmp_path)
    folder = Path(shutil.copytree(cached.distill.cache, tmp_path / "cache"))
    config = cached.copy_and_resolve_references()
    config.distill.cache = str(folder)
    shard = sorted(folder.glob("*.array_record"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    lessons = open_cached_targets(config, training_source(config, labelled=False))
    assert f"{shard} and others: cannot be read" in refused_by(lessons.read, np.arange(2))
    shard.unlink()
    assert f"{shard} is missing" in refused(config, tmp_path)


def test_what_cannot_be_cached(tiny_data, data):
    def error(**changes):
        config = tiny.make_pretraining(tiny_data, data.teacher, distill__cache="x", **changes)
        return refused_by(check_objective, config)

    assert "add --config.data.sampling_period_epochs=1" in error()
    assert "leave distill.selector_features=teacher" in error(
        data__sampling_period_epochs=1, distill__selector_features="student"
    )
    assert "selector random chooses anew" in error(
        data__sampling_period_epochs=1, model__selector__kind="random"
    )
    assert "nothing to cache" in refused_by(cache_targets.run, tiny.make_config(tiny_data))
    untaught = tiny.make_pretraining(
        tiny_data, "", distill__cache="x", data__sampling_period_epochs=1
    )
    assert "no teacher: add" in refused_by(cache_targets.run, untaught)


def test_a_cache_of_another_teacher_is_refused(cached, tmp_path):
    config = cached.copy_and_resolve_references()
    config.distill.teacher = str(tmp_path / "other")
    for message in (refused(config, tmp_path), refused_by(cache_targets.run, config)):
        assert "was made by the teacher" in message and "name none" in message


def test_weights_put_in_the_teachers_place_are_noticed(
    cached, pretrained, tiny_data, data, tmp_path
):
    """By a cache that is half made and by a run that resumes; where they lie does not matter."""
    other = tiny.write_teacher(tmp_path / "teacher")
    workdir = Path(shutil.copytree(pretrained.workdir, tmp_path / "run"))
    moved = tiny.make_pretraining(tiny_data, other, data__train=data.mixture)
    assert train.train(moved, workdir) == 0  # finished, and these are the same weights
    params = teacher.read(other)
    state = {name: np.asarray(own) * 1.01 for name, own in params.state.items()}
    teacher.write(teacher.Teacher(state, params.config), other)
    folder = Path(shutil.copytree(cached.distill.cache, tmp_path / "cache"))
    about = json.loads((folder / "cache.json").read_text())
    half = about | {"finished": False, "teacher": str(other)}
    (folder / "cache.json").write_text(json.dumps(half))
    config = cached.copy_and_resolve_references()
    config.distill.cache, config.distill.teacher = str(folder), str(other)
    message = refused_by(cache_targets.run, config)
    assert f"{folder} was begun with other weights than those that {other} holds now" in message

    message = refused_by(train.train, moved, workdir)
    assert "other weights of the frozen teacher" in message


def refused_by(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
