"""Files whose content is on the disk before their name is: they survive a crash of the machine.

One run at a time writes into a folder.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError


def write(path: Path, text: str) -> None:
    """Writes a file atomically and durably."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text)
    move(unfinished, path)


def move(source: Path, target: Path) -> None:
    """Renames a file after its content has reached the disk."""
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


@contextlib.contextmanager
def one_run_at_a_time(folder: Path, program: str) -> Iterator[None]:
    """Makes the folder and locks it; the system releases the lock when the process dies.

    Raises UserError if it is no folder, or another run of the program is at work in it.
    """
    shown = storage.display_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{shown}: cannot be used as a folder: {error.strerror}") from None
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{shown}: another run of `{program}` is at work here") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)
