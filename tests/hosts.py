"""Several processes on this machine that run one program, as the hosts of a cluster do."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import limited, tiny

ROOTS = (tiny.ROOT, tiny.ROOT)
NOTHING = ({}, {})


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run(
    logs: Path,
    cache: Path,
    *arguments: str,
    code: str = "",
    devices: int = 2,
    flags: bool = True,
    folders: Sequence[Path] = ROOTS,
    environments: Sequence[dict[str, str]] = NOTHING,
) -> list[Ended]:
    """Runs processes, as many as `folders` to run them in, and waits for all.

    Args:
        logs: folder for what they print.
        arguments: of `fluxvit_jax.main`, or of `code` if that is given.
        devices: simulated ones of each process.
        flags: whether the arguments are followed by the flags that make the processes hosts.
        environments: of each process, besides the usual.
    """
    logs.mkdir(parents=True, exist_ok=True)
    program = ["-c", code] if code else ["-m", "fluxvit_jax.main"]
    coordinator = f"--coordinator=localhost:{free_port()}"
    processes = []
    for host, (folder, own) in enumerate(zip(folders, environments, strict=True)):
        joining = [coordinator, f"--hosts={len(folders)}", f"--host={host}"] if flags else []
        with (logs / f"{host}.out").open("w") as out, (logs / f"{host}.err").open("w") as err:
            process = limited.Process(
                [sys.executable, *program, *arguments, *joining],
                env=tiny.environment(cache, devices) | own,
                cwd=folder,
                stdout=out,
                stderr=err,
            )
        processes.append(process)
    try:
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        Ended(status, (logs / f"{host}.out").read_text(), (logs / f"{host}.err").read_text())
        for host, status in enumerate(statuses)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
