"""Whole runs of Flux-CLIP: resumed, with a frozen text encoder, evaluated, and on bad input."""

import json
import shutil

import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from fluxvit_jax.checkpoints.checkpointer import find_step, restore, restore_params
from fluxvit_jax.config.variants import TEXT_ENCODERS
from fluxvit_jax.convert.official_names import to_official
from fluxvit_jax.convert.text_encoder_names import PREFIX, TEXT_ENCODER
from fluxvit_jax.data.annotations import read_class_names
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import tasks
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from fluxvit_jax.objectives import flux_clip_weights
from fluxvit_jax.objectives.flux_clip import HEAD, TEMPERATURE, TEXT
from fluxvit_jax.token_optimization import latency, search
from fluxvit_jax.training import train
from tests import tiny


@pytest.fixture(scope="module")
def captions(tiny_data, tmp_path_factory):
    return tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def trained(tiny_data, captions, compiled, tmp_path_factory):
    """A finished run. Read only."""
    workdir = tmp_path_factory.mktemp("clip") / "run"
    config = tiny.make_clip(captions, tiny_data, train__epochs=10)
    assert train.train(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A file of a text encoder under MobileCLIP's names, beside other tensors."""
    return write_text_encoder(tmp_path_factory.mktemp("text") / "mobileclip.safetensors", seed=0)


def write_text_encoder(path, seed: int):
    network = TextEncoderConfig(**TEXT_ENCODERS["Ti"]._asdict())
    params = fluxvit.split(TextEncoder(network, nnx.Rngs(seed)))[1]
    state = to_official(jax.tree.map(np.asarray, params), TEXT_ENCODER)
    named = {f"{PREFIX}{name}": x for name, x in state.items()}
    safetensors.numpy.save_file(named | {"logit_scale": np.zeros(())}, path)
    return path


def lines(workdir, split: str = "train") -> list[dict]:
    return [line for line in tiny.read_lines(workdir / "metrics.jsonl") if line["split"] == split]


def test_a_run_learns(trained):
    found = lines(trained)
    assert len(found) == 20
    losses = [line["contrastive_24"] for line in found]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert all(line["temperature"] >= 0.01 for line in found)
    params = restore_params(trained)
    assert {HEAD, TEMPERATURE, TEXT} <= params.keys()


def unfinished(trained, folder):
    """A copy of the run, two steps before its end."""
    workdir = shutil.copytree(trained, folder)
    shutil.rmtree(workdir / "checkpoints" / "20")
    return workdir


def test_it_is_resumed_bit_for_bit(trained, tiny_data, captions, tmp_path):
    workdir = unfinished(trained, tmp_path / "run")
    assert train.train(tiny.make_clip(captions, tiny_data, train__epochs=10), workdir) == 0
    same = [(w / "metrics.jsonl").read_bytes() for w in (workdir, trained)]
    assert same[0] == same[1]
    params = [jax.tree.leaves(restore_params(w)) for w in (workdir, trained)]
    assert all(np.array_equal(*pair) for pair in zip(*params, strict=True))


def test_other_captions_are_other_data(trained, tiny_data, captions, tmp_path):
    entries = json.loads(captions.read_text())
    entries[3]["caption"][0] = "something else"
    (tmp_path / "other.json").write_text(json.dumps(entries))
    config = tiny.make_clip(tmp_path / "other.json", tiny_data, train__epochs=12)
    with pytest.raises(UserError, match="begun with other data: other captions for the same vid"):
        train.train(config, trained)


@pytest.mark.slow
def test_images_have_steps_of_their_own(finished, captions, text_file, tmp_path, capfd):
    entries = json.loads(captions.read_text())
    for number in range(16):
        name = str(tmp_path / f"{number}.png")
        cv2.imwrite(name, np.full((40, 50, 3), 15 * number, np.uint8))
        entries.append({"image": name, "caption": f"gray {number}"})
    (tmp_path / "both.json").write_text(json.dumps(entries))
    changes = {"train__epochs": 2, "eval__settings": ((24, 6, 42),)}
    config = frozen_config(tmp_path / "both.json", "/", text_file, finished.workdir, **changes)
    assert train.train(config, tmp_path / "run") == 0
    err = capfd.readouterr().err
    assert "compiled training step for 20 grids" in err
    assert "compiled training step of images for 2 grids, capacity P=9," in err
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run"))


def test_retrieval_is_measured_on_the_way(trained, tiny_data, captions, tmp_path, capfd):
    """As `--mode=evaluate` measures it afterwards; the best checkpoint stays."""
    unfinished(trained, tmp_path / "run")
    changes = {"data__validation": str(captions), "eval__every_epochs": 10, "train__epochs": 10}
    config = tiny.make_clip(captions, tiny_data, **changes)
    assert train.train(config, tmp_path / "run") == 0
    (line,) = lines(tmp_path / "run", "validation")
    assert line["step"] == 20 and line["failed"] == 0
    assert "best checkpoint: step 20, text to video R@1 " in capfd.readouterr().err
    assert tasks.run(config, str(tmp_path / "run")) == 0
    for budget, row in report_of(tmp_path / "run", "retrieval")["budgets"].items():
        for name, direction in (("t2v_r1", "text_to_video"), ("v2t_r1", "video_to_text")):
            assert line[f"{name}_{budget}"] == row["plain"][direction]["recall"]["1"]


# --- A frozen text encoder


@pytest.fixture(scope="module")
def frozen(finished, tiny_data, captions, text_file, compiled, tmp_path_factory):
    """A finished run that trains pooling and head only, and what it starts from. Read only."""
    workdir, start = tmp_path_factory.mktemp("frozen") / "run", finished.workdir
    config = frozen_config(captions, tiny_data, text_file, start)
    assert train.train(config, workdir) == 0
    return workdir, start


def frozen_config(captions, tiny_data, text_file, start, **changes):
    own = {
        **{"clip__train_text": False, "clip__text_encoder": str(text_file)},
        **{"train__freeze": "backbone", "train__init_from": str(start), "train__epochs": 1},
        "train__budgets": (24,),
    }
    return tiny.make_clip(captions, tiny_data, **own | changes)


def test_it_is_in_no_checkpoint_but_by_its_checksum(frozen, text_file):
    workdir, start = frozen
    found = restore(workdir)
    assert TEXT not in found.params and len(found.frozen[TEXT]) == 64
    before = restore_params(start)
    for name, same in (("patch_embed", True), ("blocks", True), ("pool", False)):
        pairs = zip(*(jax.tree.leaves(p[name]) for p in (found.params, before)), strict=True)
        assert all(np.array_equal(*pair) for pair in pairs) == same, name
    weights = flux_clip_weights.read(workdir)
    state = safetensors.numpy.load_file(text_file)
    expected = state[f"{PREFIX}embedding_layer.weight"]
    assert np.array_equal(weights.params[TEXT]["token_embed"], expected)


def test_another_one_is_refused(frozen, tiny_data, captions, tmp_path):
    workdir, start = frozen
    other = write_text_encoder(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError, match=r"other\.safetensors: is not the text encoder that"):
        flux_clip_weights.read(workdir, str(other))
    config = frozen_config(captions, tiny_data, other, start, train__epochs=2)
    with pytest.raises(UserError, match="other weights of the frozen text_encoder"):
        train.train(config, workdir)


def test_a_run_goes_on_from_another_one(frozen, trained, tiny_data, captions, tmp_path, capfd):
    """Stage 2 takes head and temperature of stage 1, and a trained text encoder from its run.

    A step of the run is as good as its workdir.
    """
    step = find_step(trained)
    config = frozen_config(captions, tiny_data, step, step, clip__temperature=0.5)
    assert train.train(config, tmp_path / "run") == 0
    before = restore_params(trained)
    first = lines(tmp_path / "run")[0]
    assert first["temperature"] == pytest.approx(float(before[TEMPERATURE]))
    weights = flux_clip_weights.read(tmp_path / "run")
    assert np.array_equal(weights.params[TEXT]["token_embed"], before[TEXT]["token_embed"])
    assert f"the text encoder is Ti of {step}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip__text_encoder": ""}, "no text encoder: add --config.clip.text_encoder=WEIGHTS"),
        ({"clip__text_encoder": "none.pt"}, r"none\.pt: there are no weights"),
        (
            {"clip__network": "MobileCLIP-B"},
            r"mobileclip\.safetensors is of another model; wrong shape",
        ),
    ],
)
def test_a_text_encoder_that_does_not_fit(
    frozen, tiny_data, captions, text_file, tmp_path, changes, message
):
    config = frozen_config(captions, tiny_data, text_file, frozen[1], **changes)
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "run")


