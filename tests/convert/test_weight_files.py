"""Weights through every form: what goes in comes out, bit for bit, and nothing fits by accident."""

import io
import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import fluxvit_jax
from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.checkpoints.checkpointer import find_step
from fluxvit_jax.checkpoints.weights import read_weights, write_workdir
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.convert import adapt, config_json, official_names, teacher, weight_files
from fluxvit_jax.convert.__main__ import main
from fluxvit_jax.data import class_names
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import tasks
from fluxvit_jax.grids import Grid
from tests import tiny as tiny_recipe
from tests.convert.test_official_names import MANIFEST, assert_identical
from tests.models import golden

CONFIG = golden.UNTOLD | {"rounding": "official"}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TINY_PTH = golden.GOLDEN / "tiny_state.pth"


def tiny() -> dict[str, np.ndarray]:
    return dict(golden.arrays("tiny_state"))


def save(path, state, **metadata):
    safetensors.numpy.save_file(state, path, metadata=metadata or None)
    return path


def official(variant: str, dtype: str) -> dict[str, np.ndarray]:
    """All tensors of S or B, random, under the official names."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.random(shape, np.float32) - 0.5).astype(DTYPES[dtype])
        for name, shape in MANIFEST[f"fluxvit_{variant}_patch14"]["keys"].items()
    }


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as error:
        read_weights(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Every form


@pytest.mark.parametrize("form", ["a.pth", "a.safetensors", "folder"])
@pytest.mark.parametrize("wrapper", [None, "model", "module"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder.", "vision_encoder.", "module."])
def test_the_golden_weights_through_every_door(tmp_path, form, wrapper, prefix):
    """The parameters are those of the golden tests, to the bit, so all golden numbers hold."""
    torch = pytest.importorskip("torch", reason="makes the .pth file with PyTorch")
    state = {prefix + name: torch.from_numpy(array) for name, array in tiny().items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "source.pth")
    weight_files.write(read_weights(tmp_path / "source.pth", CONFIG), tmp_path / form)
    model = fluxvit_jax.from_pretrained(tmp_path / form)  # the form says what its network is
    assert_identical(
        official_names.to_official({k: v for k, v in _numpy(model.params).items()}), tiny()
    )
    assert model.config.model.gelu == "erf" and model.config.model.rounding == "official"


def _numpy(tree):
    return {k: _numpy(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items()}


@pytest.mark.parametrize(
    ("variant", "dtype"), [("small", "float32"), ("small", "float16"), ("base", "bfloat16")]
)
def test_full_models_come_out_as_they_went_in(tmp_path, variant, dtype):
    """From PyTorch's .pth to a folder to .safetensors to .pth; PyTorch reads the last strictly."""
    torch = pytest.importorskip("torch", reason="makes the .pth file with PyTorch")
    state = official(variant, dtype)
    assert len(state) == 246

    def tensor(array):
        bits = torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.int32))
        return bits.view(getattr(torch, dtype))

    source = tmp_path / "official.pth"
    torch.save({"model": {k: tensor(v) for k, v in state.items()}}, source)
    forms = ("folder", "a.safetensors", "out.pth")
    for form in forms:
        assert main([str(source), str(tmp_path / form)]) == 0
        source = tmp_path / form
    for form in forms:
        read = read_weights(tmp_path / form)
        assert_identical(read.state, state)
        assert read.config.model.heads == {"small": 6, "base": 12}[variant]
    from fluxvit_jax.convert.torch_fluxvit import FluxViT

    assert len(FluxViT.from_folder(tmp_path / "folder").state_dict()) == 246  # loaded strictly
    back = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    for name, array in state.items():
        bits = back[name].contiguous().view(torch.uint8).numpy()
        assert back[name].dtype == getattr(torch, dtype) and bits.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_a_workdir(tmp_path, dtype):
    state = official("small", dtype)
    source = save(tmp_path / "s.safetensors", state)
    assert main([str(source), str(tmp_path / "run"), "--workdir"]) == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    assert_identical(read_weights(tmp_path / "out.safetensors").state, state)
    with pytest.raises(UserError, match="has checkpoints already"):
        write_workdir(read_weights(source), tmp_path / "run")


