"""Checkpoints on a real disk: round trips, kills, damage, other shardings, several processes."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.checkpoints.checkpointer import (
    Checkpoints,
    check_fit,
    find_fault,
    find_step,
    restore_params,
)
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.errors import UserError
from tests import limited

OPTIMIZER = optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))


def make_state(step: int, ema: bool = False) -> dict:
    params = {"w": jnp.full((64, 32), float(step)), "b": {"c": jnp.arange(3) / 7 + step}}
    state = {"params": params, "opt_state": OPTIMIZER.init(params), "step": jnp.int32(step)}
    return state | {"ema": jax.tree.map(lambda x: x / 2, params)} if ema else state


def shapes(state: dict) -> dict:
    return jax.eval_shape(lambda: state)


def save_steps(workdir, steps, keep=2, top1=None, ema=False) -> None:
    with Checkpoints(workdir, keep=keep, every=1) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step, ema), {"step": step}, {})
            if top1 and step in top1:
                checkpoints.rate(step, {"top1": top1[step]})


def restored_step(workdir) -> int:
    step, state, data = Checkpoints(workdir, 2, 1).restore_latest(shapes(make_state(0)))
    assert data == {"step": step}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
    return step


def test_steps_that_have_changed_names_are_damaged(tmp_path):
    save_steps(tmp_path, [1, 2, 3], keep=3)
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "other")
    (folder / "3").rename(folder / "2")
    (folder / "other").rename(folder / "3")
    assert find_fault(epath.Path(folder / "3")) == "it is step 2, renamed"
    assert restored_step(tmp_path) == 1
    assert kept(tmp_path) == ["1", "2.damaged", "3.damaged"]


def kept(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def a_state_file(workdir, step: int) -> Path:
    """A file with array values in it."""
    folder = workdir / "checkpoints" / str(step) / "state/ocdbt.process_0/d"
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def flip_a_bit(path, at=None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 16
    path.write_bytes(bytes(data))


def test_round_trip_while_the_state_is_donated(tmp_path):
    config, state = default_config(), make_state(7, ema=True)
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1, every=5) as checkpoints:
        checkpoints.save(7, state, {"next": 8}, config)
        for _ in range(20):
            state = overwrite(state)
        step, restored, data = checkpoints.restore_latest(shapes(state))
    assert (step, data) == (7, {"next": 8, "step": 7})
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    as_json = json.loads(json.dumps(config.to_dict()))
    assert checkpointer.restore(tmp_path).config == as_json


def test_due():
    checkpoints = Checkpoints("unused", keep=1, every=5)
    assert [step for step in range(1, 12) if checkpoints.due(step)] == [5, 10]


def test_an_empty_workdir_has_nothing(tmp_path):
    assert Checkpoints(tmp_path, 1, 1).restore_latest(shapes(make_state(0))) is None


def test_latest_and_best_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, top1={2: 0.9, 4: 0.5, 6: 0.7})
    assert kept(tmp_path) == ["2", "6", "7"]
    save_steps(tmp_path, [8, 9], keep=2, top1={9: 0.95})  # another process of the same run
    assert kept(tmp_path) == ["2", "8", "9"]  # what is no longer the best goes with the next save
    save_steps(tmp_path, [10], keep=2)
    assert kept(tmp_path) == ["10", "9"]


def test_saving_a_step_twice_leaves_the_first(tmp_path):
    save_steps(tmp_path, [3])
    save_steps(tmp_path, [3], top1={3: 0.5})
    assert restored_step(tmp_path) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no checksums", "bad checksums"])
def test_damage_falls_back_to_the_step_before(tmp_path, damage, caplog):
    save_steps(tmp_path, [1, 2])
    file, checksums = a_state_file(tmp_path, 2), tmp_path / "checkpoints/2/checksums.json"
    match damage:
        case "flip":
            flip_a_bit(file)
        case "truncate":
            file.write_bytes(file.read_bytes()[:-1])
        case "delete":
            file.unlink()
        case "no checksums":
            checksums.unlink()
        case "bad checksums":
            flip_a_bit(checksums, at=0)
    with caplog.at_level("WARNING"):
        assert restored_step(tmp_path) == 1
    warning = next(r.getMessage() for r in caplog.records if "damaged" in r.getMessage())
    assert warning.endswith("going on from step 1")
    assert "\n" not in warning
    assert kept(tmp_path) == ["1", "2.damaged"]
    save_steps(tmp_path, [2])  # the run goes on and comes by here again
    assert restored_step(tmp_path) == 2


def test_a_flipped_bit_in_any_file_is_found_or_harmless(tmp_path):
    save_steps(tmp_path, [1], top1={1: 0.5})
    step = epath.Path(tmp_path) / "checkpoints/1"
    files = [path for path in (tmp_path / "checkpoints/1").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        whole = path.read_bytes()
        flip_a_bit(path)
        if find_fault(step) is None:  # Orbax's own two files, which hold nothing of the state
            assert path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
            assert restored_step(tmp_path) == 1
            save_steps(tmp_path, [1])
        path.write_bytes(whole)
    assert find_fault(step) is None


def test_no_intact_step_is_an_error_and_touches_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        flip_a_bit(a_state_file(tmp_path, step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        Checkpoints(tmp_path, 2, 1).restore_latest(shapes(make_state(0)))
    assert kept(tmp_path) == ["1", "2"]


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    save_steps(tmp_path, [1])
    other = make_state(0)
    other["params"]["w"] = jnp.zeros((64, 33))
    other["params"]["new"] = jnp.zeros(2)
    del other["params"]["b"]
    with pytest.raises(UserError) as error:
        Checkpoints(tmp_path, 1, 1).restore_latest(shapes(other))
    message = str(error.value)
    assert "\n" not in message
    assert "missing: params.new;" in message
    assert "unexpected: params.b.c;" in message
    assert message.endswith("wrong shape: params.w float32[64, 32] instead of float32[64, 33]")


def test_many_differences_are_counted():
    found = {f"p{i:02}": jnp.zeros(1) for i in range(20)}
    with pytest.raises(UserError, match=r"unexpected: p00, p01, p02, p03, p04 and 15 more$"):
        check_fit(found, {}, "file")
    check_fit(found, shapes(found), "file")


def test_weights_of_the_best_step(tmp_path):
    save_steps(tmp_path, [1, 2, 3], keep=2, top1={1: 0.8, 2: 0.7})
    params = restore_params(tmp_path)
    assert find_step(tmp_path).name == "1"
    assert params["w"].dtype == np.float32 and type(params["w"]) is np.ndarray
    jax.tree.map(np.testing.assert_array_equal, params, make_state(1)["params"])
    np.testing.assert_array_equal(restore_params(tmp_path / "checkpoints/3")["w"][0, 0], 3)

    flip_a_bit(a_state_file(tmp_path, 1))
    assert find_step(tmp_path / "checkpoints").name == "2"
    with pytest.raises(UserError, match="1 is damaged: the checksum of state"):
        restore_params(tmp_path / "checkpoints/1")
    assert kept(tmp_path) == ["1", "2", "3"]  # reading changes nothing


def test_weights_are_the_moving_average(tmp_path):
    save_steps(tmp_path, [4], ema=True)
    assert restore_params(tmp_path)["w"][0, 0] == 2
    assert restore_params(tmp_path, average=False)["w"][0, 0] == 4


def test_weights_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_params(tmp_path / "absent")


# Orbax gives up at the first failed write; those still under way end in a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_line(tmp_path):
    save_steps(tmp_path, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)  # random values do not compress
    state = make_state(2) | {"ema": {"x": jnp.asarray(rng.random((500, 500), np.float32))}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"checkpoints/2 could not be written: .+") as error:
            checkpoints = Checkpoints(tmp_path, 1, 1)
            checkpoints.save(2, state, {"step": 2}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert restored_step(tmp_path) == 1


CHILD = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from fluxvit_jax.checkpoints import checkpointer as checkpoint
    from test_checkpointer import Checkpoints, make_state, shapes

    workdir, last, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    write = checkpoint.write_checksums

    def killing_write(folder):
        if folder.name.startswith(f"{{last}}."):
            if moment == "checksums written":
                write(folder)
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    if moment != "any":
        checkpoint.write_checksums = killing_write
    with Checkpoints(workdir, keep=1, every=1) as checkpoints:
        found = checkpoints.restore_latest(shapes(make_state(0)))
        for step in range(found[0] + 1 if found else 1, last + 1):
            checkpoints.save(step, make_state(step), {{"step": step}}, {{}})
            print(step, flush=True)
"""


