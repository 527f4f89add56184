"""launch/tpu_vm.sh against a recorder of gcloud: what it calls, in which order, what it says."""

import shlex

import pytest

from tests.launch.recorder import Answer, commands, error_line

TPU = ("--name=flux", "--zone=us-west4-a", "--type=v5litepod-16")
CLOUD = ("--", "--config=configs/k400.py:base", "--workdir=gs://bucket/run")
WHERE = "flux --zone=us-west4-a"
SSH = f"gcloud compute tpus tpu-vm ssh {WHERE}"
WORKER = "bash fluxvit_jax/launch/worker.sh"

DESCRIBE = f"gcloud compute tpus tpu-vm describe {WHERE} '--format=value(state)'"
DESCRIBE_QUEUED = (
    f"gcloud compute tpus queued-resources describe {WHERE} '--format=value(state.state)'"
)
CREATE = (
    "gcloud compute tpus tpu-vm create flux --version=v2-alpha-tpuv5-lite "
    "--accelerator-type=v5litepod-16 --zone=us-west4-a"
)
CREATE_QUEUED = (
    "gcloud compute tpus queued-resources create flux --node-id=flux "
    "--runtime-version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-16 --zone=us-west4-a"
)
STATE = f"{SSH} --worker=all '--command=[ ! -e fluxvit_jax/launch/worker.sh ] || {WORKER} state'"
PACK = (
    "tar -czf SCRATCH/code.tar.gz -C ROOT --exclude=__pycache__ "
    "configs fluxvit_jax launch LICENSE README.md pyproject.toml requirements.txt"
)
UPLOAD = "gcloud compute tpus tpu-vm scp SCRATCH/code.tar.gz flux: --zone=us-west4-a --worker=all"
UNPACK = (
    f"{SSH} --worker=all '--command=mkdir -p fluxvit_jax && tar -xzf code.tar.gz -C fluxvit_jax'"
)
CHECK = f"{SSH} --worker=0 '--command={WORKER} check gs://bucket/run'"
SETUP = f"{SSH} --worker=all '--command={WORKER} setup'"
RUN = f"{SSH} --worker=all '--command={WORKER} start {' '.join(CLOUD[1:])}'"
LOGS = f"{SSH} --worker=0 '--command={WORKER} logs'"
DELETE = f"gcloud compute tpus tpu-vm delete {WHERE} --quiet"
DELETE_QUEUED = f"gcloud compute tpus queued-resources delete {WHERE} --force --quiet"
SLEEP = "sleep 60"

REST = [STATE, UPLOAD, UNPACK, CHECK, SETUP, RUN]  # of `start`, once there is a TPU
DRY = [STATE, PACK, *REST[1:]]

ABSENT = Answer(err="ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource", status=1)
READY, PREEMPTED = Answer("READY\n"), Answer("PREEMPTED\n")
NO_QUOTA = Answer(
    err="ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a.\n",
    status=1,
)
NO_CAPACITY = Answer(
    err='ERROR: (gcloud.compute.tpus.tpu-vm.create) There is no more capacity in the zone "a"\n',
    status=1,
)


def says(*states: str) -> Answer:
    """What the workers answer to `worker.sh state`."""
    return Answer("".join(f"host: state={state}\n" for state in states), "SSH: connecting\n")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ([], [DESCRIBE, CREATE, *DRY, LOGS]),
        (["up"], [DESCRIBE, CREATE, *DRY, LOGS]),
        (["start"], [DESCRIBE, CREATE, *DRY]),
        (["create"], [DESCRIBE, CREATE]),
        (["copy"], DRY[1:4]),
        (["check"], [CHECK]),
        (["setup"], [SETUP]),
        (["run"], [STATE, CHECK, RUN]),
        (["logs"], [LOGS]),
        (["status"], [DESCRIBE, STATE]),
        (["stop"], [f"{SSH} --worker=all '--command={WORKER} stop'"]),
        (["delete"], [DESCRIBE, DELETE]),
        (
            ["watch"],
            [
                *(DESCRIBE, CREATE, *DRY),
                *("# then, every 60 s:", DESCRIBE, STATE),
                *("# and when the TPU was pre-empted, before all this again:", DELETE),
            ],
        ),
    ],
)
def test_dry_run(step, expected, recorders):
    assert commands(recorders.run("tpu_vm.sh", *step, *TPU, "--dry-run", *CLOUD)) == expected


