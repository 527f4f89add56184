"""Lock on a run's workdir: a lease in the file `lock.json`.

The holder renews the lease. A lease that is no longer renewed may be taken over, so a kill never
leaves a folder locked. On the holder's machine we check whether its process is alive. From another
machine we watch for a renewal, without comparing clocks, which may differ. This works on network
file systems, and in buckets as far as objects allow: there two runs that start within a second
could both believe that they hold the lock; the one with the overwritten lease notices at its next
renewal, and stops.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from etils import epath

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.distributed.mesh import host_index
from fluxvit_jax.errors import UserError

FILE = "lock.json"
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0  # without a renewal until a lease of another machine is stale
SETTLE_SECONDS = 1.0  # until an overwritten lease can be read everywhere


class WorkdirLock:
    """Context manager that holds `folder` for this run; every host of the run enters it.

    Raises UserError, on entering, if another run holds the folder; from `check`, if another run
    has taken it over.
    """

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._path = folder / FILE
        self._lease = _new_lease()
        self._taken_by: dict[str, Any] | None = None
        self._released = threading.Event()
        self._renewal = threading.Thread(target=self._renew_until_released, daemon=True)

    def __enter__(self) -> "WorkdirLock":
        compute_on_host0(self._acquire)
        if host_index() == 0:
            self._renewal.start()
        return self

    def __exit__(self, *_: object) -> None:
        if host_index() != 0:
            return
        self._released.set()
        self._renewal.join()
        with contextlib.suppress(OSError, UserError):  # a lease that remains is just stale
            if self._holds():
                self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises UserError, on host 0, if another run has taken over; call it before writing."""
        if self._taken_by is not None:
            raise UserError(
                f"{self._folder} was taken over by {_describe(self._taken_by)}, since this run did "
                f"not renew {self._path} in time; this run stops and leaves the folder alone"
            )

    def _acquire(self) -> None:
        try:
            storage.make_folder(self._folder)
            if self._create():
                return
            holder = self._read()
            if holder == {}:  # created, and not yet written
                time.sleep(SETTLE_SECONDS)
                holder = self._read()
            if holder is not None:
                self._refuse_or_take_over(holder)
            self._write()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error
        time.sleep(SETTLE_SECONDS)
        if not self._holds():
            raise UserError(f"{self._folder}: another run started at the same moment; it goes on")

    def _refuse_or_take_over(self, holder: dict[str, Any]) -> None:
        if self._is_alive(holder):
            raise UserError(
                f"{self._folder} is in use by {_describe(holder)}; stop that run first, or use "
                "another workdir"
            )
        say(f"taking over {self._folder} from {_describe(holder)}, which has ended")

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("machine") == self._lease["machine"]:
            return _start_of(holder.get("pid")) == holder.get("started")
        say(
            f"{self._folder} was last used by {_describe(holder)}; watching for "
            f"{LEASE_SECONDS:.0f} s whether that run is alive"
        )
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(SETTLE_SECONDS)
            now = self._read()
            if now is None:  # it has just ended
                return False
            if now != holder:
                return True
        return False

    def _create(self) -> bool:
        """Writes the lease if there is none. A bucket has no such atomic operation."""
        if storage.is_remote(self._path):
            return False
        try:
            with open(self._path, "x") as file:
                file.write(json.dumps(self._lease))
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict[str, Any] | None:
        """The lease in the folder; None without one. A damaged one is an empty lease."""
        try:
            with storage.errors(self._path):
                lease = storage.parse_json(self._path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return lease if isinstance(lease, dict) else {}

    def _write(self) -> None:
        self._lease["renewed"] = time.time()
        atomic.write(self._path, json.dumps(self._lease))

    def _holds(self) -> bool:
        lease = self._read()
        return lease is not None and lease.get("token") == self._lease["token"]

    def _renew_until_released(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                lease = self._read()
                if lease and lease.get("token") != self._lease["token"]:
                    self._taken_by = lease
                    return
                self._write()
            except (OSError, UserError) as error:  # such as a full disk; the next try may succeed
                logging.warning("%s: cannot be renewed: %s", self._path, error)


def _new_lease() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "machine": _machine(),
        "token": uuid.uuid4().hex,
        "renewed": time.time(),
    }


def _machine() -> str:
    """Identifier of a machine, or container, within which process numbers are unique.

    Containers share a kernel, but not the numbers of processes.
    """
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists() and space.exists():
        parts += [boot.read_text().strip(), str(space.stat().st_ino)]
    return " ".join(parts)


def _start_of(pid: Any) -> str | None:
    """Start time of a process in the kernel's ticks; None if it does not run.

    It tells apart processes that got the same number one after another. Without /proc it is "" for
    a running process.
    """
    if not isinstance(pid, int):
        return None
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        # After the name in parentheses: state, parent, ..., the 20th is the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _describe(lease: dict[str, Any]) -> str:
    if "host" not in lease:
        return "an unknown run"
    return f"process {lease.get('pid')} on {lease['host']}"
