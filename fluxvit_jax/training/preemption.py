"""Graceful stop on Ctrl-C and SIGTERM, at the same step on all hosts."""

import signal
from types import FrameType
from typing import Any

from fluxvit_jax.distributed.mesh import gather, host_count, say


class PreemptionHandler:
    """A context in which the first signal asks for a stop, and a second one acts at once.

    Hosts must stop at the same step, whichever of them got the signal. So with several hosts a
    signal counts only once all hosts know it: training sends `signal` with its batches and passes
    the maximum to `update`, or calls `sync`.

    Attributes:
        signal: 128 + the signal that this host has got, or 0.
        status: the exit status that all hosts know, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.status = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def should_stop(self) -> bool:
        """Whether all hosts know that it is time to stop."""
        if host_count() == 1:
            self.status = self.signal
        return self.status != 0

    def update(self, signal_of_hosts: int) -> None:
        """Takes the maximum of all hosts' `signal`."""
        self.status = max(self.status, signal_of_hosts)

    def sync(self) -> bool:
        """`should_stop` after an exchange between all hosts, which all must call it."""
        self.update(max(gather([self.signal])))
        return self.should_stop()

    def __enter__(self) -> "PreemptionHandler":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.signal = 128 + number
        self.__exit__()
        say("stopping after this step; once more ends the program at once")
