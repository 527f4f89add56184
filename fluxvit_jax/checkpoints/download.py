"""Weights by name: those of the package, hf://OWNER/NAME of a hub, https:// with a checksum."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fluxvit_jax.convert import weight_files
from fluxvit_jax.data.tokenizer import VOCABULARY
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

BUILTIN = "builtin://"
BUILTIN_FOLDER = Path(__file__).parents[1] / "weights"
HUB = "hf://"
WEB = ("https://", "http://")
_HUB_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/([^@]+))?")
_CHUNK = 1 << 20
# What a folder of weights may hold besides: the last two of Flux-CLIP.
BESIDE = (
    weight_files.CONFIG,
    weight_files.PREPROCESSOR,
    weight_files.EVALUATIONS,
    weight_files.CLIP,
    VOCABULARY.name,
)


def local_copy(source: storage.PathLike) -> storage.PathLike:
    """The path of weights on this machine, downloaded where `source` is a name of the following.

    builtin://NAME: a file that comes with the package: builtin://ti is the network of `make demo`.
    hf://OWNER/NAME[@REVISION][/FILE]: a folder of the hub, or one file of it. The revision is a
    branch, a tag or a commit, "main" by default. It needs huggingface_hub, the extra `hub`.
    https://HOST/FILE#sha256=HEX: one file, whose content must have this checksum.

    Raises UserError: there is no such thing, it cannot be reached, or its checksum is another.
    """
    name = os.fspath(source)
    if name.startswith(BUILTIN):
        return _builtin(name)
    if name.startswith(HUB):
        return _from_hub(name)
    if name.startswith(WEB):
        return _from_web(name)
    return source


def _builtin(source: str) -> Path:
    path = BUILTIN_FOLDER / f"{source.removeprefix(BUILTIN)}.safetensors"
    if path.parent != BUILTIN_FOLDER or not path.exists():
        names = [BUILTIN + own.stem for own in sorted(BUILTIN_FOLDER.glob("*"))]
        raise UserError(f"{source}: the package has only {', '.join(names)}")
    return path


def _from_hub(source: str) -> Path:
    match = _HUB_NAME.fullmatch(source)
    if not match:
        raise UserError(
            f"{source}: write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FILE"
        )
    repository, revision, file = match.groups()
    with _hub_errors(source, repository, revision, file):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        weights = Path(hf_hub_download(repository, weight_files.WEIGHTS, revision=revision))
        folder = weights.parent  # it bears the name of the commit
        for other in BESIDE:
            try:
                hf_hub_download(repository, other, revision=folder.name)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue  # a folder may lack them
        return folder


@contextmanager
def _hub_errors(
    source: str, repository: str, revision: str | None, file: str | None
) -> Iterator[None]:
    """Turns what huggingface_hub raises into UserErrors of one line."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(
            f"{source}: needs huggingface_hub: pip install 'fluxvit_jax[hub]'"
        ) from None
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{source}: ask for access at {page}, then: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{source}: there is no {repository} that you may read; look for the name at {page}, "
            "and for one that is private: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{source}: {repository} has no revision {revision}; leave @{revision} out, or take a "
            f"branch, tag or commit from {page}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{source}: {constants.ENDPOINT} cannot be reached, and no copy is here"
        ) from error
    except errors.EntryNotFoundError as error:
        what = file or weight_files.WEIGHTS
        raise UserError(
            f"{source}: {repository} has no file {what}; name one of {page}: hf://{repository}/FILE"
        ) from error
    except (errors.HFValidationError, OSError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{source}: cannot be downloaded: {said}") from error


def _from_web(source: str) -> Path:
    address, _, fragment = source.partition("#")
    match = re.fullmatch("sha256=([0-9a-fA-F]{64})", fragment)
    name = _file_name(address)
    if not match or not name:
        raise UserError(
            f"{source}: write https://HOST/FILE#sha256=HEX, with the 64 digits that the publisher "
            "states, or those of a copy you trust: sha256sum FILE"
        )
    expected = match[1].lower()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxvit_jax"
    path = folder / expected / name
    try:
        if not path.exists():  # it is checked before it gets this name
            path.parent.mkdir(parents=True, exist_ok=True)
            weight_files.replace(path, lambda new: _download(address, new, expected))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _file_name(address: str) -> str:
    """The name of the file at an address; "" if it names none that a file may have."""
    try:
        name = os.path.basename(unquote(urlsplit(address).path))
    except ValueError:
        return ""
    return name if name.isprintable() and name.strip(".") else ""


def _download(address: str, path: Path, expected: str) -> None:
    """Writes what is at an address. Raises UserError if its checksum is another."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _content(address):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != expected:
        raise UserError(
            f"{address}: its sha256 is {digest.hexdigest()}, not {expected}; nothing was kept"
        )


def _content(address: str) -> Iterator[bytes]:
    """What is at an address, piece by piece. Raises UserError if it cannot be had."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            while chunk := answer.read(_CHUNK):
                yield chunk
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: cannot be downloaded: {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise UserError(f"{address}: cannot be reached: {error.reason}") from error
    except OSError as error:  # the connection broke
        raise UserError(f"{address}: cannot be downloaded: {error.strerror or error}") from error
    except (http.client.HTTPException, ValueError) as error:  # it is none, or the answer is
        raise UserError(f"{address}: cannot be downloaded: {error}") from error