def start_child(workdir, last: int, moment: str = "any") -> limited.Process:
    code = textwrap.dedent(CHILD).format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, str(workdir), str(last), moment]
    return limited.Process(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["all but checksums written", "checksums written"])
def test_killed_between_write_and_rename(tmp_path, moment):
    child = start_child(tmp_path, 3, moment)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert "3.orbax-checkpoint-tmp" in kept(tmp_path)
    assert restored_step(tmp_path) == 2
    save_steps(tmp_path, [3], keep=1)
    assert kept(tmp_path) == ["3"]  # what the kill left is swept up


def test_killed_at_random_moments(tmp_path):
    """With `keep=1`, so that the step before is being deleted around the same time."""
    rng, last = np.random.default_rng(0), 0
    for _ in range(3):
        child = start_child(tmp_path, 10**6)
        for _ in range(rng.integers(2, 8)):
            announced = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.communicate()
        step = restored_step(tmp_path)
        assert step >= max(last, announced - 1)  # `announced` was perhaps still being written
        last = step


SHARDED = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from fluxvit_jax.checkpoints.checkpointer import Checkpoints, restore_params

    workdir, processes, index, port = sys.argv[1], *map(int, sys.argv[2:])
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{{port}}", processes, index)
    assert jax.device_count() == 4
    values = np.arange(64.0, dtype=np.float32).reshape(8, 8)

    def place(shape, spec):
        sharding = NamedSharding(jax.make_mesh(shape, ("data", "fsdp")), spec)
        return jax.make_array_from_callback((8, 8), sharding, lambda index: values[index])

    with Checkpoints(workdir, keep=2, every=1) as checkpoints:
        for step in (1, 2):
            state = {{"params": {{"w": place((4, 1), P("data"))}}}}
            checkpoints.save(step, state, {{}}, {{}})
        checkpoints.wait()
        if index == 0:
            folder = checkpoints._folder / "2"
            (folder / "data/metadata").write_text("flipped")
        target = place((2, 2), P("fsdp", "data"))
        abstract = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=target.sharding)
        step, state, _ = checkpoints.restore_latest({{"params": {{"w": abstract}}}})
        w = state["params"]["w"]
        assert step == 1 and w.sharding == target.sharding
        for shard in w.addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index])
        checkpoints.save(2, state, {{}}, {{}})
    np.testing.assert_array_equal(restore_params(workdir)["w"], values)
    assert checkpoints.restore_latest({{"params": {{"w": abstract}}}})[0] == 2
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_another_sharding(tmp_path, processes):
    """Saved over four devices one way, restored another way, by one and by two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    code = textwrap.dedent(SHARDED).format()
    children = [
        limited.Process(
            [sys.executable, "-c", code, str(tmp_path), str(processes), str(index), str(port)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    for child in children:
        _, errors = child.communicate()
        assert child.returncode == 0, errors


def test_a_user_without_a_name_saves_as_well(tmp_path, monkeypatch):
    """As in a container that runs under a number."""

    def unknown(_):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    save_steps(tmp_path, [1])
    assert restored_step(tmp_path) == 1
