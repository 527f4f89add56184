"""Several processes as one program: how they find each other, agree, and end together.

What hosts tell each other in here goes through JAX's coordination service, which is in host 0, and
takes no device: a host may wait there for as long as another one needs.
"""

import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

from fluxvit_jax import parallel
from fluxvit_jax.data.annotations import Source
from fluxvit_jax.errors import UserError

CONNECT_SECONDS = 300  # until the last host is there
# A host that dies without a word is missed after so long, and the others end. JAX waits 100 s.
HEARTBEAT_SECONDS = 30
# Hosts that fail end together. One that cannot, since it hangs, is waited for so long.
SHUTDOWN_SECONDS = 20
WATCH_SECONDS = 1  # between two questions whether another host has failed
GRACE_SECONDS = 2  # for a host that is about to say the same itself
SHARED_SECONDS = 60  # network file systems show a new file after so long
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FAILURE = "fluxvit_jax/failure"  # key of what made the first host end


@contextmanager
def joined(coordinator: str = "", hosts: int = 0, host: int = -1) -> Iterator[None]:
    """The part of a program that all its processes run together; arguments as of `start`.

    Leaving it waits for all, however long the first of them still writes. An exception or a signal
    that ends one of them ends them all: each says why, and exits with the status that `main` would
    exit with.
    """
    start(coordinator, hosts, host)
    if parallel.host_count() == 1:
        yield
        return
    with _ended_by_others():
        try:
            yield
            meet()
        except UserError as error:
            _end_others(2, str(error))
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {_line(error)}"
            _end_others(1, f"{what}; the log of that host has more")
            raise


def start(coordinator: str = "", hosts: int = 0, host: int = -1) -> None:
    """Joins the other processes of this program, if there are any.

    coordinator: "ADDRESS:PORT" where process 0 listens; hosts: how many processes; host: which is
    this one. Without a coordinator the environment says it all, if it is one that JAX knows: Cloud
    TPU, SLURM's srun, Kubernetes, Open MPI. Otherwise this process is alone.

    Raises UserError: only a part of the three is given; the others cannot be reached.
    """
    given = (":" in coordinator, hosts > 0, host >= 0)
    if any((coordinator, *given)) and not all(given):
        raise UserError("--coordinator=ADDRESS:PORT, --hosts=N and --host=I go together")
    if any(given) and not host < hosts:
        raise UserError(f"--host={host}: hosts are numbered from 0 to {hosts - 1}")
    own = (coordinator, hosts, host) if coordinator else ()
    where = coordinator or "the first of them"
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        _connect(
            own,
            local_device_ids=_local_devices(),
            cluster_detection_method="deactivate" if own else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except TimeoutError as error:
        raise UserError(
            f"the hosts did not all reach {where} within {CONNECT_SECONDS} s; start them all, and "
            "see whether one of them says why it ended"
        ) from error
    except (ValueError, OSError) as error:
        if own or "coordinator_address should be defined" not in str(error):
            raise UserError(f"the hosts cannot find each other: {_line(error)}") from error
    except RuntimeError as error:
        raise UserError(f"the hosts cannot reach {where}: {_line(error)}") from error
    for number, handler in handlers.items():  # JAX takes SIGTERM for its own way to stop
        signal.signal(number, handler)


def _connect(arguments: tuple, **more: Any) -> None:
    """`jax.distributed.initialize`, within `CONNECT_SECONDS` or a TimeoutError.

    It is called in a thread: nothing can interrupt a wait within JAX, and JAX itself would abort.
    """
    errors: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                *arguments, **more, initialization_timeout=2 * CONNECT_SECONDS
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def _local_devices() -> list[int] | None:
    """Empty, which is all of them, for a task of SLURM that has its node to itself.

    JAX gives every task one GPU, this one too, unless JAX_LOCAL_DEVICE_IDS names others.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    return [] if tasks is not None and tasks == nodes else None


# ---------------------------------------------------------------------------------------------
# Agreement


@contextmanager
def together() -> Iterator[None]:
    """A part that every host does for itself, such as to open its data: all succeed, or all fail.

    Without it the hosts that succeed would go on, and wait for the others. Raises the first host's
    UserError on all of them.
    """
    message = ""
    try:
        yield
    except UserError as error:
        if parallel.host_count() == 1:
            raise
        message = str(error)
    for host, found in enumerate(parallel.gather([message])):
        if found:
            raise UserError(found if host == parallel.host_index() else f"host {host}: {found}")


def check_same(what: Mapping[str, Any]) -> None:
    """Raises UserError, on all hosts, if any of what is named differs between them.

    what: words that name a thing, and what it is on this host, of JSON's kinds.
    """
    first, *others = parallel.gather([{name: _digest(own) for name, own in what.items()}])
    for host, there in enumerate(others, 1):
        for name, own in there.items():
            if own != first[name]:
                raise UserError(
                    f"host {host} has another {name} than host 0, {own} and not {first[name]}; "
                    "start all hosts alike"
                )


def check_same_videos(**sources: Source | None) -> None:
    """`check_same` of lists of videos, each by a word for what it is for; None: of none."""
    about = {}
    for use, source in sources.items():
        if source is not None:
            about[f"number of {use} videos"] = len(source)
            about[f"list of {use} videos"] = source.ids
    check_same(about)


def meet() -> None:
    """Waits until all hosts are here."""
    first_host(None)


def first_host(value: Any) -> Any:
    """What host 0 found, on all hosts; of JSON's kinds."""
    return parallel.gather([value])[0]


def from_first_host(find: Callable[[], Any]) -> Any:
    """What `find` returns on host 0, on all hosts; of JSON's kinds.

    For what is read from files that host 0 writes: the others may see them as they were before.
    Raises its UserError on all hosts.
    """
    found = None
    with together():
        if parallel.host_index() == 0:
            found = find()
    return first_host(found)


def check_shared(path: epath.Path) -> None:
    """Raises UserError, on all hosts, unless all see a file or folder that host 0 has written."""
    meet()  # it is written now
    with together():
        deadline = time.monotonic() + SHARED_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"there is no {path} here, which host 0 has written: the workdir must be on "
                    "storage that all hosts share"
                )
            time.sleep(1)


