"""The teacher's weights: official files in, ours out, nothing by accident."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fluxvit_jax.convert import teacher
from fluxvit_jax.convert.__main__ import main
from fluxvit_jax.errors import UserError
from tests.models import golden
from tests.models.test_internvideo2 import TINY, state

CONFIG = {"heads": 4, "pool_heads": 6, "frames": 4, "rows": 4, "columns": 4, "gelu": "erf"}
MANIFEST = golden.manifest("internvideo2/manifest")


def save(path, tensors):
    safetensors.numpy.save_file(tensors, path)
    return path


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as error:
        teacher.read(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("wrapper", [None, "model", "module"])
def test_a_file_of_stage_2(tmp_path, form, wrapper):
    """The vision encoder is found among all that the file holds, and is the golden tests'."""
    tensors = golden.arrays("internvideo2/teacher_state")
    path = tmp_path / form
    if form == "a.pth":
        torch = pytest.importorskip("torch", reason="makes the .pth file with PyTorch")
        weights = {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}
        torch.save({wrapper: weights} if wrapper else weights, path)
    else:
        save(path, tensors)
    found = teacher.read(path, CONFIG)
    assert found.state.keys() == state().keys()
    assert all((found.state[name] == x).all() for name, x in state().items())
    assert vars(found.config) == vars(TINY) | {"dtype": "bfloat16"}
    left_out = "\n".join(found.notes)
    assert "img_pos_embed is left out" in left_out and "clip_decoder.0.head.weight" in left_out
    assert "tensors outside vision_encoder are left out" in left_out
    assert len(found.notes) - 1 + len(state()) == sum("vision_encoder." in n for n in tensors)


def test_a_file_of_stage_1(tmp_path):
    extra = {"mae_pos_embed": np.zeros(3), "clip_decoder.0.norm.bias": np.zeros(3)}
    found = teacher.read(save(tmp_path / "a.safetensors", state() | extra), CONFIG)
    assert found.state.keys() == state().keys() and len(found.notes) == 2


def test_the_command(tmp_path, capsys):
    source = save(tmp_path / "a.safetensors", golden.arrays("internvideo2/teacher_state"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    command = ["--network=internvideo2", str(source), str(tmp_path / "folder")]
    assert main([*command, f"--config={config}"]) == 0
    assert "native grid of 4 frames x 56 x 56 px" in capsys.readouterr().out
    again = teacher.read(tmp_path / "folder")
    assert again.config.gelu == "erf" and again.config.heads == 4 and not again.notes
    options = ["--grid=8x56", "--dtype=bfloat16"]
    single = str(tmp_path / "b.safetensors")
    assert main([command[0], str(tmp_path / "folder"), single, *options]) == 0
    resized = teacher.read(single)
    assert (resized.config.frames, resized.config.rows) == (8, 4)
    assert {x.dtype for x in resized.state.values()} == {np.dtype(ml_dtypes.bfloat16)}
    official = golden.arrays("internvideo2/teacher_cases")["v1_8x56.pos_embed"]
    found = resized.state["pos_embed"].astype(np.float32)
    np.testing.assert_allclose(found, official, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classes=3"], "--classes: not for --network=internvideo2"),
        (["--workdir"], "--workdir: not for --network=internvideo2"),
        (["--allow-missing=pos_embed"], "--allow-missing: not for"),
        ([], "the weights do not tell heads, frames, rows, columns, pool_heads; name a config"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, options, words):
    source = save(tmp_path / "a.safetensors", state())
    target = tmp_path / "folder"
    assert main(["--network=internvideo2", str(source), str(target), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not target.exists()


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    assert "unexpected: stem" in refusal(save(path, state() | {"stem": np.zeros(2)}), CONFIG)
    teacher.read(path, CONFIG, allow_unexpected=["stem"])
    lacking = {name: x for name, x in state().items() if name != "blocks.2.norm1.weight"}
    assert "missing: blocks.2.norm1.weight" in refusal(save(path, lacking), CONFIG)
    wrong = state() | {"blocks.1.mlp.fc2.bias": np.zeros(50, np.float32)}
    assert "wrong shape: blocks.1.mlp.fc2.bias (50,)" in refusal(save(path, wrong), CONFIG)
    save(path, state())
    assert "depth is 6, not 7" in refusal(path, CONFIG | {"depth": 7})
    assert "64 places, not 8 x 4 x 4" in refusal(path, CONFIG | {"frames": 8})
    assert "does not divide into 5 heads" in refusal(path, CONFIG | {"heads": 5})
    assert "rows '4', no number" in refusal(path, CONFIG | {"rows": "4"})
    assert "gelu 'relu', none of" in refusal(path, CONFIG | {"gelu": "relu"})
    assert "unknown field 'head'" in refusal(path, CONFIG | {"head": 8})
    assert "it is a fluxvit" in refusal(path, CONFIG | {"model_type": "fluxvit"})
    assert "no such file" in refusal(tmp_path / "b.pth")
    fluxvit = save(tmp_path / "flux.safetensors", golden.arrays("tiny_state"))
    assert "not the weights of an InternVideo2" in refusal(fluxvit, CONFIG)
    with pytest.raises(UserError, match=r"written as \.safetensors or as a folder"):
        teacher.write(teacher.read(path, CONFIG), tmp_path / "c.pth")


@pytest.mark.parametrize(("stage", "frames"), [("stage1_checkpoint", 8), ("stage2_checkpoint", 4)])
def test_the_network_of_1b(monkeypatch, stage, frames):
    """By names and shapes alone: nothing is allocated."""
    shapes = MANIFEST["teacher_1B"]["shapes"] | {
        "pos_embed": MANIFEST[stage]["pos_embed_in_file"],
        "clip_pos_embed": [1, 1025, 1408],
    }
    full = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    if stage == "stage2_checkpoint":
        full = {f"vision_encoder.{name}": x for name, x in full.items()}
    monkeypatch.setattr(teacher.weight_files, "read_tensors", lambda source: (full, {}))
    config = teacher.read("1B.pth").config
    assert (config.width, config.depth, config.heads, config.hidden) == (1408, 40, 16, 6144)
    assert (config.frames, config.rows, config.columns) == (frames, 16, 16)
    assert (config.pool_width, config.pool_heads, config.gelu) == (768, 16, "tanh")
