"""Files that are there whole or not at all, whenever the program is killed."""

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Writes a file in place of the one that may be there. Raises OSError."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