def test_dry_run_of_the_queue(recorders):
    words = ("--queued", "--spot", "--dry-run")
    asked = [DESCRIBE, DESCRIBE_QUEUED, f"{CREATE_QUEUED} --spot"]
    assert commands(recorders.run("tpu_vm.sh", "create", *TPU, *words)) == asked
    gone = [DESCRIBE, DESCRIBE_QUEUED, DELETE_QUEUED]
    assert commands(recorders.run("tpu_vm.sh", "delete", *TPU, *words)) == gone


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_type_has_its_software(kind, version, recorders):
    words = ("create", "--name=x", "--zone=z", "--project=p", f"--type={kind}", "--dry-run")
    asked = f"create x --version={version} --accelerator-type={kind} --zone=z --project=p"
    assert asked in commands(recorders.run("tpu_vm.sh", *words))[-1]
    other = commands(recorders.run("tpu_vm.sh", *words, "--version=own"))[-1]
    assert "--version=own" in other


def test_creates_when_there_is_none(recorders):
    recorders.answer("describe", ABSENT, READY)
    done = recorders.run("tpu_vm.sh", *TPU, *CLOUD)
    assert done.returncode == 0, done.stderr
    assert recorders.calls() == [DESCRIBE, CREATE, DESCRIBE, *REST, LOGS]


def test_waits_for_the_queue(recorders):
    recorders.answer("tpu-vm describe", ABSENT, ABSENT, Answer("CREATING\n"), READY)
    recorders.answer("queued-resources describe", ABSENT, Answer("WAITING_FOR_RESOURCES\n"))
    done = recorders.run("tpu_vm.sh", *TPU, "--queued", "--poll=7", *CLOUD)
    assert done.returncode == 0, done.stderr
    both, wait = [DESCRIBE, DESCRIBE_QUEUED], ["sleep 7"]
    waited = [*both, CREATE_QUEUED, *both, *wait, DESCRIBE, *wait, DESCRIBE]
    assert recorders.calls() == [*waited, *REST, LOGS]
    assert "flux is WAITING_FOR_RESOURCES: waiting" in done.stderr


def test_takes_the_one_that_is_there(recorders):
    recorders.answer("describe", READY)
    recorders.answer("worker.sh state", says("143", "lost"))
    assert recorders.run("tpu_vm.sh", *TPU, *CLOUD).returncode == 0
    assert recorders.calls() == [DESCRIBE, *REST, LOGS]


@pytest.mark.parametrize("step", ["up", "start", "run"])
def test_leaves_a_run_alone(step, recorders):
    recorders.answer("describe", READY)
    recorders.answer("worker.sh state", says("running", "running"))
    done = recorders.run("tpu_vm.sh", step, *TPU, *CLOUD)
    assert done.returncode == 0 and "the run goes on already" in done.stderr
    before, after = ([DESCRIBE], []) if step != "run" else ([], [])
    assert recorders.calls() == [*before, STATE, *([LOGS] if step == "up" else after)]


def test_replaces_a_preempted_one(recorders):
    recorders.answer("describe", PREEMPTED, ABSENT, READY)
    assert recorders.run("tpu_vm.sh", *TPU, "--spot", *CLOUD).returncode == 0
    assert recorders.calls()[:5] == [DESCRIBE, DELETE, DESCRIBE, f"{CREATE} --spot", DESCRIBE]


