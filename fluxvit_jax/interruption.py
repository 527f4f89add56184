"""Ctrl-C and SIGTERM as a question that a loop asks, answered alike on all hosts."""

import signal
from typing import Any

from fluxvit_jax import parallel


class Interruption:
    """A context in which the first signal is noted, and a second one acts at once.

    Hosts must stop at the same step, whichever of them was signalled. So what counts on several
    hosts is not what this host has heard, but what all have told each other: training sends `heard`
    with its batches and `learn`s the highest; `agree` asks at once.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.heard = 0  # by this host: 128 + signal
        self.status = 0  # by any: the exit status
        self._before: dict[int, Any] = {}

    def happened(self) -> bool:
        """Whether it is time to stop, as all hosts know it."""
        if parallel.host_count() == 1:
            self.status = self.heard
        return self.status != 0

    def learn(self, status: int) -> None:
        """Takes note of the highest that any host has `heard`."""
        self.status = max(self.status, status)

    def agree(self) -> bool:
        """`happened`, after asking all hosts, which all must call it."""
        self.learn(max(parallel.gather([self.heard])))
        return self.happened()

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.heard = 128 + number
        self.__exit__()
        parallel.say("stopping after this step; once more ends the program at once")