def test_a_workdir_that_was_trained(finished, tmp_path):
    assert main([str(finished.workdir), str(tmp_path / "folder")]) == 0
    read = read_weights(tmp_path / "folder")
    params = official_names.from_official(read.state, read.config.model.heads)
    trained = checkpointer.restore_params(finished.workdir)
    assert_identical(official_names.to_official(params), official_names.to_official(trained))
    recipe = from_dict(checkpointer.restore(finished.workdir).config)
    expected = config_json.to_json(config_json.from_run_config(recipe))
    assert config_json.to_json(read.config) == expected
    assert read.config.head_budgets == (24, 12)
    assert read.config.settings == ((24, 6, 42), (12, 4, 28))


def test_a_converted_workdir_is_evaluated_as_the_first(finished, tiny_data, tmp_path):
    """To a folder and back to a workdir: the same answers to all videos."""
    config = tiny_recipe.make_config(tiny_data)
    assert main([str(finished.workdir), str(tmp_path / "folder")]) == 0
    assert main([str(tmp_path / "folder"), str(tmp_path / "run"), "--workdir"]) == 0
    for workdir in (finished.workdir, tmp_path / "run"):
        assert tasks.run(config, workdir) == 0
    first, second = (
        tiny_recipe.read_evaluation(workdir)[1] for workdir in (finished.workdir, tmp_path / "run")
    )
    assert first == second and len(first) == 13


def test_what_a_folder_says(tmp_path):
    config = CONFIG | {
        "head_budgets": [64, 16],
        "id2label": {str(i): f"class {i}" for i in range(10)},
    }
    weight_files.write(read_weights(TINY_PTH, config), tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        "torch_fluxvit.py",
    ]
    assert len({path.stat().st_mode for path in (tmp_path / "folder").iterdir()}) == 1
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert written["model_type"] == "fluxvit" and written["width"] == 48 and written["depth"] == 3
    read = read_weights(tmp_path / "folder").config
    assert read.class_names == tuple(f"class {i}" for i in range(10))
    assert read.head_budgets == (64, 16)
    assert read.settings == ((64, 8, 56), (16, 8, 56))  # the native grid, where no recipe is known
    with safetensors.safe_open(tmp_path / "folder" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"  # other loaders ask for it


# --- Nothing fits by accident


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    state = tiny()
    del state["head.1.bias"]
    state["text_encoder.proj"] = np.zeros(3, np.float32)
    state["fc_norm.bias"] = np.zeros(65, np.float32)
    message = refusal(save(tmp_path / "a.safetensors", state), CONFIG)
    assert "missing: head.1.bias" in message
    assert "unexpected: text_encoder.proj" in message
    assert "wrong shape: fc_norm.bias (65,) instead of (64,)" in message


def test_exceptions_are_explicit_and_said(tmp_path, capsys):
    state = {name: array for name, array in tiny().items() if not name.startswith("head.")}
    state["text_encoder.proj"] = np.zeros(3, np.float32)
    source = save(tmp_path / "a.safetensors", state)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"classes": 5}))
    command = [str(source), str(tmp_path / "out"), "--config", str(tmp_path / "config.json")]
    assert main([*command, "--allow-missing=head"]) == 2
    assert "unexpected: text_encoder.proj" in capsys.readouterr().err
    assert main([*command, "--allow-unexpected=text_encoder"]) == 2
    assert "missing: head.0.weight" in capsys.readouterr().err
    assert main([*command, "--allow-missing=head", "--allow-unexpected=text_encoder"]) == 0
    said = capsys.readouterr().out
    assert "head.2.bias is missing and starts afresh" in said
    assert "text_encoder.proj is left out" in said
    read = read_weights(tmp_path / "out")
    assert read.state["head.0.weight"].shape == (5, 64) and read.state["head.0.weight"].std() > 0
    assert "missing" in refusal(
        source, CONFIG, allow_missing=["hea"], allow_unexpected=["text_encoder"]
    )


