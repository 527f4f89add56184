"""What this package promises, tried on this machine and this storage, in five minutes at most.

    python -m fluxvit_jax.doctor [--workdir=DIR] [--only=NAME,...]

Each check runs in a process of its own: one that crashes or hangs is a row of the table as well.
Everything that is written is removed at the end. Exit status: 0 if all holds, 1 if something does
not, 2 for a wrong command line, 130 or 143 when Ctrl-C or SIGTERM ended it.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple

from fluxvit_jax.distributed import storage
from fluxvit_jax.doctor.child import outcome_in_child
from fluxvit_jax.doctor.outcome import FAILED, OK, Outcome, Place, outcome_of
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.main import avoid_libtpu

SECONDS = 300  # for everything
CHECK_SECONDS = 120  # for one check in a process of its own
# Of what stands beside names and results; paths stay whole.
_WRAPPER = textwrap.TextWrapper(80, break_long_words=False, break_on_hyphens=False)


class Check(NamedTuple):
    """A row. function: in this folder; what: it tries, for --help."""

    name: str
    function: str
    what: str


CHECKS = (
    Check("versions", "machine.versions", "the installed packages fit together"),
    Check("devices", "machine.devices", "JAX sees the devices, and they multiply right"),
    Check("attention", "machine.attention", "each attention kernel equals the plain one"),
    Check("memory", "machine.memory", "shared memory holds the batches of data workers"),
    Check("space", "workdir.space", "the workdir has room for checkpoints"),
    Check("clock", "workdir.clock", "the storage dates files as this machine does"),
    Check("lock", "workdir.lock", "a second run is kept out of a workdir"),
    Check("writes", "workdir.writes", "files are replaced as a whole"),
    Check("decoders", "videos.decoders", "videos are decoded right, and a broken one is told"),
    Check("workers", "videos.workers", "a data worker that is killed is replaced"),
    Check("resume", "runs.resume", "a run that is killed and resumed ends in the same bits"),
    Check("damage", "runs.damage", "a damaged checkpoint is noticed, and the one before taken"),
)
NAMES = [check.name for check in CHECKS]
# They run in this process, which only starts and watches others.
RUNS = ("resume", "damage")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks that a command line asks for; returns the exit status."""
    avoid_libtpu()
    try:
        options = _options(argv)
        checks = _chosen(options.only)
        with _sigterm_as_exit(), _place(options.workdir) as place:
            begin = time.monotonic()
            outcomes = _run(checks, place)
            print(_table(outcomes, place, time.monotonic() - begin))
    except (UserError, OSError) as error:  # such as no room for temporary files
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return int(any(outcome.result == FAILED for outcome in outcomes.values()))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    rows = "\n".join(f"  {check.name:<10} {check.what}" for check in CHECKS)
    parser = ArgumentParser(
        prog="python -m fluxvit_jax.doctor",
        description=__doc__,
        epilog=f"checks:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir",
        default="runs" if os.path.isdir("runs") else ".",
        help="folder on the storage to test, also gs://BUCKET/DIR; default: %(default)s",
    )
    parser.add_argument("--only", default="", help="names of checks, such as lock,resume")
    return parser.parse_args(argv)


def _chosen(only: str) -> list[Check]:
    names = only.split(",") if only else NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--only={unknown[0]}: none of {', '.join(NAMES)}")
    return [check for check in CHECKS if check.name in names]


@contextlib.contextmanager
def _place(workdir: str) -> Iterator[Place]:
    """Folders for the checks, removed at the end, as is a workdir that was not there before."""
    parent = storage.path_of(workdir)
    above = [] if storage.is_remote(parent) else [parent, *parent.parents]
    new = [path for path in above if not os.path.exists(path)]
    folder = parent / f"doctor-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="fluxvit-doctor-") as scratch:
        try:
            yield Place(os.fspath(folder), scratch, time.monotonic() + SECONDS)
        finally:
            with contextlib.suppress(OSError, UserError):
                if folder.exists():
                    folder.rmtree()
            with contextlib.suppress(OSError):
                for path in new:
                    os.rmdir(path)


def _run(checks: Sequence[Check], place: Place) -> dict[str, Outcome]:
    """The outcome of each check, told as it comes."""
    outcomes = {}
    for check in checks:
        print(f"{check.name}: {check.what} ... ", end="", file=sys.stderr, flush=True)
        begin = time.monotonic()
        left = min(CHECK_SECONDS, place.deadline - begin)
        if left <= 0:
            outcome = Outcome(FAILED, f"not tried: {SECONDS} s are over", f"--only={check.name}")
        elif check.name in RUNS:
            outcome = outcome_of(check.function, place)
        else:
            outcome = outcome_in_child(check.function, place, left)
        seconds = time.monotonic() - begin
        print(f"{outcome.result} ({seconds:.1f} s)", file=sys.stderr, flush=True)
        outcomes[check.name] = outcome
    return outcomes


def _table(outcomes: dict[str, Outcome], place: Place, seconds: float) -> str:
    lines = []
    for name, outcome in outcomes.items():
        about = _WRAPPER.wrap(outcome.detail) or [""]
        if outcome.cure:
            about += _WRAPPER.wrap(f"-> {outcome.cure}")
        titles = [f"{name:<10} {outcome.result:<8}", *[" " * 19] * (len(about) - 1)]
        lines += [f"{title} {line}" for title, line in zip(titles, about, strict=True)]
    failed = [name for name, outcome in outcomes.items() if outcome.result == FAILED]
    holds = sum(outcome.result == OK for outcome in outcomes.values())
    summary = f"{len(failed)} FAILED: {', '.join(failed)}" if failed else f"all {holds} hold"
    where = os.path.dirname(place.folder) or "."
    return "\n".join([*lines, f"{summary}; {seconds:.0f} s, workdir {where}"])


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """A context in which SIGTERM ends this process as an exception does, which removes files."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
