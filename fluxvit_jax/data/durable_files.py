"""Files whose content is on the disk before their name is: they survive a crash of the machine."""

import os
from pathlib import Path


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
