"""Flux-CLIP from Python: vectors of videos and texts, classes by names, and folders of it."""

import json
import os
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from scipy.special import softmax

import fluxvit_jax
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.convert import __main__ as convert
from fluxvit_jax.convert import clip_parts, weight_files
from fluxvit_jax.convert.model_card import model_card
from fluxvit_jax.data.sources import Example, FileSource
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import vectors, zero_shot
from fluxvit_jax.evaluation.settings import settings_of
from fluxvit_jax.objectives import flux_clip_weights
from fluxvit_jax.objectives.flux_clip import FluxCLIP
from tests import tiny

TEXTS = ["A red thing!", "The green, number 1", "", "blue"]
CLASSES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def config(tiny_data, tmp_path_factory):
    captions = tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))
    return tiny.make_clip(captions, tiny_data)


@pytest.fixture(scope="module")
def run(config, compiled, tmp_path_factory) -> Path:
    return tiny.write_clip_run(tmp_path_factory.mktemp("clip") / "run", config)


@pytest.fixture(scope="module")
def model(run):
    return fluxvit_jax.from_pretrained(run)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("saved") / "folder"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "folder"))


def videos(data: Path) -> list[str]:
    return [str(data / f"{number}.mp4") for number in range(3)]


def test_vectors_are_those_of_the_evaluation(model, run, config, tiny_data):
    weights, mesh = flux_clip_weights.read(run), make_mesh(config)
    config = config.copy_and_resolve_references()
    config.eval.clips = 1
    source = FileSource([Example(Path(path).name, 0, path) for path in videos(tiny_data)])
    found = vectors.of_videos(weights.params, config, source, settings_of(config), mesh)
    for (tokens, *_), expected in zip(config.eval.settings, found.by_setting, strict=True):
        own = model.encode_video(videos(tiny_data), tokens=tokens)
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, expected, atol=1e-5)
    expected = vectors.of_texts(
        weights.params, config, ["a red thing", "the green number 1", "", "blue"], mesh
    )
    np.testing.assert_allclose(model.encode_text(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(model.encode_text(TEXTS), axis=1), 1, atol=1e-5)


def test_one_and_several_videos_and_texts(model, tiny_data):
    paths = videos(tiny_data)
    together = model.encode_video(paths, tokens=12)
    assert together.shape == (3, 64)
    np.testing.assert_array_equal(model.encode_video(Path(paths[1]), tokens=12), together[1:2])
    frames = [fluxvit_jax.read_video(path, 4)[:, :42, :42] for path in paths]
    clips = model.encode_video(np.stack(frames), tokens=12)
    for clip, own in zip(frames, clips, strict=True):
        np.testing.assert_allclose(model.encode_video(clip, tokens=12)[0], own, atol=1e-5)
    assert model.encode_video([]).shape == model.encode_text([]).shape == (0, 64)
    many = [f"text {number}" for number in range(67)]  # of more than one part
    found = model.encode_text(many)
    for number in (0, 63, 64, 66):
        np.testing.assert_allclose(model.encode_text(many[number])[0], found[number], atol=1e-5)


def test_long_texts_are_cut_with_a_warning(model):
    long = "word " * 100
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 77 tokens.*'word word"):
        cut = model.encode_text(["short", long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(model.encode_text("word " * 75)[0], cut[1], atol=1e-6)


def test_classes_by_their_names(model, tiny_data):
    path = videos(tiny_data)[0]
    prompts = ["{}", "a video of {}"]
    found = model.classify(path, CLASSES, tokens=12, top=2, prompts=prompts)
    texts = model.encode_text([p.format(name) for name in CLASSES for p in prompts])
    cosines = (model.encode_video(path, tokens=12) @ texts.T).reshape(3, 2).mean(axis=1)
    expected = softmax(cosines / model.temperature)
    assert model.temperature == pytest.approx(0.1)
    order = np.argsort(-expected)[:2]
    assert [own.name for own in found] == [CLASSES[number] for number in order]
    np.testing.assert_allclose([own.probability for own in found], expected[order], rtol=1e-4)
    several = model.classify([path, path], CLASSES, tokens=12)
    assert [len(one) for one in several] == [3, 3]
    official = model.encode_text(zero_shot.texts_of_classes(CLASSES))
    means = official.reshape(3, 16, -1).mean(axis=1) @ model.encode_video(path, tokens=12)[0]
    best = CLASSES[int(np.argmax(means))]
    assert several[0][0].name == best


@pytest.mark.parametrize(
    ("names", "prompts", "message"),
    [
        ("red", None, "'red': names of classes are a list"),
        ([], None, "no names of classes"),
        (["red", "Red!"], None, "'red' is named twice"),
        (["red", "?"], None, "'\\?' is no name of a class"),
        (["red", "caf\udce9"], None, r"caf\\udce9': is not UTF-8"),
        (["red"], ["a video"], "'a video': a prompt has {} once"),
        (["red"], [], "no prompts given"),
    ],
)
def test_names_and_prompts_that_cannot_be(model, tiny_data, names, prompts, message):
    with pytest.raises(UserError, match=message):
        model.classify(videos(tiny_data)[0], names, prompts=prompts)


def test_weights_without_a_text_encoder_say_so(saved, tiny_data):
    model = fluxvit_jax.from_pretrained(saved / "model.safetensors", read_json(saved))
    for ask in (
        lambda: model.encode_video(videos(tiny_data)[0]),
        lambda: model.encode_text("a"),
        lambda: model.classify(videos(tiny_data)[0], CLASSES),
        lambda: model.temperature,
    ):
        with pytest.raises(UserError, match=r"have no text encoder.*Flux-CLIP") as error:
            ask()
        assert "\n" not in str(error.value)


def read_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_there_is_nothing_to_predict(model, tiny_data):
    with pytest.raises(UserError, match=r"no classes of their own.*classify"):
        model.predict(videos(tiny_data)[0])


# ---------------------------------------------------------------------------------------------
# Folders


def test_a_folder_holds_it_all(model, saved, tiny_data):
    assert {path.name for path in saved.iterdir()} == {
        *("model.safetensors", "clip.safetensors", "config.json", "preprocessor_config.json"),
        *("README.md", "torch_fluxvit.py", "bpe_simple_vocab_16e6.txt.gz"),
    }
    sizes = {"width": 64, "depth": 2, "heads": 2, "hidden": 128, "out": 64}
    assert read_json(saved)["text_encoder"] == sizes
    tensors = safetensors.numpy.load_file(saved / "clip.safetensors")
    assert {"temp", "vision_align.0.weight", "vision_align.1.bias"} < tensors.keys()
    assert "text_encoder.transformer.1.pre_norm_mha.1.qkv_proj.weight" in tensors
    again = fluxvit_jax.from_pretrained(saved)
    path = videos(tiny_data)[0]
    np.testing.assert_array_equal(again.encode_video(path, 12), model.encode_video(path, 12))
    np.testing.assert_array_equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert again.temperature == model.temperature
    assert "encode_text" in (saved / "README.md").read_text()
    assert "with a text encoder" in repr(again)


def test_the_converter_writes_the_same_folder(run, saved, tmp_path, capsys):
    assert not convert.main([str(run), str(tmp_path / "folder")])
    assert "with the head and the text encoder" in capsys.readouterr().out
    assert not convert.main([str(saved), str(tmp_path / "again")])
    for folder in (tmp_path / "folder", tmp_path / "again"):
        for name in (
            "config.json",
            "README.md",
            "torch_fluxvit.py",
            "bpe_simple_vocab_16e6.txt.gz",
        ):
            assert (folder / name).read_bytes() == (saved / name).read_bytes()
        tensors = safetensors.numpy.load_file(folder / "clip.safetensors")
        expected = safetensors.numpy.load_file(saved / "clip.safetensors")
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(tensors[name], tensor)
        assert fluxvit_jax.from_pretrained(folder).space
    assert not convert.main([str(saved), str(tmp_path / "alone.safetensors")])
    assert "the network alone" in capsys.readouterr().out


def test_other_weights_take_the_place_of_the_parts(folder):
    """A folder that is overwritten by weights without texts keeps nothing of those before."""
    weight_files.write(read_weights(folder), folder)
    assert fluxvit_jax.from_pretrained(folder).space is None


def test_a_folder_trains_on_and_is_evaluated(saved, run, config):
    """`train.init_from` takes head, temperature and text encoder; `read` finds the whole run."""
    from_run, from_folder = (
        FluxCLIP.load_initial(tiny.make_clip("", "", train__init_from=str(source)))
        for source in (run, saved)
    )
    weights = flux_clip_weights.read(run).params
    for found in (from_run, from_folder):
        assert found.keys() == {"clip_head", "temperature", "text_encoder"}
        for name in found:
            np.testing.assert_array_equal(leaves(found[name]), leaves(weights[name]))
    read = flux_clip_weights.read(saved)
    np.testing.assert_array_equal(leaves(read.params), leaves(weights))
    assert read.config.train.objective == "flux_clip" and read.config.clip.network == "Ti"
    assert read.config.train.budgets == config.train.budgets
    assert read.config.eval.settings == config.eval.settings


def leaves(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_a_frozen_text_encoder(saved, model, tmp_path, tiny_data, capsys):
    """It is read from its own file, wherever that is now, and must be the right one."""
    file, elsewhere = tmp_path / "text.safetensors", tmp_path / "elsewhere.safetensors"
    shutil.copy(saved / "clip.safetensors", file)
    own = {"clip__train_text": False, "clip__text_encoder": str(file)}
    run = tiny.write_clip_run(tmp_path / "run", tiny.make_clip("", "", **own))
    frozen = fluxvit_jax.from_pretrained(run)
    np.testing.assert_array_equal(frozen.encode_text(TEXTS), model.encode_text(TEXTS))
    file.rename(elsewhere)
    with pytest.raises(UserError, match=r"no such file.*text_encoder= of from_pretrained") as error:
        fluxvit_jax.from_pretrained(run)
    assert "\n" not in str(error.value)
    again = fluxvit_jax.from_pretrained(run, text_encoder=elsewhere)
    np.testing.assert_array_equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    assert not convert.main([str(run), str(tmp_path / "folder"), f"--text-encoder={elsewhere}"])
    assert fluxvit_jax.from_pretrained(tmp_path / "folder").space
    state, texts = weight_files.read_safetensors(elsewhere)
    state["text_encoder.final_layer_norm.bias"] += 1
    safetensors.numpy.save_file(state, file, metadata=texts)
    with pytest.raises(UserError, match=r"is not the text encoder that .* was trained with"):
        fluxvit_jax.from_pretrained(run)


def test_retrieval_is_in_the_card(saved):
    recall = {"recall": {"1": 0.25, "5": 0.5, "10": 1.0}}
    row = {"frames": 4, "resolution": 28}
    row["plain"] = {"text_to_video": recall, "video_to_text": recall}
    report = {"task": "retrieval", "videos": 8, "texts": 16, "dataset": "d", "budgets": {"12": row}}
    other = {"task": "multiple_choice", "budgets": {}}
    found = read_weights(saved)
    card = model_card(found.state, found.config, [report, other])
    assert "| 8 videos and 16 texts of d | 12 | 4 | 28 px | 25.0% | 50.0% | 100.0% |" in card


# ---------------------------------------------------------------------------------------------
# Folders that are damaged


def change(folder: Path, *, drop: str = "", **tensors) -> None:
    """Changes tensors of clip.safetensors; "." is written "__" in a name."""
    path = folder / "clip.safetensors"
    state, texts = weight_files.read_safetensors(path)
    state.pop(drop, None)
    state |= {
        name.replace("__", "."): np.array(value, np.float32) for name, value in tensors.items()
    }
    safetensors.numpy.save_file(state, path, metadata=texts)


def write_entry(folder: Path, **changes) -> None:
    content = read_json(folder)
    content["text_encoder"] |= changes
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "clip.safetensors").unlink(), "clip.safetensors is missing, though"),
        (lambda f: (f / "clip.safetensors").write_bytes(b"x" * 99), "cannot be read as .safetens"),
        (lambda f: change(f, drop="temp"), "missing: temp$"),
        (lambda f: change(f, temp=0), "no number above 0: temp"),
        (lambda f: change(f, other=[1]), "unexpected: other"),
        (lambda f: change(f, text_encoder__x=[1]), "a CLIP text encoder; unexpected: x"),
        (lambda f: change(f, drop="vision_align.1.bias"), "head; missing: vision_align.1.bias"),
        (
            lambda f: change(f, vision_align__1__bias=[1]),
            r"shape: vision_align.1.bias \(1,\)",
        ),
        (
            lambda f: change(f, text_encoder__projection_layer=np.zeros((64, 32))),
            "out is 32, not 64",
        ),
        (lambda f: write_entry(f, width=128), "contradicts the text encoder: width is 64, not 128"),
        (lambda f: write_entry(f, heads=3), "width 64 does not divide into 3 attention heads"),
        (lambda f: write_entry(f, heads="2"), "\"text_encoder\" heads '2'"),
        (lambda f: write_entry(f, more=1), 'needs "text_encoder" with width, depth'),
        (lambda f: (f / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b""), "is another vocabulary"),
        (lambda f: (f / "bpe_simple_vocab_16e6.txt.gz").unlink(), "bpe.*cannot be read"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        clip_parts.read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_folder_mixed_from_two_models_is_refused(folder, config, tmp_path):
    other = fluxvit_jax.from_pretrained(tiny.write_clip_run(tmp_path / "run", config, seed=1))
    other.save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other/model.safetensors", folder / "model.safetensors")
    with pytest.raises(UserError, match=r"another model.safetensors than the one beside it"):
        fluxvit_jax.from_pretrained(folder)


def test_a_head_of_another_width_is_refused(folder):
    change(
        folder,
        text_encoder__projection_layer=np.zeros((64, 32)),
    )
    write_entry(folder, out=32)
    with pytest.raises(UserError, match=r"vision_align maps width 64 to 64, not 64 .* to 32 of"):
        clip_parts.read(folder)


# ---------------------------------------------------------------------------------------------
# PyTorch


def test_pytorch_gives_the_same_vectors(model, saved, folder, tiny_data):
    torch = pytest.importorskip("torch", reason="needs PyTorch, which the package does not")
    from fluxvit_jax.convert.torch_fluxvit import FluxViT

    network = FluxViT.from_folder(saved)
    frames = fluxvit_jax.read_video(videos(tiny_data)[1], 6)[:, :42, :42]
    for tokens in (24, 12, None):
        with torch.no_grad():
            found = network.encode_video(torch.from_numpy(frames), tokens=tokens).numpy()
        np.testing.assert_allclose(found, model.encode_video(frames, tokens), atol=2e-5)
    change(folder, temp=0.5)  # rewritten with its metadata: still the right one
    FluxViT.from_folder(folder)
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    state["cls_token"] = state["cls_token"] + 1
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="belongs to another model"):
        FluxViT.from_folder(folder)
    (folder / "clip.safetensors").unlink()
    alone = read_json(folder)
    del alone["text_encoder"]
    (folder / "config.json").write_text(json.dumps(alone))
    with pytest.raises(ValueError, match="no text encoder"):
        FluxViT.from_folder(folder).encode_video(torch.from_numpy(frames))
