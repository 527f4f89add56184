"""Stacks of the processes that a hanging program has started: see `watchdog`.

Apart from it, since data workers import this, and would spend most of their start on JAX.
"""

import faulthandler
import os
import signal

STACKS = "FLUXVIT_STACKS"  # environment variable: file that processes write their stacks to
SIGNAL = signal.SIGUSR1  # on which they do


def listen() -> None:
    """Has this process, a child of one with a `Watchdog`, append its stacks when that asks."""
    if path := os.environ.get(STACKS):
        file = open(path, "a")  # noqa: SIM115  # faulthandler needs it open
        faulthandler.register(SIGNAL, file)
