"""Files of this machine and objects in buckets of Google Cloud Storage, by one kind of path.

That is `etils.epath.Path`, which reaches gs://BUCKET/NAME through fsspec and gcsfs, the extra
`gcs`; neither is imported before such a path is met. Here is what is asked of many files at once,
so that a bucket is asked once and not for each, and what turns its failures into `UserError`s.

An object is whole or not there, but it can't grow or be renamed (see `atomic`). A folder of a
bucket is no more than how names of objects begin: it is there as long as they are.
"""

import functools
import importlib.util
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

SCHEME = "gs://"

# Where TensorFlow is installed, etils would import it for gs://, with errors of its own kind.
os.environ.setdefault("EPATH_USE_TF", "false")

PathLike = str | os.PathLike


def is_remote(path: PathLike) -> bool:
    """Whether a path is of a bucket."""
    return os.fspath(path).startswith(SCHEME)


def path_of(text: PathLike) -> "epath.Path":
    """A path as it was typed. Raises UserError for one of a bucket if gcsfs is not installed."""
    if is_remote(text):
        _require_gcsfs(text)
    elif "://" in os.fspath(text):
        raise UserError(f"{os.fspath(text)}: neither of this machine nor of a bucket, gs://")
    from etils import epath  # late: a server that loads an exported folder does without

    return epath.Path(text)


@contextmanager
def errors(path: PathLike) -> Iterator[None]:
    """Turns what goes wrong in a bucket inside into UserErrors that name `path`.

    Passed on as they are: the errors of this machine's files, and FileNotFoundError for an object
    that is not there.
    """
    if not is_remote(path):
        yield
        return
    _require_gcsfs(path)
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (OSError, ValueError, HttpError, ClientError, GoogleAuthError) as error:
        if isinstance(error, FileNotFoundError) and _bucket_exists(path):
            raise
        raise UserError(f"{os.fspath(path)}: {_reason(path, error)}") from error


def check(folder: PathLike) -> None:
    """Raises UserError if a folder of a bucket cannot be read, be it empty or not."""
    if is_remote(folder):
        with suppress(FileNotFoundError), errors(folder):
            system, name = _system(folder)
            system.ls(name)


def make_folder(folder: "epath.Path") -> None:
    """Makes a folder and those above it. In a bucket they come with the first object."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def is_folder(path: PathLike) -> bool:
    """Whether there is a folder of that name. Raises UserError, see `errors`."""
    with errors(path):
        return path_of(path).is_dir()


def read_bytes(path: PathLike) -> bytes:
    """The content of a file or, by one request, of an object.

    Raises OSError, and UserError, see `errors`.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    with errors(path):
        system, name = _system(path)
        return system.cat_file(name)


def folders_in(folder: PathLike) -> list[str]:
    """The names of the folders that are directly in a folder. Raises as `read_bytes` does."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    with errors(folder):
        system, name = _system(folder)
        entries = system.ls(name, detail=True)
    return [posixpath.basename(e["name"]) for e in entries if e["type"] == "directory"]


def files_below(folder: PathLike, inside: Sequence[str] = ("",)) -> list[str]:
    """The paths, relative to a folder, of all files in it and in its folders, in any order.

    inside: names of folders in it; then only what is in these. Links are followed. Raises
    UserError, see `errors`; a folder that is not there has no files.
    """
    if is_remote(folder):  # all of it takes one list, each of many folders would take its own
        files, wanted = list(_object_sizes(folder)), set(inside)
        return [file for file in files if "" in wanted or file.split("/")[0] in wanted]
    found = []
    for own in inside:
        for parent, _, names in os.walk(os.path.join(folder, own), followlinks=True):
            place = os.path.relpath(parent, folder)
            found += names if place == "." else [os.path.join(place, name) for name in names]
    return found


def file_sizes(paths: Sequence[str]) -> list[int]:
    """The size of each file in bytes, 0 for one that cannot be read.

    Paths of buckets must all be of one. Their sizes come from a list of the folder that holds them
    all, for 5000 objects a request. Raises UserError, see `errors`.
    """
    if not paths or not is_remote(paths[0]):
        with ThreadPoolExecutor(16) as pool:  # on a network each answer takes its time
            return list(pool.map(_file_size, paths))
    folder = _common_folder(paths)
    sizes = _object_sizes(folder)
    return [sizes.get(path.removeprefix(f"{folder}/"), 0) for path in paths]


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _common_folder(paths: Iterable[str]) -> str:
    names = {posixpath.dirname(path.removeprefix(SCHEME)) for path in paths}
    return SCHEME + posixpath.commonpath(names)


def _object_sizes(folder: PathLike) -> dict[str, int]:
    """Sizes in bytes by the objects' names relative to a folder of a bucket."""
    system, name = _system(folder)
    try:
        with errors(folder):
            entries = system.find(name, detail=True)
    except FileNotFoundError:
        return {}
    return {
        entry["name"].removeprefix(f"{name}/"): entry["size"]
        for entry in entries.values()
        if entry["type"] == "file"
    }


def _system(path: PathLike) -> tuple[Any, str]:
    """The file system of a path of a bucket, and its name in there; the same one each time."""
    _require_gcsfs(path)
    import fsspec

    system, name = fsspec.url_to_fs(os.fspath(path))
    return system, name.rstrip("/")


def _require_gcsfs(path: PathLike) -> None:
    if not _gcsfs_is_ready():
        raise UserError(f"{os.fspath(path)}: needs gcsfs: pip install gcsfs")


@functools.cache
def _gcsfs_is_ready() -> bool:
    """Whether gcsfs is installed; if so, it is set up."""
    if importlib.util.find_spec("gcsfs") is None:
        return False
    import fsspec

    # TensorStore, which writes the checkpoints, and other hosts change a bucket as well, so no list
    # of what is in it may be kept.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    for name in ("gcsfs", "google.auth"):  # what they log, some with a traceback, is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return True


def _bucket(path: PathLike) -> str:
    return os.fspath(path).removeprefix(SCHEME).partition("/")[0]


def _bucket_exists(path: PathLike) -> bool:
    system, _ = _system(path)
    try:
        return system.exists(_bucket(path))
    except Exception:  # not allowed to ask, say
        return True


def _reason(path: PathLike, error: Exception) -> str:
    """What is wrong and what to do, in one line."""
    bucket = _bucket(path)
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, FileNotFoundError):
        return (
            f"there is no bucket {bucket}; make it: gcloud storage buckets create {SCHEME}{bucket}"
        )
    if str(getattr(error, "code", "")) == "401":
        return (
            "no credentials that Google Cloud accepts; run gcloud auth application-default login, "
            f"or set GOOGLE_APPLICATION_CREDENTIALS: {said}"
        )
    if str(error).startswith("Forbidden"):
        return f"no permission; ask for the role Storage Object User on bucket {bucket}: {said}"
    return f"Google Cloud Storage fails: {said}"
