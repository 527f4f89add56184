"""launch/slurm_gpu.sh against recorders of sbatch, squeue, srun and scontrol."""

import re
import shutil

import pytest

from tests.launch.recorder import LAUNCH, ROOT, Answer, commands

PROGRAM = ("--", "--config=configs/k400.py:base", "--workdir=/shared/run")
OPTIONS = ("--nodes=2", "--gpus-per-node=8", "--cpus-per-task=64")
QUEUE = "squeue --me --name={} --noheader --format=%i"
SUBMIT = "sbatch {} ROOT/launch/slurm_gpu.sh " + " ".join(PROGRAM)
STEP = "srun --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=120 --cpus-per-task=64"
TRAIN = "python -m fluxvit_jax.main " + " ".join(PROGRAM[1:])
REQUEUE = "scontrol requeue 12"

JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
ALLOCATION = JOB | {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "64"}


@pytest.fixture
def node(recorders):
    """One that srun calls the program on: srun notes what it is told, and where."""
    recorders.install("python", "#!/usr/bin/env bash\n")
    source = (recorders.folder / "srun").read_text()
    source = source.replace("sys.argv[1:]", 'sys.argv[1:], os.environ["JAX_LOCAL_DEVICE_IDS"]')
    recorders.install("srun", source.replace("import json", "import os, json"))
    return recorders


def test_dry_run_of_a_submission(recorders):
    done = recorders.run("slurm_gpu.sh", *OPTIONS, "--dry-run", *PROGRAM)
    assert commands(done) == [QUEUE.format("fluxvit"), SUBMIT.format(" ".join(OPTIONS))]


def test_dry_run_in_an_allocation(recorders):
    done = recorders.run("slurm_gpu.sh", "--dry-run", *PROGRAM, **ALLOCATION)
    assert commands(done) == [f"env JAX_LOCAL_DEVICE_IDS=0,1,2,3 {STEP} {TRAIN}"]
    done = recorders.run("slurm_gpu.sh", "--dry-run", *PROGRAM, **JOB)
    assert commands(done) == [f"{STEP.removesuffix(' --cpus-per-task=64')} {TRAIN}"]


def test_submits_once(recorders):
    words = ("--job-name=k400", *OPTIONS, *PROGRAM)
    recorders.answer("squeue", Answer(), Answer("34\n"))
    assert recorders.run("slurm_gpu.sh", *words).returncode == 0
    again = recorders.run("slurm_gpu.sh", *words)
    assert again.returncode == 0 and "tail -F k400-34.log" in again.stderr
    queue = QUEUE.format("k400")
    assert recorders.calls() == [queue, SUBMIT.format(" ".join(words[:4])), queue]


@pytest.mark.parametrize(("status", "after"), [(0, []), (2, []), (130, []), (143, [REQUEUE])])
def test_queued_again_after_sigterm_only(status, after, node):
    node.answer("srun", Answer(status=status))
    assert node.run("slurm_gpu.sh", *PROGRAM, **ALLOCATION).returncode == status
    assert node.calls() == [f"{STEP} {TRAIN} 0,1,2,3", *after]


def test_as_sbatch_runs_it(node, tmp_path):
    """From a copy of the script alone, in the folder it was submitted from."""
    copy = shutil.copy(LAUNCH / "slurm_gpu.sh", tmp_path / "slurm_script")
    done = node.run(copy, *PROGRAM, **ALLOCATION, SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert node.calls() == [f"{STEP} {TRAIN} 0,1,2,3"]


def test_what_it_asks_sbatch_for():
    """Before the first command, where sbatch stops to look."""
    head = re.split(r"^[^#\n]", (LAUNCH / "slurm_gpu.sh").read_text(), flags=re.MULTILINE)[0]
    asked = re.findall(r"^#SBATCH (\S+)$", head, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--ntasks-per-node=1", "--open-mode=append"} < {
        *asked
    }
