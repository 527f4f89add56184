"""Reads the weights in a `.pth` file without PyTorch, and without running anything it contains.

A `.pth` file is a zip archive: a pickle that describes objects, and beside it the raw numbers of
each storage. A pickle is a program that may call whatever it names. Here it never does: what it
names stays a name, `_Interpreter` knows the few opcodes that weights are written with, and each of
the few calls among them is carried out by code of ours. All else is refused.

Sizes are checked before they are believed: entries must be stored, not compressed, so that nothing
in the file can be larger than the file, and a tensor must lie inside its storage.
"""

import math
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fluxvit_jax.errors import UserError

MAX_FILE_BYTES = 16 * 2**30  # L in float32 with both moments of AdamW has 4
MAX_PICKLE_BYTES = 64 * 2**20  # describes objects only; a thousand tensors take 0.1
MAX_ENTRIES = 100_000
WRAPPERS = ("model", "module")  # official code, DeepSpeed

DTYPES = {
    "torch.FloatStorage": np.float32,
    "torch.DoubleStorage": np.float64,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
# Named by training checkpoints for what lies beside the weights; these become plain values.
PLAIN_NAMES = {"torch.float32", "torch.float64", "torch.float16", "torch.bfloat16"}
CALLS = {
    "argparse.Namespace",
    "builtins.set",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}

# Opcodes, by what they put on the stack.
OPERANDS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME"}

MAX_AXES = 32
MAX_COUNT = 2**48  # of elements; more fit on no disk
KEY_TYPES = (str, int, float, bool, type(None))  # hashing a deeply nested tuple would crash Python
MAX_KEY = 2**31  # keys are indices; larger integers can be chosen to collide, in quadratic time


class _Name(str):
    """A global that the pickle names. Only ever compared, never looked up."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # elements


class _Tensor(NamedTuple):
    """A tensor known to lie inside its storage; counts are of elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _RefusedError(Exception):
    """Says in a few words why a file is not read."""


def read_pth(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The weights of a `.pth` file by name, and the texts that its outermost dict holds.

    The weights are the dict under `model` or `module`, or the outermost one. Dtypes stay, bfloat16
    as that of ml_dtypes.

    Raises UserError: no such file, or one that is not a zip of PyTorch 1.6 or later, that is
    damaged, too large, or asks for anything but tensors.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # Whatever a damaged or hostile file makes zipfile, pickletools or a wrong operand raise.
    except (
        *(_RefusedError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError),
        *(ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError),
    ) as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise UserError(f"{path}: cannot be read as .pth: {reason}") from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    _check_kind(path)
    with zipfile.ZipFile(path) as archive:
        folder = _check_archive(archive, path.stat().st_size)
        whole = _Interpreter().run(archive.read(f"{folder}data.pkl"))
        weights = _find_weights(whole)
        total = sum(tensor.size * tensor.storage.dtype.itemsize for tensor in weights.values())
        if total > path.stat().st_size:
            raise _RefusedError(f"its tensors ask for {total} bytes, more than the file has")
        texts = {k: v for k, v in whole.items() if isinstance(k, str) and isinstance(v, str)}
        return _load(archive, folder, weights), texts


def _check_kind(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise _RefusedError(
            "it is in the format of PyTorch before 1.6, which is not safe to read; "
            "load it with PyTorch and save it again"
        )
    if start != b"PK\x03\x04":
        raise _RefusedError("it is no zip archive")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _RefusedError(f"it is larger than {MAX_FILE_BYTES >> 30} GiB")


def _check_archive(archive: zipfile.ZipFile, file_bytes: int) -> str:
    """The folder inside the archive that everything lies in, with its slash."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise _RefusedError(f"it has more than {MAX_ENTRIES} entries")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _RefusedError("its entries are compressed, as PyTorch never writes them")
    if sum(entry.file_size for entry in entries) > file_bytes:
        raise _RefusedError("its entries overlap")
    pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
    if len(pickles) != 1:
        raise _RefusedError(f"it has {len(pickles)} data.pkl and not one")
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise _RefusedError(f"its data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MiB")
    folder = pickles[0].filename.removesuffix("data.pkl")
    names = {entry.filename for entry in entries}
    if f"{folder}constants.pkl" in names:
        raise _RefusedError("it is a TorchScript program, not weights")
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in names else b"little"
    if order != b"little":
        raise _RefusedError(f"its byte order is {order[:10]!r} and not little")
    return folder


def _find_weights(whole: Any) -> dict[str, _Tensor]:
    if not isinstance(whole, dict):
        raise _RefusedError(f"it holds a {type(whole).__name__}, not a dict of tensors")
    wrapped = [whole[name] for name in WRAPPERS if isinstance(whole.get(name), dict)]
    weights = wrapped[0] if wrapped else whole
    strange = [str(k) for k, v in weights.items() if not isinstance(v, _Tensor)]
    if strange or not weights:
        where = f"neither {' nor '.join(WRAPPERS)} nor the file itself is a dict of tensors only"
        raise _RefusedError(f"{where}; there are {', '.join(strange[:5]) or 'none'}")
    if any(type(name) is not str for name in weights):
        raise _RefusedError("a tensor has no name")
    return weights


def _load(
    archive: zipfile.ZipFile, folder: str, tensors: Mapping[str, _Tensor]
) -> dict[str, np.ndarray]:
    storages: dict[_Storage, np.ndarray] = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        raw = archive.read(f"{folder}data/{storage.key}")
        if len(raw) != storage.size * storage.dtype.itemsize:
            raise _RefusedError(
                f"storage {storage.key} has {len(raw)} bytes, not what is said of it"
            )
        storages[storage] = np.frombuffer(raw, storage.dtype)
    return {name: _array(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    if not tensor.size:
        return np.empty(tensor.shape, numbers.dtype)
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
    return np.ascontiguousarray(view).reshape(tensor.shape)  # the former makes 0-d arrays 1-d


class _Interpreter:
    """Carries out the opcodes that weights are written with; only plain values are ever made."""

    MARK = object()

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copies_left = 0  # items that calls may still copy

    def run(self, pickle: bytes) -> Any:
        """The object that a pickle describes."""
        self.copies_left = len(pickle)  # an item takes a byte at least
        for opcode, operand, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name not in IGNORED:
                self._step(opcode.name, operand)
        raise _RefusedError("its pickle has no end")

    def _step(self, opcode: str, operand: Any) -> None:
        if opcode in OPERANDS:
            self.stack.append(operand)
        elif opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in EMPTY:
            self.stack.append(EMPTY[opcode]())
        elif opcode in TUPLES:
            self.stack.append(tuple(self._pop(TUPLES[opcode])))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[operand] = self.stack[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[operand])
        else:
            self._combine(opcode, operand)

    def _combine(self, opcode: str, operand: Any) -> None:
        """Opcodes that make something of what lies on the stack."""
        push = self.stack.append
        match opcode:
            case "MARK":
                push(self.MARK)
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "APPEND":
                self._extend(list, self._pop(1))
            case "APPENDS":
                self._extend(list, self._pop_to_mark())
            case "ADDITEMS":
                self._extend(set, self._pop_to_mark())
            case "SETITEM":
                self._extend(dict, self._pop(2))
            case "SETITEMS":
                self._extend(dict, self._pop_to_mark())
            case "GLOBAL":
                push(_known(*operand.split(" ", 1)))
            case "STACK_GLOBAL":
                push(_known(*self._pop(2)))
            case "BINPERSID":
                push(_storage(*self.stack.pop()))
            case "REDUCE" | "NEWOBJ":
                push(self._call(*self._pop(2)))
            case "BUILD":
                self._pop(1)  # attributes of an object: nothing that weights are made of
            case _:
                raise _RefusedError(
                    f"its pickle uses the opcode {opcode}, which weights do not need"
                )

    def _pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not self.MARK:
            items.append(item)
        return items[::-1]

    def _call(self, name: Any, arguments: Any) -> Any:
        """What a call gives; a list that is copied again and again would fill the memory."""
        if type(name) is not _Name or type(arguments) is not tuple:
            raise _RefusedError("its pickle calls what is no function")
        if arguments and isinstance(arguments[0], Sized):
            self.copies_left -= len(arguments[0])
        if self.copies_left < 0:
            raise _RefusedError("its pickle makes more of itself than it holds")
        return _called(name, arguments)

    def _extend(self, kind: type, items: Sequence[Any]) -> None:
        """Puts items into the list, set or dict on the stack; a dict takes keys and values."""
        target = self.stack[-1]
        if type(target) is not kind:
            raise _RefusedError(f"its pickle takes a {type(target).__name__} for a {kind.__name__}")
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_key, items))
        elif isinstance(target, dict):
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))


def _known(module: Any, name: Any) -> _Name:
    if type(module) is not str or type(name) is not str:
        raise _RefusedError(f"it asks for a {type(name).__name__} of a {type(module).__name__}")
    known = _Name(f"{module}.{name}".replace("__builtin__.", "builtins."))
    if known not in CALLS and known not in DTYPES and known not in PLAIN_NAMES:
        raise _RefusedError(
            f"it asks for {known}, which weights do not need, and nothing of it was run; if you "
            "trust the file, load it with PyTorch and save its weights alone"
        )
    return known


def _called(name: _Name, arguments: tuple) -> Any:
    """What a call in the pickle gives, made here and not by what it names."""
    match name:
        case "torch._utils._rebuild_tensor_v2":
            return _tensor(*arguments[:4])
        case "torch._utils._rebuild_parameter":
            return arguments[0]
        case "collections.OrderedDict":
            return {_key(key): value for key, value in (arguments[0] if arguments else ())}
        case "builtins.set":
            return set(map(_key, arguments[0]))
        case "torch.Size":
            return tuple(arguments[0])
        case "torch.device":
            return None  # where the weights once were
        case "argparse.Namespace":
            return {}
    raise _RefusedError(f"its pickle calls {name}")


def _key(value: Any) -> Any:
    if type(value) not in KEY_TYPES:
        raise _RefusedError(f"its pickle has a {type(value).__name__} for a key")
    if type(value) is int and abs(value) > MAX_KEY:
        raise _RefusedError(f"its pickle has an integer above {MAX_KEY} for a key")
    return value


def _storage(kind: str, name: _Name, key: str, _location: str, count: int) -> _Storage:
    if kind != "storage" or type(name) is not _Name or name not in DTYPES:
        raise _RefusedError("it refers to what is no storage")
    if type(key) is not str or not re.fullmatch(r"\d{1,9}", key):
        raise _RefusedError("a storage is not called by a number")
    _check_counts(count)
    return _Storage(key, np.dtype(DTYPES[name]), count)


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple) -> _Tensor:
    """A tensor, after making sure that it lies inside its storage and is no larger."""
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise _RefusedError(
            "a tensor is described by something else than storage, shape and strides"
        )
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise _RefusedError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    _check_counts(offset, *shape, *strides)
    tensor = _Tensor(storage, offset, shape, strides)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if tensor.size and (last >= storage.size or tensor.size > storage.size):
        raise _RefusedError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} does not lie in "
            f"its storage of {storage.size} elements"
        )
    return tensor


def _check_counts(*counts: int) -> None:
    for count in counts:
        if type(count) is not int or not 0 <= count <= MAX_COUNT:
            what = count if type(count) is int else f"a {type(count).__name__} of"
            raise _RefusedError(f"it counts {what} elements")
