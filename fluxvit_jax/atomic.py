"""Files that are there whole or not at all, whenever the program is killed, and files that grow."""

import logging
import os
import time
from typing import TYPE_CHECKING

from fluxvit_jax import storage
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:  # a server that loads an exported folder does without
    from etils import epath

OBJECT_SECONDS = 30.0  # at least, between two writes of an object that grows


def write(path: "epath.Path", content: str | bytes) -> None:
    """Writes a file in place of the one that may be there.

    Raises OSError; in a bucket, UserError.
    """
    content = content.encode() if isinstance(content, str) else content
    if storage.is_remote(path):
        with storage.errors(path):
            path.write_bytes(content)
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class GrowingObject:
    """An object of a bucket that grows, as a file to write bytes into.

    An object store can't add to an object, so all of it is kept here and written anew by `flush`,
    but not more often than every `OBJECT_SECONDS`, and by `save`. A kill takes what came since, and
    leaves the object of before.
    """

    def __init__(self, path: "epath.Path", content: bytes = b""):
        self._path = path
        self._content = bytearray(content)
        self._saved = len(content)  # bytes of it that the bucket has
        self._saved_at = time.monotonic()

    def write(self, content: bytes) -> None:
        self._content += content

    def flush(self) -> None:
        """Saves when it is time; a failure is logged, and the next time makes up for it."""
        if time.monotonic() - self._saved_at < OBJECT_SECONDS:
            return
        try:
            self.save()
        except UserError as error:
            logging.warning("will be tried again: %s", error)

    def save(self) -> None:
        """Raises UserError if the object cannot be written."""
        if self._saved == len(self._content):
            return
        self._saved_at = time.monotonic()
        content = bytes(self._content)
        write(self._path, content)
        self._saved = len(content)

    close = save


class LineFile:
    """A text file that lines are added to; what it has already stays.

    A file of this machine has each line as soon as it is added. In a bucket the file is a
    `GrowingObject`: lines of the last half minute may be lost in a kill, unless `save` was called.
    """

    def __init__(self, path: "epath.Path"):
        """Raises OSError; in a bucket, UserError."""
        if storage.is_remote(path):
            with storage.errors(path):
                self._file = GrowingObject(path, path.read_bytes() if path.exists() else b"")
        else:
            self._file = path.open("ab")

    def add(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def save(self) -> None:
        """Returns when every line is in the file. Raises UserError if a bucket does not take it."""
        if isinstance(self._file, GrowingObject):
            self._file.save()

    def close(self) -> None:
        """Raises UserError as `save` does."""
        self._file.close()
