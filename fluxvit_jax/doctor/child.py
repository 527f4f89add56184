"""A check in a process of its own, so that one that crashes or hangs is an outcome as well."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from fluxvit_jax.doctor.outcome import FAILED, Outcome, Place, outcome_of

SAID = 100  # characters of what a process that crashed said last


def outcome_in_child(check: str, place: Place, seconds: float) -> Outcome:
    """`outcome_of` a check in a process that ends with it, and leaves the devices to the next."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    log = Path(place.scratch) / "check.log"
    child = context.Process(target=_send, args=(theirs, str(log), check, place))
    child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return Outcome(FAILED, f"hangs: not done in {seconds:.0f} s", "see docs/faq.md")
        return ours.recv()
    except EOFError:
        child.join()
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        said = f"; {lines[-1][:SAID]}" if lines else ""
        how = f"its process crashed with status {child.exitcode}{said}"
        return Outcome(FAILED, how, "see docs/faq.md")
    finally:
        child.kill()
        child.join()


def _send(channel: Connection, log: str, check: str, place: Place) -> None:
    """Sends the outcome; what libraries print goes into a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    channel.send(outcome_of(check, place))
