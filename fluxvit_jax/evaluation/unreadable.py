"""Videos of an evaluation that cannot be read: they count as wrong, and are named."""

import contextlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.data.reading import reasons_unreadable
from fluxvit_jax.data.sources import Record, Source
from fluxvit_jax.errors import UserError


class NothingReadableError(UserError):
    """No video of a data set can be read, so that an accuracy of 0 % would be meaningless.

    All hosts of a run raise it together.
    """

    def __init__(self, data: str, videos: int, first: Record, reason: str):
        where = ""
        if isinstance(first.video, str):
            root = first.video.removesuffix(first.id).rstrip("/")
            where = f"; they were looked for in {root}, see config.data.root" if root else ""
        super().__init__(
            f"{data}: not one of {videos} videos can be read; {first.id}: {reason}{where}"
        )


def check_readable(source: Source, data: str, config: ConfigDict) -> None:
    """Raises `NothingReadableError` unless some video can be read; the first such ends the check.

    data: name of the videos for the message.
    """
    first = ""
    reasons = reasons_unreadable(source, config.data.workers, config.data.clip_seconds)
    with contextlib.closing(reasons):
        for reason in reasons:
            if not reason:
                return
            first = first or reason
    if first:
        raise NothingReadableError(data, len(source), source[0], first)


def describe_failures(failed: int, videos: int, first: str) -> str:
    """Message with the number of unreadable videos and the first one's "ID: REASON"."""
    return f"{failed} of {videos} videos could not be read and count as wrong; {first}"


def warn_of_failures(config: ConfigDict, failed: int, videos: int, first: str) -> str | None:
    """Warning if more than `data.max_bad_fraction` of the videos failed; else None."""
    share = config.data.max_bad_fraction
    if failed <= share * videos:
        return None
    more = f"; that is more than data.max_bad_fraction={share}"
    return describe_failures(failed, videos, first) + more


def check_some_readable(
    config: ConfigDict, source: Source, videos: Sequence[dict[str, Any]]
) -> None:
    """Raises NothingReadableError if no video could be read. videos: as `by_number` has them."""
    if all(video["failure"] for video in videos):
        raise NothingReadableError(
            config.data.validation, len(source), source[0], videos[0]["failure"]
        )


def first_of(failures: Sequence[dict[str, str]]) -> str:
    """The first failure as a line "ID: REASON"; "" if there is none."""
    return f"{failures[0]['id']}: {failures[0]['reason']}" if failures else ""
