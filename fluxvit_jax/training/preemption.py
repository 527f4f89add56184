"""Graceful stop on Ctrl-C and SIGTERM, at the same step on all hosts."""

from contextlib import ExitStack
from types import FrameType

from fluxvit_jax.distributed import lifelines
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.interrupts import handled_by
from fluxvit_jax.distributed.mesh import gather, host_count


class PreemptionHandler:
    """A context in which the first signal asks for a stop, and a second one acts at once.

    Hosts must stop at the same step, whichever of them got the signal. So with several hosts a
    signal counts only once all hosts know it: training sends what `heard` tells with its batches
    and passes the maximum to `update`, or calls `sync`. `lifelines` carry a signal from one host to
    the others, so that none of them waits for data any more: see `stops_waiting`.

    Attributes:
        status: the exit status that all hosts know, or 0.
    """

    def __init__(self) -> None:
        self.status = 0
        self._signal = 0  # 128 + the one that this host has got
        self._handling = ExitStack()  # closed at the first signal

    def heard(self) -> int:
        """128 + a signal that this host has got or heard of, or 0; others may not have yet."""
        return self._signal or lifelines.stop_status()

    def should_stop(self) -> bool:
        """Whether all hosts know that it is time to stop."""
        if host_count() == 1:
            self.status = self._signal
        return self.status != 0

    def stops_waiting(self) -> bool:
        """Whether this host is to wait no longer for its next batch; what follows, all decide."""
        return self.heard() != 0

    def update(self, heard_by_hosts: int) -> None:
        """Takes the maximum of what all hosts have `heard`."""
        self.status = max(self.status, heard_by_hosts)

    def sync(self) -> bool:
        """`should_stop` after an exchange between all hosts, which all must call it."""
        self.update(max(gather([self.heard()])))
        return self.should_stop()

    def __enter__(self) -> "PreemptionHandler":
        told = lifelines.signal_descriptor()
        self._handling.enter_context(handled_by(self._on_signal, told))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signal = 128 + number
        self._handling.close()
        say("stopping after this step; once more ends the program at once")