# --- Evaluation


def report_of(workdir, kind: str) -> dict:
    (path,) = (workdir / "evaluation").glob(f"*-{kind}-*.json")
    return json.loads(path.read_text())


def pairs_file(folder, tiny_data, captions, *more: dict):
    entries = [*json.loads(captions.read_text())[:6], *more]
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


def test_retrieval(trained, tiny_data, captions, tmp_path, capfd):
    """What was trained on is found; a broken video stays in the gallery and is never found."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    broken = {"video": str(tiny_data / tiny.BAD), "caption": "long " * 90}
    pairs = pairs_file(tmp_path, tiny_data, captions, broken)
    changes = {"data__validation": str(pairs), "data__max_bad_fraction": 0.5}
    config = tiny.make_clip(captions, tiny_data, **changes)
    assert tasks.run(config, str(workdir)) == 0
    report = report_of(workdir, "retrieval")
    assert (report["videos"], report["texts"], report["cut_texts"]) == (7, 13, 1)
    assert [failure["id"] for failure in report["failures"]] == [str(tiny_data / tiny.BAD)]
    for row in report["budgets"].values():
        for kind in ("plain", "dual_softmax"):
            for direction, queries in (("text_to_video", 13), ("video_to_text", 7)):
                own = row[kind][direction]
                assert own["recall"]["1"] <= own["recall"]["5"] <= own["recall"]["10"] <= 1
                low, high = own["intervals"]["1"]
                assert low <= own["recall"]["1"] <= high
                # Its own query ranks last, so not all are found among the first ten.
                if direction == "video_to_text":
                    assert own["recall"]["10"] <= 6 / 7
                assert 1 <= own["median_rank"] <= queries
    out = capfd.readouterr().out
    assert "warning: 1 texts are longer than 77 tokens and were cut" in out
    assert "1 of 7 videos could not be read" in out
    assert "text to video  plain" in out and "text to video  dual softmax" in out


def test_a_broken_video_fails_whatever_its_scores():
    from fluxvit_jax.data.retrieval_set import RetrievalSet
    from fluxvit_jax.evaluation.retrieve import both_scores

    own = tuple((n,) for n in range(3))
    pairs = RetrievalSet(videos=("a", "b", "c"), texts=("a", "b", "c"), texts_of=own, videos_of=own)
    vectors = np.eye(3, dtype=np.float32)
    right = both_scores(vectors, vectors, pairs, {}, 1.0)
    spoiled = both_scores(vectors, vectors, pairs, {1: "broken"}, 1.0)
    for kind in ("plain", "dual_softmax"):
        for direction in ("text_to_video", "video_to_text"):
            assert right[kind][direction]["recall"]["1"] == 1
            assert spoiled[kind][direction]["recall"]["1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("allowed", [False, True])
def test_another_split_is_refused_by_its_count(
    trained, tiny_data, captions, tmp_path, capfd, allowed
):
    pairs = pairs_file(tmp_path, tiny_data, captions)
    changes = {"data__validation": str(pairs), "eval__videos": 1000, "eval__allow_missing": allowed}
    config = tiny.make_clip(captions, tiny_data, **changes)
    workdir = shutil.copytree(trained, tmp_path / "run")
    if allowed:
        assert tasks.run(config, str(workdir)) == 0
        assert "warning: the set has 1000 videos, not 6" in capfd.readouterr().out
        assert report_of(workdir, "retrieval")["expected"] == {"videos": 1000}
        return
    with pytest.raises(UserError, match="has 6 videos, and the set has 1000"):
        tasks.run(config, str(workdir))


def test_classes_by_their_names(trained, tiny_data, captions, tmp_path, capfd):
    """Those of the captions are told apart better than by chance, though never trained as such."""
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nblue\nyellow\n")
    (tmp_path / "prompts.txt").write_text("A {}, number 1\nThe {}\n")
    changes = {
        **{"eval__task": "zero_shot", "data__class_names": str(names)},
        **{"data__validation": str(tiny_data / "train.csv")},
        **{"eval__prompts": str(tmp_path / "prompts.txt")},
    }
    workdir = shutil.copytree(trained, tmp_path / "run")
    assert tasks.run(tiny.make_clip(captions, tiny_data, **changes), str(workdir)) == 0
    report = report_of(workdir, "zero_shot")
    assert report["class_names"] == list(read_class_names(names))
    row = report["budgets"]["24"]
    assert row["top1"] > 0.3 and sum(row["calibration"]["bins"]["count"]) == row["decoded"]
    assert "4 classes by 2 prompts each" in capfd.readouterr().err
    (tmp_path / "prompts.txt").write_text("a class\n")
    with pytest.raises(UserError, match=r"a prompt has \{\} once"):
        tasks.run(tiny.make_clip(captions, tiny_data, **changes), str(workdir))


def test_multiple_choice(trained, tiny_data, captions, tmp_path, capfd):
    options = ["A red, number 1", "A green, number 1", "A blue, number 1", "A yellow, number 1"]
    path = tmp_path / "questions.json"
    changes = {"eval__task": "multiple_choice", "data__validation": str(path)}
    config = tiny.make_clip(captions, tiny_data, **changes)
    workdir = shutil.copytree(trained, tmp_path / "run")
    numbers = range(8)
    for kind, answers in (
        ("accuracy", [n % 4 for n in numbers]),
        ("map", [[int(n % 4 == k) for k in range(4)] for n in numbers]),
    ):
        path.write_text(
            json.dumps(
                [
                    {"video": f"{n}.mp4", "option": options, "answer": answer}
                    for n, answer in zip(numbers, answers, strict=True)
                ]
            )
        )
        shutil.rmtree(workdir / "evaluation", ignore_errors=True)
        assert tasks.run(config, str(workdir)) == 0
        report = report_of(workdir, "multiple_choice")
        assert report["videos"] == 8 and 0 < report["budgets"]["24"][kind] <= 1
    path.write_text(json.dumps([{"video": "0.mp4", "option": options, "answer": 4}]))
    with pytest.raises(UserError, match="entry 0: the answer 4 is no number of an option"):
        tasks.run(config, str(workdir))


@pytest.mark.slow
def test_a_search_finds_grids_for_retrieval(
    trained, tiny_data, captions, tmp_path, capfd, monkeypatch
):
    """Its cells are ranked by video to text R@1; the evaluation of its plan measures both ways."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    entries = json.loads(captions.read_text())
    for name, own in (("choose", entries[:8]), ("report", entries[8:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    monkeypatch.setattr(latency, "WARM_UP_SECONDS", 0.05)
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    changes = {
        **{"search__budgets": (24,), "eval__settings": ((24, 6, 42),)},
        **{"data__validation": str(tmp_path / "report.json"), "search__resolutions": "28..42..14"},
        **{"search__split": str(tmp_path / "choose.json"), "search__frames": "4..6..2"},
    }
    config = tiny.make_clip(captions, tiny_data, **changes)
    assert search.run(config, str(workdir)) == 0
    summary = json.loads((workdir / "search/report.json").read_text())
    assert any("R@1 and R@5 from video to text, among 32 texts" in n for n in summary["notes"])
    chosen = summary["chosen"]["24"]["select"]
    config.eval.plan = str(workdir)
    assert tasks.run(config, str(workdir)) == 0
    row = report_of(workdir, "retrieval-plan")["budgets"]["24"]
    cell = summary["cells"][chosen]
    assert (row["frames"], row["resolution"]) == (cell["frames"], cell["resolution"])
    # Among its own list's texts a video finds its text at least as often as among those of both.
    assert row["plain"]["video_to_text"]["recall"]["1"] >= cell["report"]["top1"]
    config.search.split = ""
    with pytest.raises(UserError, match=r"nothing to choose on: add --config\.search\.split=PAIRS"):
        search.run(config, str(workdir))


def test_a_classifier_retrieves_nothing(finished, tiny_data, captions, tmp_path):
    pairs = pairs_file(tmp_path, tiny_data, captions)
    changes = {"data__validation": str(pairs), "eval__task": "retrieval"}
    with pytest.raises(UserError, match="trained by flux_multi, not on captions"):
        tasks.run(tiny.make_config(tiny_data, **changes), str(finished.workdir))


# --- Lists


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '[{"video": "0.mp4", "caption": ""}]', "entry 0: a caption is empty"),
        ("a.json", '[{"video": "0.mp4"}]', "entry 0: caption is no text and no list of texts"),
        ("a.json", '[{"caption": "x"}]', 'entry 0: names no file: "video" or "image" is missing'),
        ("a.json", '{"video": "0.mp4"}', "not a list of"),
        ("a.json", "[]", "holds no captions"),
        ("a.json", '[{"video": "../0.mp4", "caption": "x"}]', "is not inside the root"),
        (
            "a.json",
            '[{"video": "0.mp4", "caption": "x", "video_start_frame": 5, "video_end_frame": 5}]',
            "entry 0: video_start_frame=5 and video_end_frame=5 are no part of a video",
        ),
        ("a.csv", "video,text\n0.mp4,x\n", "the first line is not path,caption"),
        ("a.csv", "path,caption\n0.mp4,!!\n", "line 2: a caption is empty"),
    ],
)
def test_mistakes_in_a_list(tiny_data, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        train.train(tiny.make_clip(tmp_path / name, tiny_data), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
