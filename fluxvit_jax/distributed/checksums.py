"""Checksums of files, and of JSON objects that carry one, alone or a line each in a file."""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvit_jax.distributed import atomic, storage

if TYPE_CHECKING:  # a server that loads an exported folder does without
    from etils import epath

KEY = "crc32"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object with the CRC-32 of its text as the last one."""
    return {**values, KEY: zlib.crc32(json.dumps(dict(values)).encode())}


def take_checksum(values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The values without their checksum, and whether it is there and theirs."""
    rest = {name: value for name, value in values.items() if name != KEY}
    return rest, values.get(KEY) == add_checksum(rest)[KEY]


def to_line(values: Mapping[str, Any]) -> str:
    """The line of an object that `read_lines` reads."""
    return json.dumps(add_checksum(values))


def read_lines(path: "epath.Path") -> list[dict[str, Any]]:
    """The objects of a file of lines, without damaged ones; none if there is no file.

    Lines of a file without any checksum, as earlier versions wrote it, are taken as they are. A
    warning tells how many lines were damaged, but for a last one that a kill has cut short.

    Raises UserError if a bucket cannot be read.
    """
    with storage.errors(path):
        content = path.read_bytes() if path.exists() else b""
    texts = content.decode(errors="replace").splitlines()
    objects = [_parse(text) for text in texts]
    is_checked = any(KEY in values for values in objects)
    found = [take_checksum(values) for values in objects if values]
    intact = [values for values, matches in found if matches or not is_checked]
    is_cut_short = bool(texts) and not content.endswith(b"\n")
    if (damaged := len(texts) - len(intact)) > is_cut_short:
        logging.warning("%s: %d of %d lines are damaged and dropped", path, damaged, len(texts))
    return intact


def write_lines(path: "epath.Path", objects: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file that `read_lines` reads, atomically. Raises as `atomic.write`."""
    atomic.write(path, "".join(to_line(values) + "\n" for values in objects))


def _parse(text: str) -> dict[str, Any]:
    """The JSON object of a text; an empty one if it is none."""
    try:
        values = storage.parse_json(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
