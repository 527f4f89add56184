"""Atomic file writes, and files of lines that grow."""

import logging
import os
import time
from typing import TYPE_CHECKING, BinaryIO

from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:  # a server that loads an exported folder does without
    from etils import epath

OBJECT_SECONDS = 30.0  # least time between two writes of a growing object


def write(path: "epath.Path", content: str | bytes) -> None:
    """Writes a file atomically: a kill leaves the old file or the new one.

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
    """A growing object in a bucket, with the interface of a file opened for writing bytes.

    An object store cannot append, so the whole content is kept in memory and written again by
    `flush`, at most every `OBJECT_SECONDS`, and by `save`. A kill loses the bytes since the last
    write.
    """

    def __init__(self, path: "epath.Path", content: bytes = b""):
        self._path = path
        self._content = bytearray(content)
        self._saved = len(content)  # bytes that are in the bucket
        self._saved_at = time.monotonic()

    def write(self, content: bytes) -> None:
        self._content += content

    def flush(self) -> None:
        """Saves if the last write is long enough ago; a failure is logged and tried again later."""
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
    """A text file to append lines to.

    A local file has each line as soon as it is added. In a bucket the file is a `GrowingObject`: a
    kill may lose the lines of the last half minute, unless `save` was called.
    """

    _file: BinaryIO | GrowingObject

    def __init__(self, path: "epath.Path"):
        """Raises OSError; in a bucket, UserError."""
        if storage.is_remote(path):
            with storage.errors(path):
                self._file = GrowingObject(path, path.read_bytes() if path.exists() else b"")
        else:
            self._file = open(path, "ab")  # noqa: SIM115  # `close` closes it

    def add(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def save(self) -> None:
        """Returns once every line is in the file. Raises UserError if a bucket refuses it."""
        if isinstance(self._file, GrowingObject):
            self._file.save()

    def close(self) -> None:
        """Raises UserError as `save` does."""
        self._file.close()
