"""Several processes on one machine: how they join, agree and end, and who has which clips."""

import json
import os
import re
import signal
import socket
import textwrap

import pytest

from fluxvit_jax.distributed.hosts import _local_devices, start
from fluxvit_jax.distributed.watchdog import STATUS
from fluxvit_jax.errors import UserError
from tests import hosts, tiny

JOB = os.getpid() % 4000  # of SLURM; tests that run at the same time have others


# --- How hosts find each other

STARTED = """
import sys
import jax
from fluxvit_jax.distributed import hosts as distributed

flags = [argument.partition("=")[2] for argument in sys.argv[1:]]
distributed.start(*flags[:1], *map(int, flags[1:]))
distributed.barrier()
joined = jax.distributed.is_initialized()
print(jax.process_index(), jax.process_count(), jax.device_count(), joined)
"""


SHORT = """
from fluxvit_jax.distributed import hosts
hosts.NOTICE_SECONDS, hosts.CONNECT_SECONDS = 1, 2
"""


def slurm(task: int, tasks: int, job: int) -> dict[str, str]:
    """What srun sets in the environment of a task, all of one node."""
    own = {"JOB_ID": job, "NTASKS": tasks, "PROCID": task, "LOCALID": task, "STEP_NUM_NODES": 1}
    return {f"SLURM_{name}": str(value) for name, value in own.items()} | {
        "SLURM_STEP_NODELIST": "localhost"
    }


@pytest.mark.parametrize(
    ("environments", "flags", "expected"),
    [
        # JAX takes the port from the number of the job.
        ((slurm(0, 2, JOB), slurm(1, 2, JOB)), False, ["0 2 4 True", "1 2 4 True"]),
        ((slurm(0, 1, JOB + 1),), False, ["0 1 2 True"]),
        (({},), True, ["0 1 2 True"]),
        # Within a job of SLURM the flags hold as well.
        ((slurm(0, 1, JOB + 2), slurm(0, 1, JOB + 2)), True, ["0 2 4 True", "1 2 4 True"]),
        (({},), False, ["0 1 2 False"]),
    ],
    ids=["slurm", "slurm, one task", "flags, one host", "flags within slurm", "alone"],
)
def test_hosts_find_each_other(compiled, tmp_path, environments, flags, expected):
    ended = hosts.run(
        tmp_path,
        compiled,
        code=STARTED,
        devices=2,
        flags=flags,
        folders=[tiny.ROOT] * len(environments),
        environments=environments,
    )
    assert [own.out.strip() for own in ended] == expected, ended[0].err


@pytest.mark.parametrize(
    "environment",
    [
        # The shell of salloc: a step of one task, with the number of tasks of the allocation.
        slurm(0, 4, JOB + 3) | {"SLURM_STEP_NUM_TASKS": "1"},
        {k: v for k, v in slurm(0, 4, JOB + 3).items() if k != "SLURM_STEP_NUM_NODES"},
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of sbatch
    ],
    ids=["salloc", "variables alone", "sbatch"],
)
def test_without_srun_a_process_of_slurm_is_alone(compiled, tmp_path, environment):
    (alone,) = hosts.run(
        tmp_path,
        compiled,
        code=STARTED,
        devices=2,
        flags=False,
        folders=hosts.ROOTS[:1],
        environments=(environment,),
    )
    assert alone.out.strip() == "0 1 2 False", alone.err
    assert "SLURM_NTASKS is 4, but srun did not start this process: it runs alone" in alone.err


def test_a_wait_for_other_hosts_is_said(compiled, tmp_path):
    """Also where a task of SLURM's waits for tasks that nobody started."""
    (alone,) = hosts.run(
        tmp_path,
        compiled,
        code=SHORT + STARTED,
        flags=False,
        folders=hosts.ROOTS[:1],
        environments=(slurm(1, 2, JOB + 4) | {"SLURM_STEP_NUM_TASKS": "2"},),
    )
    assert "waiting for the other processes of this program, up to 2 s" in alone.err
    assert "UserError: host 0 did not answer at localhost:" in alone.err


