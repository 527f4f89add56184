"""Local files and objects in Google Cloud Storage buckets.

`etils.epath.Path` covers both: it reaches gs://BUCKET/NAME through fsspec and gcsfs (the extra
`gcs`), which are imported only for such a path. This module adds what epath lacks: requests about
many files at once, so that a bucket gets one request and not one for each file, and errors of a
bucket as `UserError`s.

Objects are written as a whole; they cannot grow or be renamed (see `atomic`). A folder of a bucket
is only a prefix of objects' names: it exists as long as such an object does.
"""

import errno
import functools
import importlib.util
import itertools
import json
import logging
import os
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

SCHEME = "gs://"

# Where TensorFlow is installed, etils would import it for gs://, with errors of its own kind.
os.environ.setdefault("EPATH_USE_TF", "false")

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def display_name(path: PathLike) -> str:
    """A path as text that can be printed: bytes that are not UTF-8 become `\\xe9`."""
    return os.fspath(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def path_of(text: PathLike) -> "epath.Path":
    """The path that a text names. Raises UserError for one in a bucket without gcsfs installed."""
    if is_remote(text):
        _require_gcsfs(text)
    elif "://" in os.fspath(text):
        raise UserError(f"{os.fspath(text)}: neither of this machine nor of a bucket, gs://")
    from etils import epath  # late: a server that loads an exported folder does without

    return epath.Path(text)


@contextmanager
def errors(path: PathLike) -> Iterator[None]:
    """A context that turns errors of a bucket into UserErrors that name `path`.

    Errors of local files stay as they are, and so does FileNotFoundError for a missing object.
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


@contextmanager
def write_errors(path: PathLike) -> Iterator[None]:
    """Turns what a disk that takes no more raises inside into a UserError that names `path`.

    That is a full disk, wherever it is met, a quota and a limit on the size of files, and below
    `path` a disk that has become read-only, or a missing permission.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        locked = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        # A write to an open file names none, and of these only fails on a read-only disk.
        below = error.filename is None or _is_below(error.filename, path)
        if not full and not (locked and below):
            raise
        cure = "make room" if full else "make it writable"
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"{os.fspath(path)}: {reason}; {cure} and start the same command again"
        ) from error


def _is_below(name: object, folder: PathLike) -> bool:
    """Whether a file that an error names lies in a folder."""
    above = os.path.abspath(folder)
    return isinstance(name, str) and os.path.abspath(name).startswith(os.path.join(above, ""))


def check(folder: PathLike) -> None:
    """Raises UserError if a folder of a bucket cannot be read; an empty one is fine."""
    if is_remote(folder):
        with suppress(FileNotFoundError), errors(folder):
            system, name = _system(folder)
            system.ls(name)


def make_folder(folder: "epath.Path") -> None:
    """Makes a folder and its parents. In a bucket they appear with the first object."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def is_folder(path: PathLike) -> bool:
    """Whether a folder of that name exists. Raises UserError, see `errors`."""
    with errors(path):
        return path_of(path).is_dir()


def read_bytes(path: PathLike) -> bytes:
    """The content of a file or, with a single request, of an object.

    Raises OSError, and UserError, see `errors`.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    with errors(path):
        system, name = _system(path)
        return system.cat_file(name)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is none, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def folders_in(folder: PathLike) -> list[str]:
    """The names of a folder's subfolders. Raises as `read_bytes` does.

    Links to folders count, except links to the folder itself or to a parent of it.
    """
    if not is_remote(folder):
        above = _with_parents(folder)
        with os.scandir(os.fspath(folder)) as entries:
            return [e.name for e in entries if e.is_dir() and os.path.realpath(e) not in above]
    with errors(folder):
        system, name = _system(folder)
        objects = system.ls(name, detail=True)
    return [posixpath.basename(o["name"]) for o in objects if o["type"] == "directory"]


