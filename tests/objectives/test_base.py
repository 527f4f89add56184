"""An objective from outside the package trains, resumes, shards and is preflighted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.convert import weight_files
from fluxvit_jax.distributed.mesh import AXES
from fluxvit_jax.objectives.base import multi_budget_value_and_grad, objective_class
from fluxvit_jax.training import train
from tests import limited, tiny
from tests.objectives import toy

PACKAGE = Path(train.__file__).parents[1]
MESH = ("--config.parallel.mesh.fsdp=2", "--config.parallel.mesh.tensor=2")


def start(folder, workdir, cache, *options, devices=1) -> limited.Process:
    return limited.Process(
        [
            *(sys.executable, "-m", "fluxvit_jax.main", f"--config={toy.__file__}:{folder}"),
            *(f"--workdir={workdir}", *options),
        ],
        env=tiny.environment(cache, devices),
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(tiny_data, compiled, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    assert train.train(toy.get_config(str(tiny_data)), workdir) == 0
    return workdir


def losses(workdir) -> list[float]:
    lines = tiny.read_lines(workdir / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_it_trains(trained):
    found = losses(trained)
    assert len(found) == 20 and np.mean(found[-4:]) < 0.8 * np.mean(found[:4])
    kernel = restore_params(trained)["toy"]["kernel"]
    fresh = objective_class(toy.get_config(".")).init_params(None, jax.random.key(0))
    assert kernel.shape == fresh["toy"]["kernel"].shape


def test_it_is_resumed(trained, tiny_data, tmp_path):
    """The metrics, with validation at steps 16 and 20, are the same bytes."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    for step in (workdir / "checkpoints").iterdir():
        if step.name.isdigit() and int(step.name) > 18:
            shutil.rmtree(step)
    assert train.train(toy.get_config(str(tiny_data)), workdir) == 0
    same = [(w / "metrics.jsonl").read_bytes() for w in (workdir, trained)]
    assert same[0] == same[1]


def test_it_is_cut_over_a_mesh(trained, tiny_data, compiled, tmp_path):
    """The loss compares all clips of a batch, wherever they lie."""
    process = start(
        *(tiny_data, tmp_path / "run", compiled, *MESH, "--config.data.validation="),
        *("--config.checkpoint.every_steps=1000", "--config.train.epochs=2"),
        devices=4,
    )
    _, log = process.communicate()
    assert process.returncode == 0, log
    np.testing.assert_allclose(losses(tmp_path / "run")[:5], losses(trained)[:5], rtol=1e-4)


@pytest.mark.slow
def test_it_is_preflighted(tiny_data, compiled, tmp_path):
    options = ("--mode=preflight", "--config.preflight.topology=cpu:4", *MESH)
    options += (
        "--config.eval.settings=((24,6,42),)",
        "--config.preflight.find_max_batch_size=False",
    )
    process = start(tiny_data, tmp_path, compiled, *options)
    out, log = process.communicate()
    assert process.returncode == 0, out + log
    report = json.loads((tmp_path / "preflight.json").read_text())["topologies"]["cpu:4"]
    assert report["fits"] and report["programs"]


def test_its_weights_are_those_of_a_network(trained, tmp_path):
    """Converted without what the objective added."""
    weight_files.write(read_weights(trained), tmp_path / "folder")
    assert not any("toy" in name for name in read_weights(tmp_path / "folder").state)


def test_no_objective_is_named_elsewhere():
    """Flux-UMT's section of the config is read by its own files alone."""
    allowed = {"flux_umt.py", "flux_umt_teacher.py", "teacher_targets.py", "cache_targets.py"}
    allowed.add("command_line.py")  # an example of --mode=cache
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name not in {*allowed, "fields.py"}:
            assert "config.distill" not in text and "is_distillation" not in text, path
            assert "flux_umt" not in text or path.name == "fields.py", path


def value_and_grad_on(platform: str, fsdp: int):
    """`multi_budget_value_and_grad` of two small budgets, jitted for a mesh of such devices."""
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    axes = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((1, fsdp, 1), AXES, axis_types=axes, abstract_device=device)

    def positions(params):
        return [2 * params["position"], 3 * params["position"]]

    def loss_at(params, position, i, carry):
        out = jnp.tanh(position @ params["weight"])
        loss = jnp.mean((out - i) ** 2) if carry is None else jnp.mean(jnp.abs(out - carry))
        return loss, ({"largest": jnp.max(out)}, out)

    def both(params):
        with jax.sharding.use_abstract_mesh(mesh):
            return multi_budget_value_and_grad(loss_at, positions, params, (64, 32))

    return jax.jit(both)


@pytest.mark.parametrize(
    ("platform", "fsdp", "branches"), [("tpu", 4, 2), ("tpu", 1, 0), ("cpu", 4, 0)]
)
def test_budgets_of_fsdp_on_tpus_are_branches(platform, fsdp, branches):
    """The TPU compiler would otherwise start them together; the numbers are the same."""
    params = {
        name: jax.random.normal(jax.random.key(seed), (8, 8))
        for seed, name in enumerate(("position", "weight"))
    }
    compared = value_and_grad_on(platform, fsdp)
    assert compared.lower(params).as_text().count("stablehlo.case") == branches
    jax.tree.map(
        np.testing.assert_array_equal, compared(params), value_and_grad_on("cpu", 1)(params)
    )