def test_a_task_with_a_node_to_itself_has_all_its_devices(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    assert _local_devices() is None
    for tasks, expected in (("2", []), ("16", None)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
        assert _local_devices() == expected
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "3")
    assert _local_devices() is None  # JAX reads it


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", 0, -1), "--coordinator=ADDRESS:PORT, --hosts=N and --host=I go toge"),
        (("", 2, 0), "--coordinator=ADDRESS:PORT, --hosts=N and --host=I go together"),
        (("localhost", 2, 0), "--coordinator=ADDRESS:PORT, --hosts=N and --host=I go together"),
        (("localhost:1234", 2, 2), "--host=2: hosts are numbered from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        start(*given)


def test_hosts_that_never_come(compiled, tmp_path):
    (alone,) = hosts.run(
        tmp_path,
        compiled,
        *("--coordinator=localhost:1", "--hosts=2", "--host=1"),
        code=SHORT + STARTED,
        flags=False,
        folders=hosts.ROOTS[:1],
        environments=({},),
    )
    assert alone.status
    assert "UserError: host 0 did not answer at localhost:1 within 2 s ([Errno 111]" in alone.err


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, slurm(0, 2, JOB + 5)], ids=["flags", "slurm"])
def test_a_port_in_use(compiled, tmp_path, environment):
    """Host 0 says so at once, where JAX would crash; the others hear nothing from there."""
    port = 61440 + (JOB + 5) % 4096 if environment else 0  # JAX's, of a job
    with socket.create_server(("localhost", port)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--coordinator=localhost:{port}", "--hosts=2", "--host="]
        both = [
            hosts.run(
                tmp_path / str(host),
                compiled,
                *([] if environment else [*flags[:2], f"{flags[2]}{host}"]),
                code="from fluxvit_jax.distributed import hosts\nhosts.CONNECT_SECONDS = 2"
                + STARTED,
                flags=False,
                folders=hosts.ROOTS[:1],
                environments=(environment,),
            )[0]
            for host in ((0,) if environment else (0, 1))
        ]
    line = f"UserError: host 0 cannot listen at port {port} for localhost:{port}: Address already"
    assert line in both[0].err
    for waited in both[1:]:
        assert f"UserError: the hosts did not all reach localhost:{port} within 2 s" in waited.err


# --- How hosts agree

AGREEMENT = """
import sys

from etils import epath

from fluxvit_jax.distributed import hosts as distributed, mesh as parallel
from fluxvit_jax.errors import UserError

folder = epath.Path(sys.argv[1])
coordinator, hosts, host = (argument.partition("=")[2] for argument in sys.argv[2:])
distributed.SHARED_SECONDS = 1


def refuse(host):
    if host == parallel.host_index():
        raise UserError("not here")


def refuse_together(host):
    with distributed.raise_on_all_hosts():
        refuse(host)


def said(function, *arguments):
    try:
        print(function(*arguments))
    except UserError as error:
        print(error)


with distributed.joined(coordinator, int(hosts), int(host)):
    here = parallel.host_index()
    for number in range(12):
        assert parallel.gather([number] * here) == [number]
    assert parallel.gather([here * "é"  * 500_000]) == ["", 500_000 * "é"]
    assert distributed.broadcast_from_host0(here) == distributed.compute_on_host0(lambda: here) == 0

    shared, own = folder / "shared", folder / str(here) / "config.json"
    if here == 0:
        shared.write_text("of all")
        own.parent.mkdir()
        own.write_text("of host 0")
    said(distributed.check_shared, shared)
    said(distributed.check_shared, own)

    said(refuse_together, 1)
    said(refuse_together, None)
    said(distributed.compute_on_host0, lambda: refuse(0))
    said(distributed.compute_on_host0, lambda: refuse(1))
    said(distributed.check_same, {"seed": 1, "config": 100 * "x"})
    said(distributed.check_same, {"seed": here, "config": 100 * "x"})
    said(distributed.check_same, {"config": 100 * "x" + str(here), "seed": here})
"""


def test_agreement(compiled, tmp_path):
    both = hosts.run(tmp_path / "logs", compiled, str(tmp_path), code=AGREEMENT)
    assert [ended.status for ended in both] == [0, 0], both[0].err + both[1].err
    first, second = (ended.out.splitlines() for ended in both)
    assert first[0] == second[0] == "None"
    assert second[1].startswith(f"there is no {tmp_path}/1/config.json here, which host 0 has")
    assert second[1].endswith("the workdir must be on storage that all hosts share")
    assert first[1] == f"host 1: {second[1]}"
    assert (first[2], second[2]) == ("host 1: not here", "not here")
    assert (first[4], second[4]) == ("not here", "host 0: not here")
    assert first[3] == second[3] == first[5] == second[5] == first[6] == second[6] == "None"
    assert first[7] == "host 1 has another seed than host 0, 1 and not 0; start all hosts alike"
    assert re.fullmatch(
        r"host 1 has another config than host 0, \w{8} and not \w{8}; start all hosts alike",
        first[8],
    )
    assert first[7:] == second[7:]


# --- How hosts end


def test_another_config_on_one_host(tiny_data, compiled, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        textwrap.dedent(
            f"""
            import os
            from tests.tiny import get_config as tiny

            def get_config():
                config = tiny({str(tiny_data)!r})
                config.seed += "OTHER" in os.environ
                return config
            """
        )
    )
    command = [f"--config={recipe}", f"--workdir={tmp_path}/run"]
    both = hosts.run(
        tmp_path / "logs", compiled, *command, environments=({}, {"OTHER": "on this host"})
    )
    for ended in both:
        assert ended.status == 2, ended.err
        (error,) = ended.errors
        assert "host 1 has another config than host 0, " in error and error.endswith("alike")
    assert not (tmp_path / "run").exists()


# Two hosts, of which one ends while the other waits for it, in a collective of their devices.
ONE_ENDS = """
import os
import signal
import sys
from types import SimpleNamespace

from jax.experimental import multihost_utils

from fluxvit_jax import main
from fluxvit_jax.distributed import hosts as distributed
from fluxvit_jax.distributed.mesh import host_index

distributed.HEARTBEAT_SECONDS = 5


def run(config, workdir, accept_data_change, fresh):
    multihost_utils.sync_global_devices("both are here")
    if host_index() == {host}:
        {end}
    multihost_utils.sync_global_devices("never")


sys.modules["fluxvit_jax.training.train"] = SimpleNamespace(train=run)
sys.exit(main.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "end", "status", "message"),
    [
        (1, "raise ValueError('a mistake')", 1, "ValueError: a mistake; the log of that host has"),
        (0, "os.kill(os.getpid(), signal.SIGTERM)", 143, "was stopped by SIGTERM"),
    ],
)
def test_the_end_of_one_host_is_that_of_all(
    tiny_data, compiled, tmp_path, host, end, status, message
):
    code = ONE_ENDS.format(host=host, end=end)
    command = [f"--config={tiny.__file__}:{tiny_data}", f"--workdir={tmp_path}/run"]
    ended = hosts.run(tmp_path, compiled, *command, code=code)
    other = ended[1 - host]
    assert [own.status for own in ended] == [status, status]
    assert [f"error: host {host}: {message}" in error for error in other.errors] == [True]


@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_is_killed(tiny_data, compiled, tmp_path, host):
    """The others say so at once, and end before JAX aborts them."""
    code = ONE_ENDS.format(host=host, end="os.kill(os.getpid(), signal.SIGKILL)")
    three = hosts.run(
        tmp_path,
        compiled,
        *(f"--config={tiny.__file__}:{tiny_data}", f"--workdir={tmp_path}/run"),
        code=code.replace("distributed.HEARTBEAT_SECONDS = 5", ""),
        devices=1,
        folders=[tiny.ROOT] * 3,
        environments=({}, {}, {}),
    )
    assert three.pop(host).status == -signal.SIGKILL
    for other in three:
        assert other.status == STATUS
        (line,) = other.err.splitlines()
        assert line.startswith(f"error: host {host} has died without a word: it was killed, ")


# --- Who has which clips


ROWS = """
import json
import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fluxvit_jax.distributed import hosts as distributed, mesh as parallel

coordinator, hosts, host = (argument.partition("=")[2] for argument in sys.argv[1:])
distributed.start(coordinator, int(hosts), int(host))
here, devices = parallel.host_index(), jax.devices()
orders = {"by host": devices, "in turn": [devices[n] for n in (0, 4, 1, 5, 2, 6, 3, 7)]}
everything = np.arange(48, dtype=np.int32).reshape(16, 3)
told = {}
for order, shape in json.loads(ORDERS):
    own = np.array(orders[order]).reshape(shape)
    mesh = Mesh(own, parallel.AXES, axis_types=(AxisType.Auto,) * 3)
    rows = parallel.local_row_indices(mesh, 16)
    placed = parallel.shard_batch({"x": everything[rows], "host": np.full(len(rows), here)}, mesh)
    whole = jax.jit(lambda x: x, out_shardings=parallel.replicated(mesh))(placed["x"])
    np.testing.assert_array_equal(whole, everything)
    np.testing.assert_array_equal(parallel.local_rows(placed["x"]), everything[rows])
    assert jax.jit(partial(parallel.global_max, mesh=mesh))(placed["host"]) == 1
    cut = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
    laid = parallel.device_put_global({"w": everything}, {"w": cut})["w"]
    for shard in laid.addressable_shards:
        np.testing.assert_array_equal(shard.data, everything[shard.index])
    told[order + str(shape)] = rows.tolist()
print(json.dumps(told))
"""
MESHES = {
    ("by host", (8, 1, 1)): [range(8), range(8, 16)],
    ("in turn", (8, 1, 1)): [[row for row in range(16) if row // 2 % 2 == host] for host in (0, 1)],
    ("by host", (2, 2, 2)): [range(8), range(8, 16)],
    ("in turn", (2, 2, 2)): [range(16), range(16)],
    ("by host", (1, 1, 8)): [range(16), range(16)],
    ("in turn", (1, 4, 2)): [range(16), range(16)],
}


def test_hosts_have_the_clips_that_their_devices_see(compiled, tmp_path):
    """On meshes that are cut between hosts along any axis: `parallel` as its users call it."""
    code = f"ORDERS = {json.dumps(list(MESHES))!r}\n" + ROWS
    for host, ended in enumerate(hosts.run(tmp_path, compiled, code=code, devices=4)):
        assert ended.status == 0, ended.err
        told = json.loads(ended.out.splitlines()[-1])
        for (order, shape), rows in MESHES.items():
            assert told[f"{order}{list(shape)}"] == list(rows[host]), (order, shape)
