"""Several processes as one program: start, agreement and a common end.

Messages go through JAX's coordination service, which runs in host 0 and uses no device. A host may
wait there for as long as another one needs.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import jax
from etils import epath
from jax._src import clusters  # JAX tells host 0's port only after its crash at one that is taken

from fluxvit_jax.distributed import lifelines
from fluxvit_jax.distributed.interrupts import SIGNALS, exit_by, handled_by
from fluxvit_jax.distributed.mesh import coordination_client, gather, host_count, host_index
from fluxvit_jax.distributed.watchdog import STATUS
from fluxvit_jax.errors import UserError

CONNECT_SECONDS = 300  # to wait for the last host
NOTICE_SECONDS = 5  # of waiting before we say so
HEARTBEAT_SECONDS = 60  # until JAX notices a death that `lifelines` have missed; JAX's is 100
SHUTDOWN_SECONDS = 20  # to wait, after a failure, for a host that hangs
WATCH_SECONDS = 1  # between two checks whether another host has failed
GRACE_SECONDS = 2  # for a host to report the same failure itself
SHARED_SECONDS = 60  # until a network file system shows a new file
FAILURE = "fluxvit_jax/failure"  # key of the first host's failure


@contextmanager
def joined(coordinator: str = "", hosts: int = 0, host: int = -1) -> Iterator[None]:
    """A context that all processes of a program run; arguments as for `start`.

    Leaving it waits for all of them, however long the first one still writes. An exception or a
    signal that ends one process ends them all: each prints the reason, and exits with the status
    that `main` would exit with. If one dies without a word, the others exit with `STATUS`.
    """
    start(coordinator, hosts, host)
    if host_count() == 1:
        yield
        return
    with lifelines.connected(_end_after_death), _ended_by_others():
        try:
            yield
            barrier()
        except UserError as error:
            _end_others(2, str(error))
            raise
        except Exception as error:
            # If another host's death is what the error comes from, `_end_after_death` comes first.
            time.sleep(GRACE_SECONDS)
            message = f"{type(error).__name__}: {_line(error)}"
            _end_others(1, f"{message}; the log of that host has more")
            raise


def start(coordinator: str = "", hosts: int = 0, host: int = -1) -> None:
    """Connects to the other processes of this program, if there are any.

    coordinator: "ADDRESS:PORT" where process 0 listens; hosts: the number of processes; host: the
    number of this one. Without a coordinator, JAX takes all three from an environment that it
    knows: Cloud TPU, SLURM's srun, Kubernetes, Open MPI. In any other one this process runs alone;
    in an allocation of SLURM without srun, it also prints that it does.

    Raises UserError: only a part of the three is given; the port is taken; the others cannot be
    reached.
    """
    given = (":" in coordinator, hosts > 0, host >= 0)
    if any((coordinator, *given)) and not all(given):
        raise UserError("--coordinator=ADDRESS:PORT, --hosts=N and --host=I go together")
    if any(given) and not host < hosts:
        raise UserError(f"--host={host}: hosts are numbered from 0 to {hosts - 1}")
    if not coordinator and _outside_srun():
        tasks = os.environ["SLURM_NTASKS"]
        print(
            f"SLURM_NTASKS is {tasks}, but srun did not start this process: it runs alone; for "
            f"{tasks} processes start it with srun",
            file=sys.stderr,
        )
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        place = _Place(coordinator, hosts, host, _local_devices()) if coordinator else _detect()
        if place is None:
            return
        if place.host == 0:
            _check_port(place.coordinator)
        _connect(place)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"the hosts cannot find each other: {_line(error)}") from error
    for number, handler in handlers.items():  # JAX takes SIGTERM for its own way to stop
        signal.signal(number, handler)


class _Place(NamedTuple):
    """The place of this process among the others.

    coordinator: "ADDRESS:PORT" of host 0; hosts: number of processes; host: of this one; devices:
    the local ones that it has, [] for all, None for those that JAX_LOCAL_DEVICE_IDS names, or all.
    """

    coordinator: str
    hosts: int
    host: int
    devices: Sequence[int] | None


def _detect() -> _Place | None:
    """What the environment tells; None if this process is alone."""
    coordinator, hosts, host, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
        num_processes=None,
        process_id=None,
        local_device_ids=_local_devices(),
        cluster_detection_method=None,
        initialization_timeout=CONNECT_SECONDS,
    )
    if coordinator is None or hosts is None or host is None:
        return None
    return _Place(
        coordinator, hosts, host, None if "JAX_LOCAL_DEVICE_IDS" in os.environ else devices
    )


def _check_port(coordinator: str) -> None:
    """Raises UserError if host 0 cannot listen at its port, where JAX would crash."""
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    address, _, port = (bound or f"[::]:{coordinator.rpartition(':')[2]}").rpartition(":")
    try:
        lifelines.listen(address.strip("[]"), int(port)).close()
    except (OSError, OverflowError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "no such port"
        raise UserError(
            f"host 0 cannot listen at port {port} for {coordinator}: {reason}; end what uses it, "
            "such as an earlier run, or give all hosts another port"
        ) from error


def _connect(place: _Place) -> None:
    """`jax.distributed.initialize` within `CONNECT_SECONDS`.

    It runs in a thread: nothing can interrupt a wait within JAX, and at its own timeout JAX aborts
    the process. Raises UserError if that time is over, and what JAX raises.
    """
    errors: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address=place.coordinator,
                num_processes=place.hosts,
                process_id=place.host,
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=2 * CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(NOTICE_SECONDS)
    if thread.is_alive():
        print(
            f"waiting for the other processes of this program, up to {CONNECT_SECONDS} s",
            file=sys.stderr,
        )
    thread.join(CONNECT_SECONDS - NOTICE_SECONDS)
    if thread.is_alive():
        raise UserError(_why_nobody_came(place))
    if errors:
        raise errors[0]


def _why_nobody_came(place: _Place) -> str:
    address, _, port = place.coordinator.rpartition(":")
    try:
        socket.create_connection((address.strip("[]"), int(port)), NOTICE_SECONDS).close()
    except OSError as error:
        return (
            f"host 0 did not answer at {place.coordinator} within {CONNECT_SECONDS} s "
            f"({_line(error)}); see whether it says why it ended, and whether that is its address"
        )
    return (
        f"the hosts did not all reach {place.coordinator} within {CONNECT_SECONDS} s; start them "
        "all, and see whether one of them says why it ended"
    )


def _outside_srun() -> bool:
    """Whether this process runs in an allocation of several SLURM tasks without srun.

    JAX would wait for the other tasks: the shell of salloc has all variables of a task, and
    SLURM_NTASKS of the allocation. mpirun starts tasks in an allocation as well; JAX detects it.
    """
    environ = os.environ
    if environ.get("SLURM_NTASKS", "1") == "1" or any(name.startswith("OMPI_") for name in environ):
        return False
    # srun sets both; the shell of salloc is a step of one task.
    tasks, nodes = (environ.get(f"SLURM_STEP_NUM_{name}") for name in ("TASKS", "NODES"))
    return tasks == "1" if tasks else nodes is None


def _local_devices() -> list[int] | None:
    """[], which means all devices, for a SLURM task that is alone on its node; else None.

    By default JAX gives every SLURM task one GPU, unless JAX_LOCAL_DEVICE_IDS names others.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    return [] if tasks is not None and tasks == nodes else None


