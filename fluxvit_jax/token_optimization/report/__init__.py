"""Reports of Token Optimization: JSON, CSV, an HTML page and a picture.

A *cell* is one way to run the network: a method, a budget, a grid (frames x resolution) and a head.
"select" keeps `budget` tokens of a grid that has more, "plain" runs a grid as it is, "merge" lets
all tokens in and merges them on the way. Halving stops cells that fall behind after fewer videos.
Their accuracies are of those videos only, so they are drawn but never called best.
"""

import json
from pathlib import Path
from typing import Any

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.errors import UserError


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes report.json, .csv, .html and .png into `folder`, each whole or not at all.

    Entries that an unfinished search does not know yet may be missing in `report`, or None.

    Raises UserError if the folder cannot be written.
    """
    # Importing matplotlib takes a second, so only drawing imports it.
    from fluxvit_jax.token_optimization.report import csv_table, page, picture, reading

    complete = reading.complete(report)
    files = {
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        "report.csv": csv_table.text(complete).encode(),
        "report.html": page.text(complete).encode(),
        "report.png": picture.png(complete),
    }
    try:
        storage.make_folder(folder)
        for name, content in files.items():
            atomic.write(folder / name, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