def test_one_tensor_under_two_prefixes_is_refused(tmp_path):
    state = tiny() | {"backbone.cls_token": np.zeros((1, 1, 48), np.float32)}
    assert "cls_token is there twice" in refusal(save(tmp_path / "a.safetensors", state), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "does not divide into 5 heads"),
        ({"width": 64}, "width is 48, not 64"),
        ({"depth": 2}, "depth is 3, not 2"),
        ({"rows": 5}, "position table has 128 places, not the 8 x 5 x 4"),
        ({"gelu": "relu"}, "gelu 'relu', none of tanh, erf"),
        ({"frames": "8"}, "frames '8'"),
        ({"hedas": 3}, "unknown field 'hedas'"),
        ({"model_type": "vit"}, "a vit, not a fluxvit"),
        ({"head_budgets": [16, 32]}, "largest first"),
        ({"head_budgets": [64, 32, 16, 8]}, "3 heads, fewer than the head_budgets [64, 32, 16, 8]"),
        ({"id2label": {"0": "a"}}, "does not name the 10 classes"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message):
    assert message in refusal(TINY_PTH, CONFIG | change)


def test_what_bare_weights_do_not_tell_is_asked_for():
    message = refusal(TINY_PTH)
    assert "do not tell heads, frames, rows, columns, pool_heads" in message
    assert "--config=FILE" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "no such file"),
        ("broken.safetensors", b"\x08\0\0\0\0\0\0\0nothing!", "cannot be read as .safetensors"),
        ("cut.safetensors", b"\xff\xff", "cannot be read as .safetensors"),
        ("weights.ckpt", b"", "is neither"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def test_folders_that_cannot_be_read(tmp_path):
    assert "no checkpoint" in refusal(tmp_path)
    weight_files.write(read_weights(TINY_PTH, CONFIG), tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path / "folder")
    deep = "[" * 100_000
    (tmp_path / "folder" / "config.json").write_text(deep)
    assert "cannot be read as JSON" in refusal(tmp_path / "folder")
    save(tmp_path / "deep.safetensors", tiny(), fluxvit_jax=deep)
    assert "the config it carries is damaged" in refusal(tmp_path / "deep.safetensors")
    (tmp_path / "folder" / "config.json").write_text("[]")
    assert "no object" in refusal(tmp_path / "folder")


def test_a_model_card_says_what_was_measured(finished, tmp_path):
    """Of the best step alone, and nothing of weights that were changed since."""
    best = find_step(finished.workdir).name
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "evaluation", ignore_errors=True)
    (workdir / "evaluation").mkdir()
    for step, top1 in ((best, 0.625), ("999", 0.125)):
        budgets = {"24": {"frames": 6, "resolution": 42, "top1": top1, "top5": 1.0}}
        report = {
            **{"checkpoint": f"checkpoints/{step}", "data": "/home/lists/val.csv", "views": "2x1"},
            **{"dataset": {"videos": 13}, "failures": [{}], "budgets": budgets},
        }
        (workdir / "evaluation" / f"{step}.json").write_text(json.dumps(report))
    fluxvit_jax.from_pretrained(workdir).save_pretrained(tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    row = "| 13 of val.csv, 1 unreadable | 2x1 | 24 | 6 | 42 px | 62.50% | 100.00% |"
    assert row in card.splitlines() and "12.50%" not in card and "/home" not in card
    for line in ("# FluxViT-Ti", "| Heads trained at | 24, 12 tokens |", "| 12 | 4 | 28 px |"):
        assert line in card.splitlines()
    assert "| Classes | 4, names not known |" in card
    changed = {"gelu": "erf", "id2label": dict(zip("0123", "abcd", strict=True))}
    weight_files.write(read_weights(workdir, changed), tmp_path / "changed")
    card = (tmp_path / "changed" / "README.md").read_text()
    assert "Not measured by this program." in card and "| Classes | 4: a, b, c, d |" in card
    assert adapt.cut_classes(read_weights(workdir), 3).evaluations == ()


# --- Made to fit


def test_a_710_class_head_is_cut_to_its_first_400(tmp_path):
    state = official("small", "float32")
    rng = np.random.default_rng(1)
    for i in range(3):
        state[f"head.{i}.weight"] = rng.random((710, 768), np.float32)
        state[f"head.{i}.bias"] = rng.random(710, np.float32)
    source = save(tmp_path / "k710.safetensors", state)
    assert main([str(source), str(tmp_path / "k400.safetensors"), "--classes=400"]) == 0
    read = read_weights(tmp_path / "k400.safetensors")
    assert read.config.model.classes == 400
    expected = {k: v[:400] if k.startswith("head.") else v for k, v in state.items()}
    assert_identical(read.state, expected)
    assert main([str(source), str(tmp_path / "more"), "--classes=711"]) == 2


@pytest.fixture(scope="module")
def k710(tmp_path_factory):
    """A bare official file of S with 710 classes, each with a bias of its label."""
    state = official("small", "float32")
    for i in range(3):
        state[f"head.{i}.weight"] = np.zeros((710, 768), np.float32)
        state[f"head.{i}.bias"] = np.arange(710, dtype=np.float32)
    return save(tmp_path_factory.mktemp("k710") / "k710.safetensors", state)


@pytest.mark.parametrize("part", class_names.PARTS_OF_K710)
def test_a_710_class_head_is_cut_by_the_official_table(k710, part):
    cut = adapt.cut_k710(read_weights(k710), part)
    assert cut.config.model.classes == len(cut.config.class_names)
    assert cut.config.class_names == class_names.of_dataset(part)
    for i in range(3):
        assert tuple(cut.state[f"head.{i}.bias"]) == class_names.labels_in_k710(part)
        assert cut.state[f"head.{i}.weight"].shape == (len(cut.config.class_names), 768)


def test_only_kinetics_710_is_cut_to_its_parts(k710):
    named = read_weights(k710, {"id2label": {str(i): f"own {i}" for i in range(710)}})
    with pytest.raises(UserError, match="have 710 classes of other names, and are not of Kine"):
        adapt.cut_k710(named, "k600")
    with pytest.raises(UserError, match=r"have 10 classes, and are not of Kinetics-710"):
        adapt.cut_k710(read_weights(TINY_PTH, CONFIG), "k600")
    with pytest.raises(UserError, match=r"not the first 600 classes .* --classes=k600"):
        adapt.cut_classes(read_weights(k710), 600)
    assert adapt.cut_classes(named, 600).config.class_names[-1] == "own 599"


def test_names_of_a_bare_official_file_are_assumed_and_said(tmp_path, capsys):
    """400 classes of a released size; a folder that is made of it has the names."""
    bare = save(tmp_path / "official.safetensors", official("small", "bfloat16"))
    read = read_weights(bare)
    assert read.config.class_names[0] == "abseiling" and read.config.assumed_names == "k400"
    assert main([str(bare), str(tmp_path / "folder")]) == 0
    assert capsys.readouterr().err == (
        f"{bare}: names no classes; as official weights its 400 are taken for those of "
        "Kinetics-400; --class-names=FILE names others\n"
    )
    folder = read_weights(tmp_path / "folder")
    assert folder.config.class_names == read.config.class_names
    assert not folder.config.assumed_names
    # Names that are stated, if only that there are none, are not asked about.
    (tmp_path / "own.txt").write_text("".join(f"own {i}\n" for i in range(400)))
    own = tmp_path / "own.safetensors"
    assert main([str(bare), str(own), f"--class-names={tmp_path / 'own.txt'}"]) == 0
    assert read_weights(own).config.class_names[:2] == ("own 0", "own 1")
    unnamed = read_weights(bare, {"id2label": {}})
    assert unnamed.config.class_names == ()
    weight_files.write(unnamed, tmp_path / "unnamed.safetensors")
    assert read_weights(tmp_path / "unnamed.safetensors").config.class_names == ()
    assert capsys.readouterr().err == ""


def test_names_are_assumed_of_official_sizes_and_numbers_alone():
    model = read_weights(TINY_PTH, CONFIG).config.model
    small = VARIANTS["S"]
    for width, depth, classes, expected in (
        (small.width, small.depth, 400, "k400"),
        (small.width, small.depth, 710, "k710"),
        (small.width, small.depth, 401, ""),
        (64, 2, 400, ""),
    ):
        config = config_json.PretrainedConfig(
            replace(model, width=width, depth=depth, classes=classes)
        )
        assert config_json.assume_names(config).assumed_names == expected


def test_another_native_grid_resizes_positions_as_pytorch_does():
    torch = pytest.importorskip("torch", reason="compares with PyTorch's interpolate")
    pretrained = read_weights(TINY_PTH, CONFIG)
    resized = adapt.resize_grid(pretrained, Grid(12, 6, 5))
    table = torch.from_numpy(tiny()["pos_embed"][:, 1:]).reshape(8, 4, 4, 48)
    space = torch.nn.functional.interpolate(
        table.permute(0, 3, 1, 2), (6, 5), mode="bicubic", align_corners=False
    )
    time = torch.nn.functional.interpolate(
        space.permute(2, 3, 1, 0).reshape(30, 48, 8), 12, mode="linear", align_corners=False
    )
    expected = time.reshape(6, 5, 48, 12).permute(3, 0, 1, 2).reshape(1, 360, 48)
    np.testing.assert_allclose(resized.state["pos_embed"][:, 1:], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(resized.state["pos_embed"][:, :1], tiny()["pos_embed"][:, :1])
    assert resized.config.model.rows == 6 and resized.config.model.columns == 5


# --- The command


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    there = save(tmp_path / "a.safetensors", tiny())
    for arguments, message in [
        ([str(there)], "TARGET"),
        ([str(tmp_path / "none.pth"), "b"], "no such file or folder"),
        ([str(there), str(there), "--overwrite"], "are the same"),
        ([str(there), str(tmp_path)], "is there already; add --overwrite"),
        ([str(there), "gs://bucket/b"], "are written on this machine"),
        ([str(there), str(tmp_path / "b"), "--grid=16x225"], "multiples of 14"),
        ([str(there), str(tmp_path / "b"), "--dtype=int8"], "invalid choice"),
        ([str(there), str(tmp_path / "b"), "--config=none.json"], "cannot be read as JSON"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_files_are_utf_8_in_any_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    labels = {str(i): f"é{i}" for i in range(10)}
    config = tmp_path / "given.json"
    config.write_bytes(json.dumps(CONFIG | {"id2label": labels}, ensure_ascii=False).encode())
    weight_files.write(
        read_weights(TINY_PTH, weight_files.read_config(config)), tmp_path / "folder"
    )
    assert "é0, é1" in (tmp_path / "folder" / "README.md").read_bytes().decode()


def test_a_workdir_is_no_folder_for_weights(tmp_path):
    """Its config.json is the run's, which could not go on with the network's in its place."""
    pretrained = read_weights(TINY_PTH, CONFIG)
    before = tmp_path / "config.json"
    before.write_text("of the run")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is the workdir of a run"):
        weight_files.write(pretrained, tmp_path)
    assert before.read_text() == "of the run" and len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    pretrained = read_weights(TINY_PTH, CONFIG)
    target = tmp_path / "a.safetensors"
    weight_files.write(pretrained, target)
    before = target.read_bytes()

    def full_disk(_, path, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        weight_files.write(pretrained, target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "change",
    [{"tokens": 0}, {"frames": 0}, {"resolution": 0}, {"resolution": 60}, {"resolution": -14}],
)
def test_settings_that_cannot_be_are_refused(tmp_path, change):
    folder = tmp_path / "folder"
    weight_files.write(read_weights(TINY_PTH, CONFIG | {"head_budgets": [16]}), folder)
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text())
    content["settings"] = [content["settings"][0] | change]
    path.write_text(json.dumps(content))
    assert "folder: preprocessor_config.json says " in refusal(folder)
    for bad in ({"tokens": "16"}, {"frames": 8.5}, {"frames": float("inf")}):
        content["settings"] = [{"tokens": 16, "frames": 8, "resolution": 56} | bad]
        path.write_text(json.dumps(content))
        assert "a setting in preprocessor_config.json is not" in refusal(folder)


@pytest.mark.parametrize(
    "embedded", ["[]", "null", '{"config": []}', '{"config": null}', '{"preprocessor": [1]}']
)
def test_a_config_in_a_file_that_is_no_object_is_refused(tmp_path, embedded):
    path = save(tmp_path / "a.safetensors", tiny(), fluxvit_jax=embedded)
    assert f"{path}: the config it carries is damaged" in refusal(path, CONFIG)


def test_a_small_file_with_a_large_number_is_refused_at_once(tmp_path):
    """Of a name with a number N, not N blocks are listed."""
    name = "blocks.100000000.norm1.weight"
    path = save(tmp_path / "a.safetensors", {name: np.zeros(0, np.float32)})
    assert f"unexpected: {name}" in refusal(path, CONFIG)
    with pytest.raises(UserError, match=f"unexpected: {name}"):
        teacher.read(path)