# ---------------------------------------------------------------------------------------------
# Agreement


@contextmanager
def raise_on_all_hosts() -> Iterator[None]:
    """A context from which all hosts raise a UserError if any host raises one: the first host's.

    Without it, the other hosts would block in the next collective.
    """
    message = ""
    try:
        yield
    except UserError as error:
        if host_count() == 1:
            raise
        message = str(error)
    for host, text in enumerate(gather([message])):
        if text:
            raise UserError(text if host == host_index() else f"host {host}: {text}")


def check_same(what: Mapping[str, Any]) -> None:
    """Raises UserError, on all hosts, if any of the values differs between hosts.

    what: values of this host, JSON's, by names for the message.
    """
    first, *others = gather([{name: _digest(value) for name, value in what.items()}])
    for host, digests in enumerate(others, 1):
        for name, digest in digests.items():
            if digest != first[name]:
                raise UserError(
                    f"host {host} has another {name} than host 0, {digest} and not {first[name]}; "
                    "start all hosts alike"
                )


def barrier() -> None:
    """Waits until all hosts have called it."""
    broadcast_from_host0(None)


def broadcast_from_host0(value: Any) -> Any:
    """Host 0's value, a JSON value, on all hosts."""
    return gather([value])[0]


def compute_on_host0(find: Callable[[], Any]) -> Any:
    """The result of `find` on host 0, a JSON value, on all hosts.

    Files that host 0 writes are read this way, since other hosts may still see an older version.
    Raises the UserError of `find` on all hosts.
    """
    result = None
    with raise_on_all_hosts():
        if host_index() == 0:
            result = find()
    return broadcast_from_host0(result)


