"""The reader of `.pth` files: what PyTorch writes it reads, what is hostile or damaged it refuses.

Hostile files are made here, opcode by opcode, so that they need no PyTorch.
"""

import argparse
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fluxvit_jax.convert import torch_pickle
from fluxvit_jax.convert.torch_pickle import read_pth
from fluxvit_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, count=6, key="0", storage=FLOATS) -> bytes:
    """The opcodes of a float tensor; by default a plain one of 2 x 3."""
    place = b"(" + text("storage") + storage + text(key) + text("cpu") + number(count) + b"tQ"
    extra = b"\x89" + b"ccollections\nOrderedDict\n)R"  # requires_grad False, no hooks
    arguments = place + number(offset) + numbers(*shape) + numbers(*strides) + extra
    return REBUILD + b"(" + arguments + b"tR"


def state(*items: bytes) -> bytes:
    """A pickle of a dict: name, value, name, value, ..."""
    return b"\x80\x02}(" + b"".join(items) + b"u."


def write(path: Path, pickled: bytes, storage: bytes = np.arange(6, dtype="<f4").tobytes(), **more):
    with zipfile.ZipFile(path, "w", more.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return path


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(UserError) as error:
        read_pth(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert reason in message


def test_the_golden_file_is_read():
    weights, texts = read_pth(GOLDEN / "tiny_state.pth")
    with np.load(GOLDEN / "tiny_state.npz") as golden:
        assert weights.keys() == set(golden)
        for name, array in golden.items():
            assert weights[name].dtype == array.dtype
            np.testing.assert_array_equal(weights[name], array, strict=True)
    assert texts == {}


def test_a_tensor_made_by_hand_is_read(tmp_path):
    """The base of the hostile files below: without what makes them hostile they are fine."""
    weights, texts = read_pth(write(tmp_path / "a.pth", state(text("x"), tensor())))
    np.testing.assert_array_equal(weights["x"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert texts == {}


def test_views_are_read_as_they_are_seen(tmp_path):
    pickled = state(
        *(text("transposed"), tensor((3, 2), (1, 3))),
        *(text("from 2"), tensor((2,), (2,), offset=2)),
        *(text("scalar"), tensor((), (), offset=5)),
        *(text("empty"), tensor((0, 3), (3, 1))),
    )
    weights, _ = read_pth(write(tmp_path / "a.pth", pickled))
    assert weights["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert weights["from 2"].tolist() == [2, 4]
    assert weights["scalar"].shape == () and weights["scalar"] == 5
    assert weights["empty"].shape == (0, 3)


def test_texts_beside_the_weights_are_returned(tmp_path):
    pickled = state(
        *(text("epoch"), number(3), text("note"), text("hello")),
        *(text("model"), b"}", text("x"), tensor(), b"s"),
    )
    weights, texts = read_pth(write(tmp_path / "a.pth", pickled))
    assert list(weights) == ["x"] and texts == {"note": "hello"}


@pytest.mark.parametrize("wrapper", [None, "model", "module"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_pytorch_writes_is_read(tmp_path, wrapper, dtype):
    torch = pytest.importorskip("torch", reason="makes the file with PyTorch")
    layer = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    layer = layer.to(getattr(torch, dtype))
    saved = layer.state_dict() | {
        "shared": layer[0].weight.t(),
        "whole": torch.nn.Parameter(layer[0].bias),
    }
    whole = {wrapper: saved, "epoch": 7} if wrapper else saved
    torch.save(whole, tmp_path / "a.pth")
    weights, _ = read_pth(tmp_path / "a.pth")
    assert weights.keys() == saved.keys()
    for name, expected in saved.items():
        expected = expected.detach()
        assert weights[name].dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        assert weights[name].shape == tuple(expected.shape)
        bits = expected.contiguous().view(torch.uint8).numpy().tobytes()
        assert weights[name].tobytes() == bits


def test_a_training_checkpoint_of_the_official_code_is_read(tmp_path):
    """Optimiser state, scaler, arguments, as its save_model writes them beside the weights."""
    torch = pytest.importorskip("torch", reason="makes the file with PyTorch")
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    whole = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
        "args": argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.999], resume=None, eval=False),
        "dtype": torch.bfloat16,
        "param_shapes": [{"weight": layer.weight.shape}],
        "sparse_tensor_module_names": {"a"},
        "device": torch.device("cpu"),
    }
    torch.save(whole, tmp_path / "a.pth")
    weights, _ = read_pth(tmp_path / "a.pth")
    np.testing.assert_array_equal(weights["weight"], layer.weight.detach().numpy())
    assert list(weights) == ["weight", "bias"]


class Payload:
    """Unpickled by Python itself, this would make a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["whole", "beside", "key"])
def test_code_is_not_run(tmp_path, protocol, where):
    ran = tmp_path / "ran"
    payload = Payload(os.system, f"touch {ran}")
    whole = {"whole": payload, "beside": {"model": {}, "x": payload}, "key": {"a": [payload]}}
    pickled = pickle.dumps(whole[where], protocol)
    refuse(write(tmp_path / "a.pth", pickled), "it asks for posix.system")
    assert not ran.exists()
    pickle.loads(pickled)
    assert ran.exists()  # the payload was a real one


@pytest.mark.parametrize(
    "called",
    [
        *(b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"c__builtin__\nexec\n"),
        *(b"ctorch\nload\n", b"ctorch.storage\n_load_from_bytes\n", b"cnumpy\nload\n"),
        *(b"ccollections\nOrderedDict.__init__\n", b"cargparse\nArgumentParser\n"),
    ],
)
def test_no_other_global_is_known(tmp_path, called):
    pickled = b"\x80\x02" + called + text("1") + b"\x85R."
    refuse(write(tmp_path / "a.pth", pickled), "it asks for")


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02(cargparse\nNamespace\no.", "opcode OBJ"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02P1\n.", "opcode PERSID"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls what is no function"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02}(((K\x01ttK\x02u.", "tuple for a key"),
        # These collide: a dict of them takes quadratic time.
        (pickle.dumps({k * (2**61 - 1): 0 for k in range(30_000)}, 2), "integer above"),
        (b"\x80\x02K\x01K\x02s.", "cannot be read"),
        (b"\x80\x02].", "holds a list"),
        (b"\x80\x02}.", "there are none"),
        (b"\x80\x02}", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_odd_pickles_are_refused(tmp_path, pickled, reason):
    refuse(write(tmp_path / "a.pth", pickled), reason)


def test_a_pickle_nested_without_end_is_refused(tmp_path):
    deep = b"\x80\x02" + b")" + b"\x85" * 200_000 + b"."
    refuse(write(tmp_path / "a.pth", deep), "holds a tuple")
    as_key = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."
    refuse(write(tmp_path / "b.pth", as_key), "tuple for a key")


@pytest.mark.parametrize(
    "bad",
    [
        {"strides": (4, 1)},
        {"strides": (2**40, 1)},
        {"strides": (-3, 1)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**70},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (7,), "strides": (0,)},
        {"shape": (2, -3)},
        {"shape": (2,), "strides": (3, 1)},
        {"shape": (1,) * 40, "strides": (1,) * 40},
        {"count": 7},
        {"count": 5},
        {"count": -6},
        {"key": "../0"},
        {"key": "1"},
        {"storage": b"ctorch\nbfloat16\n"},
        {"storage": b"ctorch\nDoubleStorage\n"},
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, bad):
    refuse(write(tmp_path / "a.pth", state(text("x"), tensor(**bad))), "cannot be read as .pth")


def test_many_copies_of_one_storage_are_refused(tmp_path):
    """A small file must not fill the memory: here 4000 transposed views of 40 kB."""
    large = np.zeros((100, 100), "<f4").tobytes()
    view = tensor((100, 100), (1, 100), count=10_000)
    pickled = state(*(part for i in range(4000) for part in (text(f"x{i}"), view)))
    refuse(write(tmp_path / "a.pth", pickled, large), "more than the file has")


def test_a_compressed_bomb_is_refused(tmp_path):
    zeros = bytes(50_000_000)
    pickled = state(text("x"), tensor((12_200_000,), (1,), count=12_200_000))
    path = write(tmp_path / "a.pth", pickled, zeros, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refuse(path, "compressed")


def test_entries_that_overlap_are_refused(tmp_path):
    """Every entry of the directory points at the same bytes."""
    path = write(tmp_path / "a.pth", state(text("x"), tensor()), bytes(100_000))
    with zipfile.ZipFile(path, "a") as archive:
        one = archive.getinfo("archive/data/0")
        for i in range(1, 50):
            other = zipfile.ZipInfo(f"archive/data/{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(other, field, getattr(one, field))
            archive.filelist.append(other)
        archive._didModify = True
    refuse(path, "overlap")


def test_a_file_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_FILE_BYTES", 100)
    refuse(write(tmp_path / "a.pth", state(text("x"), tensor())), "larger than")


def test_damage_is_refused(tmp_path):
    whole = (GOLDEN / "tiny_state.pth").read_bytes()
    path = tmp_path / "a.pth"
    for length in (0, 1, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuse(path, "cannot be read as .pth")
    path.write_bytes(whole[: len(whole) // 2] + b"\x55" + whole[len(whole) // 2 + 1 :])
    refuse(path, "Bad CRC")
    refuse(tmp_path / "missing.pth", "no such file")


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # damaged texts
def test_random_damage_to_the_pickle_never_escapes(tmp_path):
    """Whatever is flipped, the file is read or refused: no other error, nothing run."""
    rng = np.random.default_rng(0)
    good = state(*(part for i in range(4) for part in (text(f"x{i}"), tensor())))
    refused = 0
    for _ in range(1500):
        bad = bytearray(good)
        for place in rng.integers(len(bad), size=rng.integers(1, 4)):
            bad[place] = rng.integers(256)
        try:
            read_pth(write(tmp_path / "a.pth", bytes(bad)))
        except UserError:
            refused += 1
    assert refused > 1000


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    refuse(path, "before 1.6")
    path.write_bytes(b"not a checkpoint")
    refuse(path, "no zip archive")
    good = state(text("x"), tensor())
    refuse(write(path, good, **{"constants.pkl": b""}), "TorchScript")
    refuse(write(path, good, byteorder=b"big"), "byte order")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(path, "0 data.pkl")
    refuse(tmp_path, "cannot be read")


def test_a_file_of_pytorch_before_1_6_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="makes the file with PyTorch")
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    refuse(tmp_path / "a.pth", "before 1.6")


def test_what_is_no_tensor_is_named(tmp_path):
    pickled = state(text("x"), tensor(), text("epoch"), number(3))
    refuse(write(tmp_path / "a.pth", pickled), "there are epoch")


def doubling(levels: int = 200) -> bytes:
    """The opcodes of a list that holds one list twice, which holds one list twice, and so on."""
    inner = b"]q\x00"
    for level in range(levels):
        inner += b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return inner


@pytest.mark.parametrize(
    "pickled",
    [
        b"ctorch\ndevice\n" + doubling() + b"\x85R",
        b"(" + doubling() + FLOATS + text("0") + text("cpu") + number(6) + b"tQ",
        b"(" + text("storage") + FLOATS + doubling() + text("cpu") + number(6) + b"tQ",
        b"(" + text("storage") + FLOATS + text("0") + text("cpu") + doubling() + b"tQ",
        doubling() + doubling() + b"\x93",
        text("torch") + doubling() + b"\x93",
        REBUILD + b"(" + tensor()[len(REBUILD) + 1 :].partition(b"Q")[0] + b"Q"
        b"K\x00(" + doubling() + b"t(K\x01t\x89tR",
    ],
)
def test_what_is_nested_is_not_written_out(tmp_path, pickled):
    """A text of it would have 2^200 characters."""
    path = write(tmp_path / "a.pth", b"\x80\x02" + pickled + b".")
    assert path.stat().st_size < 5000
    refuse(path, "cannot be read as .pth")


PAIRS = b"](" + text("ab") * 1000 + b"e"  # a list of 1000 texts, each also a key and a value


@pytest.mark.parametrize(
    ("called", "items"),
    [
        (b"ctorch\nSize\n", PAIRS),
        (b"c__builtin__\nset\n", PAIRS),
        (b"ccollections\nOrderedDict\n", PAIRS),
        (b"ctorch\nSize\n", text("a" * 1000)),
    ],
)
def test_one_list_is_not_copied_again_and_again(tmp_path, called, items):
    """Else a file of 1 MB would make more of it than a machine has memory."""
    calls = (called + b"h\x00\x85R") * 500
    path = write(tmp_path / "a.pth", b"\x80\x02" + items + b"q\x00" + calls + b".")
    refuse(path, "makes more of itself than it holds")


def test_a_device_beside_the_weights_is_left_aside(tmp_path):
    device = b"ctorch\ndevice\n" + text("cuda") + number(0) + b"\x86R"
    weights = text("model") + b"}" + text("x") + tensor() + b"s"
    read, texts = read_pth(write(tmp_path / "a.pth", state(text("device"), device, weights)))
    assert list(read) == ["x"] and texts == {}
