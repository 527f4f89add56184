"""launch/gke_xpk.sh against recorders of docker, kubectl and xpk."""

import shlex

import pytest

from tests.launch.recorder import Answer, commands, error_line

IMAGE = "us-docker.pkg.dev/mine/images/fluxvit"
WORKLOAD = ("--name=k400", "--cluster=tpus", "--zone=us-west4-a", "--project=mine")
WORKLOAD += ("--type=v5litepod-16", f"--image={IMAGE}")
PROGRAM = ("--", "--config=configs/k400.py:base", "--workdir=gs://bucket/run")
CLUSTER = "--cluster=tpus --zone=us-west4-a --project=mine"
FIRST = "jobset.sigs.k8s.io/jobset-name=k400,batch.kubernetes.io/job-completion-index=0"

BUILD = [
    f"docker build --platform=linux/amd64 --file=ROOT/launch/Dockerfile --tag={IMAGE} ROOT",
    f"docker push {IMAGE}",
]
LIST = f"xpk workload list {CLUSTER} --filter-by-job=k400"
FIND = [
    LIST,
    "kubectl get jobset k400 --ignore-not-found '--output=jsonpath=yes {.status.terminalState}'",
]
DELETE = f"xpk workload delete {CLUSTER} --workload=k400"
PHASE = f"kubectl get pods --selector={FIRST} '--output=jsonpath={{.items[*].status.phase}}'"
LOGS = f"kubectl logs --follow --tail=-1 --selector={FIRST} --container=jax-tpu"


def create(image: str, options: str = "") -> list[str]:
    return [
        f"docker inspect '--format={{{{index .RepoDigests 0}}}}' {IMAGE}",
        f"xpk workload create {CLUSTER} --workload=k400 --tpu-type=v5litepod-16 --num-slices=1 "
        f"--docker-image={image} --max-restarts=100 --termination-grace-period-seconds=120 "
        f"{options}'--command=exec python -m fluxvit_jax.main {' '.join(PROGRAM[1:])}'",
    ]


@pytest.fixture
def cluster(recorders):
    """With an image, whose digest docker knows."""
    recorders.answer("docker inspect", Answer(f"{IMAGE}@sha256:1\n"))
    return recorders


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ([], [*BUILD, *FIND, *create(IMAGE), *FIND, PHASE, LOGS]),
        (["build"], BUILD),
        (["run"], [*FIND, *create(IMAGE)]),
        (["logs"], [*FIND, PHASE, LOGS]),
        (["list"], [LIST]),
        (["delete"], [DELETE]),
    ],
)
def test_dry_run(step, expected, recorders):
    assert (
        commands(recorders.run("gke_xpk.sh", *step, *WORKLOAD, "--dry-run", *PROGRAM)) == expected
    )


def test_creates_when_there_is_none(cluster):
    cluster.answer("kubectl get jobset", Answer(), Answer("yes "))
    cluster.answer("kubectl get pods", Answer("Pending"), Answer("Running"))
    done = cluster.run("gke_xpk.sh", *WORKLOAD, "--priority=high", *PROGRAM)
    assert done.returncode == 0, done.stderr
    created = create(f"{IMAGE}@sha256:1", "--priority=high ")
    wait = [PHASE, "sleep 30", PHASE]
    assert cluster.calls() == [*BUILD, *FIND, *created, *FIND, *wait, LOGS]
    assert "waits for its TPUs" in done.stderr


def test_leaves_one_that_goes_on(cluster):
    cluster.answer("kubectl get jobset", Answer("yes "))
    cluster.answer("kubectl get pods", Answer("Running"))
    done = cluster.run("gke_xpk.sh", *WORKLOAD, *PROGRAM)
    assert done.returncode == 0 and "k400 goes on already" in done.stderr
    assert cluster.calls() == [*BUILD, *FIND, *FIND, PHASE, LOGS]


@pytest.mark.parametrize("state", ["Completed", "Failed"])
def test_replaces_one_that_has_ended(state, cluster):
    cluster.answer("kubectl get jobset", Answer(f"yes {state}"))
    assert cluster.run("gke_xpk.sh", "run", *WORKLOAD, *PROGRAM).returncode == 0
    assert cluster.calls() == [*FIND, DELETE, *create(f"{IMAGE}@sha256:1")]


def test_arguments_arrive_unchanged(cluster):
    arguments = ["--config=a b.py", "--config.eval.settings=((3072,12,224),)", "it's", "$HOME", ""]
    assert cluster.run("gke_xpk.sh", "run", *WORKLOAD, "--", *arguments).returncode == 0
    command = cluster.words()[-1][-1].removeprefix("--command=")
    assert shlex.split(command) == ["exec", "python", "-m", "fluxvit_jax.main", *arguments]


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("docker push", "gcloud auth configure-docker us-docker.pkg.dev"),
        ("workload create", "https://console.cloud.google.com/iam-admin/quotas?project=mine"),
    ],
)
def test_what_can_fail(failing, message, cluster):
    cluster.answer(failing, Answer(status=1))
    done = cluster.run("gke_xpk.sh", *WORKLOAD, *PROGRAM)
    assert message in error_line(done) and failing in cluster.calls()[-1]


def test_no_image(recorders):
    recorders.answer("docker inspect", Answer(status=1))
    line = error_line(recorders.run("gke_xpk.sh", "run", *WORKLOAD, *PROGRAM))
    assert "launch/gke_xpk.sh build" in line


def test_logs_of_nothing(recorders):
    line = error_line(recorders.run("gke_xpk.sh", "logs", *WORKLOAD))
    assert "there is no workload k400" in line and recorders.calls() == FIND


@pytest.mark.parametrize("missing", ["name", "cluster", "zone", "project", "image", "type"])
def test_a_missing_option(missing, cluster):
    words = [word for word in WORKLOAD if not word.startswith(f"--{missing}=")]
    assert f"--{missing}=" in error_line(cluster.run("gke_xpk.sh", "run", *words, *PROGRAM))


def test_not_a_step(cluster):
    assert "dance: not a step" in error_line(cluster.run("gke_xpk.sh", "dance", *WORKLOAD))