def test_the_end_of_the_run_is_the_exit_status(recorders):
    recorders.answer("describe", READY)
    recorders.answer("worker.sh logs", Answer(status=143))
    assert recorders.run("tpu_vm.sh", *TPU, *CLOUD).returncode == 143


def test_arguments_arrive_unchanged(recorders):
    arguments = [
        "--config=a b.py:x,y=1",
        "--config.eval.settings=((3072,12,224),)",
        "it's",
        '"',
        "",
    ]
    arguments += ["$HOME", "*", "--dry-run", "--", "a\nb", "\\"]
    recorders.answer("describe", READY)
    assert recorders.run("tpu_vm.sh", "start", *TPU, "--", *arguments).returncode == 0
    command = recorders.words()[-1][-1].removeprefix("--command=")
    assert shlex.split(command) == [*WORKER.split(), "start", *arguments]


def test_quota(recorders):
    recorders.answer("describe", ABSENT)
    recorders.answer("create", NO_QUOTA)
    done = recorders.run("tpu_vm.sh", *TPU, "--project=p", "--spot", *CLOUD)
    line = error_line(done)
    assert "no spot quota for v5litepod-16 in us-west4-a" in line
    assert "gcloud beta quotas info list --service=tpu.googleapis.com --project=p" in line
    assert "TPUV5sLitepodPerProjectPerZoneForTPUAPI" in done.stderr
    assert len(recorders.calls()) == 2


def test_quota_of_the_queue(recorders):
    """A request that had failed before is made again; one that fails now ends it."""
    recorders.answer("tpu-vm describe", ABSENT)
    recorders.answer("state.state", Answer("FAILED\n"), ABSENT, Answer("FAILED\n"))
    recorders.answer("failedData", Answer(NO_QUOTA.err))
    done = recorders.run("tpu_vm.sh", "create", *TPU, "--queued")
    assert "no on-demand quota for v5litepod-16" in error_line(done)
    both = [DESCRIBE, DESCRIBE_QUEUED]
    asked = [*both, DELETE_QUEUED, *both, CREATE_QUEUED, *both]
    assert recorders.calls()[:-1] == asked


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (NO_CAPACITY, 75, "us-west4-a has no v5litepod-16 to give now: --queued waits"),
        (Answer(err="a\nPERMISSION_DENIED: no\n", status=1), 2, "no TPU: PERMISSION_DENIED: no"),
    ],
)
def test_other_reasons(answer, status, message, recorders):
    recorders.answer("describe", ABSENT)
    recorders.answer("create", answer)
    assert message in error_line(recorders.run("tpu_vm.sh", *TPU, *CLOUD), status)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Add --name=NAME"),
        (["--name=x"], "Add --zone="),
        (["create", "--name=x", "--zone=z"], "Add --type="),
        (["create", "--name=x", "--zone=z", "--type=v9-8"], "--type=v9-8: not v4-N"),
        (["dance", "--name=x", "--zone=z"], "dance: not a step"),
    ],
)
def test_what_is_missing(words, message, recorders):
    recorders.answer("describe", ABSENT)
    assert message in error_line(recorders.run("tpu_vm.sh", *words, *CLOUD))


def test_gcloud_does_not_answer(recorders):
    recorders.answer("describe", Answer(err="ERROR: you do not have an account\n", status=1))
    line = error_line(recorders.run("tpu_vm.sh", *TPU, *CLOUD), 75)
    assert "you do not have an account" in line and recorders.calls() == [DESCRIBE]


def test_the_workers_do_not_answer(recorders):
    recorders.answer("describe", READY)
    recorders.answer("worker.sh state", Answer(err="no route to host\n", status=255))
    line = error_line(recorders.run("tpu_vm.sh", *TPU, *CLOUD), 75)
    assert line == "error: flux does not answer: no route to host"


