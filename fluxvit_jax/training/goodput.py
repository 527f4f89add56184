"""Where the time of a run goes, over all of its starts.

`goodput.json` of a workdir holds seconds by what they were spent on. They add up to the time that
the run's processes have lived since they began to train. The share of `step` is the goodput.
"""

import json
import time
from collections.abc import Mapping, Sequence

from etils import epath

from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.mesh import host_index

FILE = "goodput.json"
# lost: spent on steps that no checkpoint has kept, so that a later start did them again.
SPENT_ON = ("start", "compile", "data_wait", "step", "evaluation", "checkpoint", "lost")
KEPT_SAVES = 32  # checkpoints whose times are remembered, at most

Seconds = dict[str, float]


class Goodput:
    """Clock of a run: `enter` says what the time is spent on from now on. Host 0 writes the file.

    A start that is killed is known up to its last `write`, which `flush` leaves out in a bucket.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / FILE
        self._spent: Seconds = dict.fromkeys(SPENT_ON, 0.0)
        self._saves: dict[int, Seconds] = {}  # step of a checkpoint -> spent until then
        self._before = dict(self._spent)  # in earlier starts
        self._on = "start"
        self._since = time.monotonic()

    def enter(self, what: str) -> None:
        """Counts the time since the last call for what it said; one of `SPENT_ON`."""
        now = time.monotonic()
        self._spent[self._on] += now - self._since
        self._on, self._since = what, now

    def resume(self, step: int) -> None:
        """Adds the earlier starts of a run that goes on from a checkpoint, or from step 0."""
        spent, saves = self._read()
        self._saves = {saved: own for saved, own in saves.items() if saved <= step}
        # The latest, since a checkpoint has none if the disk was full just after it was written.
        kept = self._saves[max(self._saves)] if self._saves else dict.fromkeys(SPENT_ON, 0.0)
        lost = sum(spent.values()) - sum(kept.values())
        for name in SPENT_ON:
            self._spent[name] += kept[name]
            self._before[name] = kept[name]
        self._spent["lost"] += lost

    def saved(self, step: int) -> None:
        """Notes that a checkpoint keeps all that was done until now."""
        self.enter(self._on)  # up to now
        self._saves[step] = dict(self._spent)
        if len(self._saves) > KEPT_SAVES:
            del self._saves[_least_missed(list(self._saves))]
        self.write()

    def write(self) -> None:
        """Writes the file. Raises OSError; in a bucket, UserError."""
        self.enter(self._on)
        if host_index() == 0:
            content = {"seconds": self._spent, "at_checkpoints": self._saves}
            atomic.write(self._path, json.dumps(content, indent=1) + "\n")

    def flush(self) -> None:
        """`write`, but for a bucket: an upload is too dear for the training loop."""
        if not storage.is_remote(self._path):
            self.write()

    @property
    def share(self) -> float:
        """The goodput so far, between 0 and 1."""
        self.enter(self._on)
        return self._spent["step"] / max(sum(self._spent.values()), 1e-9)

    @property
    def waiting(self) -> tuple[float, float]:
        """(seconds of steps and of waiting for their data in this start, share of the waiting)."""
        self.enter(self._on)
        step, wait = (self._spent[name] - self._before[name] for name in ("step", "data_wait"))
        return step + wait, wait / max(step + wait, 1e-9)

    def describe(self) -> str:
        """The goodput in a line, with all that took more than a hundredth of the time."""
        share, total = self.share, sum(self._spent.values())
        shares = {name: seconds / total for name, seconds in self._spent.items() if total}
        others = sorted(shares.items(), key=lambda item: -item[1])
        listed = [f"{n.replace('_', ' ')} {s:.0%}" for n, s in others if n != "step" and s >= 0.01]
        return f"goodput {share:.0%} of {total:.0f} s" + (f"; {', '.join(listed)}" * bool(listed))

    def _read(self) -> tuple[Seconds, dict[int, Seconds]]:
        """What the file holds; nothing if it is not there or damaged."""
        try:
            with storage.errors(self._path):
                content = storage.parse_json(self._path.read_text())
            saves = {int(step): _seconds(own) for step, own in content["at_checkpoints"].items()}
            return _seconds(content["seconds"]), saves
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return dict.fromkeys(SPENT_ON, 0.0), {}


def _least_missed(steps: Sequence[int]) -> int:
    """Of rising steps the one whose neighbors are closest for its age; some old ones stay."""

    def gap(k: int) -> float:
        return (steps[k + 1] - steps[k - 1]) / (steps[-1] - steps[k])

    return steps[min(range(1, len(steps) - 1), key=gap)]


def _seconds(stored: Mapping[str, float]) -> Seconds:
    return {name: float(stored[name]) for name in SPENT_ON}
