"""What a program tells people on its way: lines and progress bars, from host 0."""

import sys
from typing import Any

from tqdm import tqdm

from fluxvit_jax.distributed.mesh import host_index


def say(message: str) -> None:
    """Prints a line to stderr, on host 0 only, above a progress bar that is being drawn."""
    if host_index() == 0:
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


def progress_bar(total: float, **options: Any) -> tqdm:
    """Progress bar on host 0: updated in a terminal, elsewhere a line every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        leave=False,
        position=None if terminal else 0,  # nothing moves the cursor of a file
        disable=host_index() != 0,
        mininterval=0.2 if terminal else 10,
        delay=0 if terminal else 10,
        **options,
    )