def files_below(folder: PathLike, inside: Sequence[str] = ("",)) -> list[str]:
    """The relative paths of all files in a folder and its subfolders, in any order.

    inside: names of subfolders, to list only the files in these. Links are followed, but below each
    of these folders every real folder is read once, and no parent of `folder` is read again.
    Raises UserError, see `errors`, and if a folder cannot be listed; one that does not exist has no
    files.
    """
    if is_remote(folder):  # one request lists all of it; each of many folders would need its own
        files, tops = list(_object_sizes(folder)), set(inside)
        return [file for file in files if "" in tops or file.split("/")[0] in tops]
    paths = []
    for top in inside:
        for parent, names in _folders_below(os.path.join(folder, top), _with_parents(folder)):
            relative = os.path.relpath(parent, folder)
            paths += names if relative == "." else [os.path.join(relative, name) for name in names]
    return paths


def _folders_below(top: str, above: set[str]) -> Iterator[tuple[str, list[str]]]:
    """A folder and its subfolders, each with its files' names, but no real path in `above`.

    Real folders come before links, and links in the order of their names, so that a folder that
    can be reached in several ways gets the same path on every machine.
    """
    read = above - {os.path.realpath(top)}
    tops = [top]
    while tops:
        links = []
        walks = (os.walk(top, onerror=_refuse_to_skip) for top in tops)
        for parent, folders, names in itertools.chain.from_iterable(walks):
            real = os.path.realpath(parent)
            if real in read:
                folders.clear()
                continue
            read.add(real)
            yield parent, names
            paths = [os.path.join(parent, folder) for folder in folders]
            links += [path for path in paths if os.path.islink(path)]
        tops = sorted(links)


def _refuse_to_skip(error: OSError) -> None:
    """Raises UserError for a folder that cannot be listed: its files would be missed unnoticed."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise UserError(
            f"{display_name(error.filename)}: cannot be listed: {error.strerror}"
        ) from None


def _with_parents(folder: PathLike) -> set[str]:
    """The real paths of a folder and all its parents."""
    real = PurePath(os.path.realpath(folder))
    return {str(path) for path in (real, *real.parents)}


def file_sizes(paths: Sequence[str]) -> list[int]:
    """The size of each file in bytes; 0 for one that cannot be read.

    Remote paths must all be in one bucket. Their sizes come from a listing of their common folder,
    with 5000 objects a request. Raises UserError, see `errors`.
    """
    if not paths or not is_remote(paths[0]):
        with ThreadPoolExecutor(16) as pool:  # network file systems have a high latency
            return list(pool.map(_file_size, paths))
    parents = {posixpath.dirname(path.removeprefix(SCHEME)) for path in paths}
    folder = SCHEME + posixpath.commonpath(parents)
    sizes = _object_sizes(folder)
    return [sizes.get(path.removeprefix(f"{folder}/"), 0) for path in paths]


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _object_sizes(folder: PathLike) -> dict[str, int]:
    """Sizes in bytes of the objects in a folder, by their names relative to it."""
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
    """The fsspec file system of a remote path, one for all calls, and the name in it."""
    _require_gcsfs(path)
    import fsspec

    system, name = fsspec.url_to_fs(os.fspath(path))
    return system, name.rstrip("/")


def _require_gcsfs(path: PathLike) -> None:
    if not _gcsfs_is_ready():
        raise UserError(f"{os.fspath(path)}: needs gcsfs: pip install gcsfs")


@functools.cache
def _gcsfs_is_ready() -> bool:
    """Whether gcsfs is installed. If so, configures it."""
    if importlib.util.find_spec("gcsfs") is None:
        return False
    import fsspec

    # TensorStore, which writes the checkpoints, and other hosts change the bucket as well, so
    # listings must not be cached.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    for name in ("gcsfs", "google.auth"):  # they raise all that they log, some with a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return True


def _bucket(path: PathLike) -> str:
    return os.fspath(path).removeprefix(SCHEME).partition("/")[0]


def _bucket_exists(path: PathLike) -> bool:
    system, _ = _system(path)
    try:
        return system.exists(_bucket(path))
    except Exception:  # for example, without permission to ask
        return True


def _reason(path: PathLike, error: Exception) -> str:
    """The cause of an error and what to do about it, in one line."""
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