def check_shared(path: epath.Path) -> None:
    """Raises UserError, on all hosts, unless all see a file or folder that host 0 has written."""
    barrier()  # until host 0 has written it
    with raise_on_all_hosts():
        deadline = time.monotonic() + SHARED_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"there is no {path} here, which host 0 has written: the workdir must be on "
                    "storage that all hosts share"
                )
            time.sleep(1)


def _digest(value: Any) -> str:
    """The value as JSON if that is short, else its hash."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 64 else hashlib.sha256(text.encode()).hexdigest()[:8]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


# ---------------------------------------------------------------------------------------------
# The end

_ending = threading.Lock()  # acquired, and never released, by the thread that ends this process


@contextmanager
def _ended_by_others() -> Iterator[None]:
    """A context that ends this process, whatever it is doing, once another host has failed."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    try:
        with handled_by(_end_by_signal):  # in the main thread, or JAX's shutdown could crash
            yield
    finally:
        over.set()
        watch.join()  # the interpreter must not exit during its request


def _watch(over: threading.Event) -> None:
    while not over.wait(WATCH_SECONDS):
        try:
            about = json.loads(coordination_client().key_value_try_get(FAILURE))
        except jax.errors.JaxRuntimeError:  # no failure so far
            continue
        if over.wait(GRACE_SECONDS) or not _ending.acquire(blocking=False):
            return
        print(f"error: host {about['host']}: {about['message']}", file=sys.stderr, flush=True)
        _leave()
        os._exit(about["status"])


def _end_others(status: int, message: str) -> None:
    """Publishes the reason why this host ends; only the first host's is stored."""
    _ending.acquire()
    about = {"host": host_index(), "status": status, "message": message}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was first
        coordination_client().key_value_set(FAILURE, json.dumps(about))


def _end_by_signal(number: int, _: FrameType | None) -> None:
    """Signal handler that ends the other hosts as well; at a second signal, only this one."""
    if not _ending.locked():
        _end_others(128 + number, f"was stopped by {signal.Signals(number).name}")
        _leave()
    exit_by(number)


def _end_after_death(host: int) -> None:
    """Ends this process at once, as a host that died can do no more; others end likewise."""
    if not _ending.acquire(blocking=False):
        return
    print(
        f"error: host {host} has died without a word: it was killed, its memory ran out, or its "
        "machine or network is gone; this run ends. The same command on all hosts goes on from the "
        "last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(STATUS)


def _leave() -> None:
    """Waits up to `SHUTDOWN_SECONDS` until all hosts leave: host 0 must not be the first."""
    lifelines.leave()
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