def test_no_permission_on_the_bucket(recorders):
    """Said in one line, before anything is installed or started."""
    refusal = "error: no permission to write to gs://bucket/run: gcloud storage ...\n"
    recorders.answer("describe", READY)
    recorders.answer("worker.sh check", Answer(err=refusal, status=2))
    done = recorders.run("tpu_vm.sh", *TPU, *CLOUD)
    assert error_line(done) == refusal.strip()
    assert recorders.calls()[-1] == CHECK


def test_a_workdir_on_the_vm(recorders):
    recorders.answer("describe", READY)
    done = recorders.run("tpu_vm.sh", "start", *TPU, "--", "--config=x", "--workdir=runs/x")
    assert done.returncode == 0 and "without --workdir=gs://" in done.stderr
    assert not any("check" in call for call in recorders.calls())
    line = error_line(recorders.run("tpu_vm.sh", "watch", *TPU, "--", "--workdir=runs/x"))
    assert "--workdir=gs://..." in line


def test_delete(recorders):
    recorders.answer("describe", ABSENT, READY)
    done = recorders.run("tpu_vm.sh", "delete", *TPU)
    assert done.returncode == 0 and "there is no flux" in done.stderr
    assert recorders.run("tpu_vm.sh", "delete", *TPU).returncode == 0
    assert recorders.calls() == [DESCRIBE, DESCRIBE, DELETE]


def test_status(recorders):
    recorders.answer("describe", READY)
    recorders.answer("worker.sh state", says("running", "1"))
    done = recorders.run("tpu_vm.sh", "status", *TPU)
    assert done.returncode == 0 and "flux is READY" in done.stderr
    assert done.stdout == "host: state=running\nhost: state=1\n"


def test_watch(recorders):
    """Through the loss of the TPU, with no capacity at first, and of a run, to the end."""
    lost_now = [PREEMPTED, PREEMPTED, ABSENT]
    recorders.answer("describe", ABSENT, READY, READY, *lost_now, ABSENT, ABSENT, READY)
    recorders.answer("create", Answer(), NO_CAPACITY, Answer())
    states = [Answer(), says("running"), Answer(), says("running"), says("lost"), says("lost")]
    recorders.answer("worker.sh state", *states, Answer(status=255), says("0", "0"))
    done = recorders.run("tpu_vm.sh", "watch", *TPU, *CLOUD)
    assert done.returncode == 0 and "has ended with status 0" in done.stderr, done.stderr
    look = [SLEEP, DESCRIBE, STATE]
    assert recorders.calls() == [
        *(DESCRIBE, CREATE, DESCRIBE, *REST),
        *look,
        *(SLEEP, DESCRIBE),  # pre-empted
        *(DESCRIBE, DELETE, DESCRIBE, CREATE),  # no capacity
        *(SLEEP, DESCRIBE),
        *(DESCRIBE, CREATE, DESCRIBE, *REST),
        *look,
        *look,  # the VM has restarted
        *(DESCRIBE, *REST),
        *look,  # no answer
        *look,
    ]


@pytest.mark.parametrize(
    ("state", "starts", "message"),
    [("2", 1, "refuses its input"), ("1", 3, "has failed for the third time")],
)
def test_watch_gives_up(state, starts, message, recorders):
    recorders.answer("describe", READY)
    recorders.answer("worker.sh state", Answer(), says(state, "134"))
    done = recorders.run("tpu_vm.sh", "watch", *TPU, *CLOUD)
    assert message in error_line(done)
    assert recorders.calls().count(RUN) == starts


@pytest.mark.parametrize(
    ("failing", "status", "starts", "message"),
    [
        ("worker.sh check", 2, 1, ""),
        ("worker.sh setup", 1, 3, "has failed for the third time"),
    ],
)
def test_watch_cannot_start(failing, status, starts, message, recorders):
    recorders.answer("describe", READY)
    recorders.answer(failing, Answer(status=status))
    done = recorders.run("tpu_vm.sh", "watch", *TPU, *CLOUD)
    assert done.returncode == 2 and message in done.stderr
    assert sum(failing in call for call in recorders.calls()) == starts
