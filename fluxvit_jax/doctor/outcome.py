"""The outcome of a check, and how a check tells it: by what it returns or raises."""

import importlib
import traceback
from typing import NamedTuple

from fluxvit_jax.errors import UserError

OK, FAILED, NOT_HERE = "ok", "FAILED", "not here"


class Place(NamedTuple):
    """Where checks may write, and how long they may take.

    folder: on the storage under test, perhaps in a bucket, not made yet; scratch: a local one;
    deadline: of `time.monotonic`, for all checks.
    """

    folder: str
    scratch: str
    deadline: float


class Outcome(NamedTuple):
    """A row of the table. detail: what was measured; cure: what to do about a failure."""

    result: str
    detail: str
    cure: str = ""


class FailedError(Exception):
    """Something does not hold. Arguments: what, and what to do about it."""

    def __init__(self, detail: str, cure: str):
        super().__init__(detail)
        self.detail, self.cure = detail, cure


class NotHereError(Exception):
    """There is nothing to check on this machine; the text says what is missing."""


def outcome_of(check: str, place: Place) -> Outcome:
    """The outcome of a function of this folder, such as "machine.versions".

    It takes the place, and returns what it measured. Whatever it raises is an outcome as well.
    """
    module, _, name = check.partition(".")
    try:
        function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return Outcome(OK, function(place))
    except NotHereError as error:
        return Outcome(NOT_HERE, str(error))
    except FailedError as error:
        return Outcome(FAILED, error.detail, error.cure)
    except UserError as error:  # which says what to do after a semicolon
        detail, _, cure = str(error).partition("; ")
        return Outcome(FAILED, detail, cure or "see docs/faq.md")
    except ImportError as error:
        return Outcome(FAILED, f"{error}", "install what requirements.txt pins: docs/install.md")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        cure = "make the folder writable and see that it has room, or name another --workdir"
        return Outcome(FAILED, f"{where}{error.strerror or error}", cure)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0][:200]
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{at.filename}, line {at.lineno}"
        cure = "this was not foreseen: report it with the whole table"
        return Outcome(FAILED, f"{type(error).__name__}: {text} ({where})", cure)