def _digest(value: Any) -> str:
    """Numbers and short words as they are, all else by its hash."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 64 else hashlib.sha256(text.encode()).hexdigest()[:8]


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


# ---------------------------------------------------------------------------------------------
# The end

_ending = threading.Lock()  # taken for good by the thread that ends this process


@contextmanager
def _ended_by_others() -> Iterator[None]:
    """Whatever this host is doing meanwhile, the failure of another one ends it."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), daemon=True)
    watch.start()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        signal.signal(number, functools.partial(_tell, handler))
    try:
        yield
    finally:
        over.set()
        watch.join()  # the interpreter must not end while it asks
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _watch(over: threading.Event) -> None:
    while not over.wait(WATCH_SECONDS):
        try:
            about = json.loads(parallel.coordinator().key_value_try_get(FAILURE))
        except jax.errors.JaxRuntimeError:  # there is none
            continue
        if over.wait(GRACE_SECONDS) or not _ending.acquire(blocking=False):
            return
        print(f"error: host {about['host']}: {about['message']}", file=sys.stderr, flush=True)
        _leave()
        os._exit(about["status"])


def _end_others(status: int, message: str) -> None:
    """Tells the other hosts why this one ends; the first to do so is heard."""
    _ending.acquire()
    about = {"host": parallel.host_index(), "status": status, "message": message}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
        parallel.coordinator().key_value_set(FAILURE, json.dumps(about))


def _tell(handler: Callable[[int, Any], None], number: int, frame: Any) -> None:
    """Handles a signal that ends this host alone; a second one acts at once."""
    if not _ending.locked():
        _end_others(128 + number, f"was stopped by {signal.Signals(number).name}")
        _leave()
    handler(number, frame)


def _leave() -> None:
    """Waits, within `SHUTDOWN_SECONDS`, until all hosts leave: host 0 must not be the first."""
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()
