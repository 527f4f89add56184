"""launch/local.sh: a real run on two devices; several hosts with a stand-in for the program."""

import re
import signal
import subprocess
import sys
import time

import pytest

from tests import limited, tiny
from tests.launch.recorder import LAUNCH, ROOT, commands, error_line

PROGRAM = ("--", "--config=configs/demo.py", "--workdir=runs/x")
TRAIN = "python -m fluxvit_jax.main --config=configs/demo.py --workdir=runs/x"

# Notes its arguments and the signals it gets; host 1 ends as the file `end` says.
HOST = f"""#!{sys.executable} -SE
import os, pathlib, signal, sys, time
if "-c" in sys.argv:
    sys.exit()
home, host = pathlib.Path.home(), sys.argv[-1][-1]
def note(number, _):
    with open(home / f"signals-{{host}}", "a") as file:
        file.write(f"{{number}}\\n")
    time.sleep(0.3)
    sys.exit(128 + number)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
(home / f"host-{{host}}").write_text(" ".join([*sys.argv[1:], os.environ["XLA_FLAGS"]]))
for _ in range(1500):
    if host == "1" and (home / "end").exists():
        sys.exit(int((home / "end").read_text()))
    time.sleep(0.02)
"""


def test_dry_run(recorders):
    run = recorders.run
    assert commands(run("local.sh", "--dry-run", *PROGRAM)) == [TRAIN]
    named = commands(run("local.sh", "--dry-run", *PROGRAM, PYTHON="/env/bin/python"))
    assert named == [f"/env/bin/{TRAIN}"]
    flags = "--xla_force_host_platform_device_count=8"
    meshed = commands(run("local.sh", "--cpu-devices=8", "--dry-run", *PROGRAM))
    assert meshed == [f"env JAX_PLATFORMS=cpu XLA_FLAGS={flags} {TRAIN}"]
    more = run("local.sh", "--cpu-devices=8", "--dry-run", *PROGRAM, XLA_FLAGS="--a=b")
    assert commands(more) == [f"env JAX_PLATFORMS=cpu 'XLA_FLAGS=--a=b {flags}' {TRAIN}"]


def test_dry_run_of_hosts(recorders):
    lines = commands(recorders.run("local.sh", "--hosts=3", "--dry-run", *PROGRAM))
    ports = {re.search(r"--coordinator=127.0.0.1:(\d+)", line)[1] for line in lines}
    assert len(ports) == 1 and [line[-18:] for line in lines] == [
        f"--hosts=3 --host={host}" for host in range(3)
    ]
    assert all(" XLA_FLAGS=--xla_force_host_platform_device_count=1 " in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hosts=0"], "--hosts=0: not a number of hosts"),
        (["--hosts=two"], "--hosts=two: not a number of hosts"),
        (["--cpu-devices=-1"], "--cpu-devices=-1: not a number of devices"),
        (["--devices=1"], "--devices=1: no such option"),
    ],
)
def test_a_wrong_option(words, message, recorders):
    assert message in error_line(recorders.run("local.sh", *words, "--dry-run", *PROGRAM))


def test_the_package_is_missing(recorders):
    recorders.install("python", "#!/usr/bin/env bash\nexit 1\n")
    assert "not installed for python" in error_line(recorders.run("local.sh", *PROGRAM))


@pytest.fixture
def hosts(recorders):
    """Starts three hosts and gives what started them, once all of them run."""
    recorders.install("python", HOST)
    started = limited.Process(
        [LAUNCH / "local.sh", "--hosts=3", "--cpu-devices=2", *PROGRAM],
        env=recorders.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    home = recorders.folder.parent
    files = [home / f"host-{host}" for host in range(3)]
    for _ in range(500):
        if all(file.exists() and file.read_text() for file in files):
            break
        time.sleep(0.02)
    for host, file in enumerate(files):
        assert re.search(rf"--workdir=runs/x .*--hosts=3 --host={host} ", file.read_text())
        assert file.read_text().endswith("--xla_force_host_platform_device_count=2")
    yield started
    started.kill()


def test_all_end_when_one_fails(hosts, tmp_path):
    (tmp_path / "end").write_text("3")
    _, err = hosts.communicate()
    assert hosts.returncode == 3 and "host 1 ended with status 3: stopping the others" in err
    assert (tmp_path / "signals-0").read_text() == (tmp_path / "signals-2").read_text() == "15\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_host_once(number, hosts, tmp_path):
    hosts.send_signal(number)
    _, err = hosts.communicate()
    assert hosts.returncode == 128 + number, err
    for host in range(3):
        assert (tmp_path / f"signals-{host}").read_text() == f"{number.value}\n"


@pytest.mark.slow
def test_a_run_on_two_devices(tiny_data, compiled, tmp_path):
    """The program itself, through the script, to the end of an epoch."""
    environment = tiny.environment(compiled) | {"PYTHON": sys.executable}
    words = [f"--config={tiny.__file__}:{tiny_data}", f"--workdir={tmp_path}/run"]
    words += ["--config.train.epochs=1", "--config.train.warmup_epochs=0.5"]
    words += ["--config.train.budgets=(24,)", "--config.data.validation="]
    words += ["--config.parallel.mesh.fsdp=2"]  # refused on one device
    done = limited.run(
        [LAUNCH / "local.sh", "--cpu-devices=2", "--", *words],
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = tiny.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(line["step"] for line in lines) == 4
