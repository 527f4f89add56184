"""Whole runs of video chat: learned, resumed, with frozen and trained language models."""

import json
import re
import shutil
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from fluxvit_jax.checkpoints.checkpointer import best_step, find_step, restore_params
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.data.captions import ClipTimes
from fluxvit_jax.data.clips import middle_square
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.frame_sampling import test_frames as spread_frames
from fluxvit_jax.deploy.chat import FirstQuestion, load_chat
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import graphdef
from fluxvit_jax.objectives import flux_chat
from fluxvit_jax.objectives.flux_chat import CONNECTOR, LLM
from fluxvit_jax.training import train, train_state
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.wording import describe_result
from tests import hosts, tiny
from tests.models.chat_golden import write_stage1_folder, write_tensors


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_stage1_folder(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def captions(tiny_data, tmp_path_factory):
    return tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def held_out(tiny_data, tmp_path_factory):
    """Captions of several lengths of other videos; one is of a part, and one cannot be read."""
    path = tmp_path_factory.mktemp("held_out") / "held_out.json"
    entries = [
        {"video": "16.mp4", "caption": "A red, number 16"},
        {"video": "17.mp4", "caption": "The green", "start": 0.1, "end": 0.3},
        {"video": tiny.BAD, "caption": "Nothing"},
        {"video": "18.mp4", "caption": ["A blue, or is it not blue at all", "The blue"]},
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def config(tiny_data, captions, held_out, llm, finished):
    return tiny.make_chat(
        captions,
        tiny_data,
        llm,
        train__init_from=str(finished.workdir),
        train__epochs=5,
        data__validation=str(held_out),
        eval__settings=((24, 4, 42), (12, 2, 42)),
    )


@pytest.fixture(scope="module")
def trained(config, compiled, tmp_path_factory):
    """A finished run. Read only."""
    workdir = tmp_path_factory.mktemp("chat") / "run"
    assert train.train(config, workdir) == 0
    return workdir


def lines(workdir, split="train") -> list[dict]:
    return [x for x in tiny.read_lines(workdir / "metrics.jsonl") if x["split"] == split]


def assert_same_steps(workdir, other) -> None:
    names = ("loss", "answer_24", "answer_12", "top1_12", "gradient_norm")
    found = ([[line[n] for n in names] for line in lines(w)] for w in (workdir, other))
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_run_learns(trained):
    found = lines(trained)
    assert len(found) == 20
    losses = [line["answer_24"] for line in found]
    assert losses[0] == pytest.approx(np.log(368), rel=0.2)  # of one word of so many
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    assert all(
        line["loss"] == pytest.approx(line["answer_24"] + line["answer_12"]) for line in found
    )


def test_validation_measures_the_loss_and_ranks_checkpoints(trained, config):
    found = lines(trained, "validation")
    assert [line["step"] for line in found] == [8, 16, 20]
    assert {line["failed"] for line in found} == {1}
    best = min(found, key=lambda line: line["loss_24"])
    assert best_step(trained) == best["step"]
    assert describe_result(config, trained).startswith(
        f"best checkpoint: step {best['step']}, loss of a token {best['loss_24']:.4g} at 24 tokens"
    )
    assert best["loss_24"] == pytest.approx(loss_by_hand(trained, config), rel=1e-5)
    assert best["loss_12"] != best["loss_24"]


def loss_by_hand(workdir, config):
    """At 24 tokens: each answer alone, with the tokens that a chat about the video reads."""
    chat = load_chat(workdir)
    texts = flux_chat.FluxChat.text_arrays(config)
    source = flux_chat.FluxChat.open_validation(config, flux_chat.FluxChat.open_training(config))
    model = fluxvit.from_params(graphdef(chat._llm_config), chat._llm)
    losses = []
    for number in (0, 1, 3, 4):
        record = source[number]
        clip, times = clip_of(record, frames=4)
        text = texts([record], np.array([number]), 0, [ClipTimes(0.0, np.zeros(4))])
        place = int(text["place"][0])
        video = chat.about(clip, 24, times=times).tokens
        embedded = model.embed(text["text"])[0]
        x = jnp.concatenate([embedded[:place], video, embedded[place + 1 :]])
        scores = jax.nn.log_softmax(model.logits(model.encode(x[None])))[0]
        for slot, label in enumerate(text["labels"][0]):
            if slot and label >= 0:
                before = slot - 1 + (len(video) - 1 if slot > place else 0)
                losses.append(-float(scores[before, label]))
    return np.mean(losses)


def clip_of(record, frames):
    """Frames of a video or of its part, evenly spread, the middle square, and their seconds."""
    with Video(record.video) as video:
        start, end = record.seconds or (0, len(video) / video.frame_rate)
        first = int(start * video.frame_rate)
        count = min(len(video) - first, max(1, int((end - start) * video.frame_rate)))
        numbers = spread_frames(count, frames)
        return middle_square(video.read(first + numbers), 42), numbers / video.frame_rate


@pytest.mark.slow
def test_times_of_frames_in_training_validation_and_chat(config, trained, tiny_data, tmp_path):
    own = config.copy_and_resolve_references()
    own.chat.frame_times, own.train.epochs = True, 1
    workdir = tmp_path / "run"
    assert train.train(own, workdir) == 0
    assert lines(workdir)[0]["answer_24"] != lines(trained)[0]["answer_24"]
    (found,) = lines(workdir, "validation")
    assert found["loss_24"] == pytest.approx(loss_by_hand(workdir, own), rel=1e-5)
    # A batch in which one video does not tell its times.
    chat = load_chat(workdir)
    clips, times = zip(*(chat_clip(chat, tiny_data, number) for number in range(2)), strict=True)
    alone = [
        chat.about(clips[0], 24, times=times[0]),
        chat.about(clips[1], 24),
    ]
    assert len(alone[0].tokens) > len(alone[1].tokens) == 8
    asked = [FirstQuestion("What is it?"), FirstQuestion("And what is it not?")]
    together = chat.ask_each(np.stack(clips), asked, 24, 12, [times[0], None])
    assert together == [
        own.ask(question.text, 12) for own, question in zip(alone, asked, strict=True)
    ]


def chat_clip(chat, folder, number):
    clip, _ = chat.read(folder / f"{number}.mp4", 24)
    return clip.frames, clip.times


def test_only_the_projector_is_trained_and_the_language_model_is_in_no_checkpoint(trained):
    params = restore_params(trained)
    assert params.keys() == {*fluxvit.PARAMS, CONNECTOR}


def test_it_is_resumed_bit_for_bit(trained, config, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "20")
    assert train.train(config, workdir) == 0
    same = [(w / "metrics.jsonl").read_bytes() for w in (workdir, trained)]
    assert same[0] == same[1]
    params = [jax.tree.leaves(restore_params(w)) for w in (workdir, trained)]
    assert all(np.array_equal(*pair) for pair in zip(*params, strict=True))


ON_MESH = """
import sys
from tests import tiny
from fluxvit_jax.training import train

captions, data, llm, start, held_out, workdir = sys.argv[1:]
config = tiny.make_chat(
    captions, data, llm, train__init_from=start, train__epochs=5, data__validation=held_out,
    eval__settings=((24, 4, 42), (12, 2, 42)),
    parallel__mesh__data=2, parallel__mesh__fsdp=2, parallel__mesh__tensor=2,
)
sys.exit(train.train(config, workdir))
"""


@pytest.mark.slow
def test_devices_change_nothing(trained, config, compiled, tmp_path):
    """Eight devices split the clips, the language model and its heads."""
    data, chat = config.data, config.chat
    where = data.train, data.root, chat.llm, config.train.init_from, data.validation
    (ended,) = hosts.run(
        *(tmp_path, compiled, *where, str(tmp_path / "run")),
        code=ON_MESH,
        devices=8,
        flags=False,
        folders=[tiny.ROOT],
        environments=[{}],
    )
    assert ended.status == 0, ended.err
    names = ("loss", "answer_24", "answer_12", "top1_12", "gradient_norm")
    ours, one = (
        [[line[n] for n in names] for line in lines(w)] for w in (tmp_path / "run", trained)
    )
    np.testing.assert_allclose(ours, one, rtol=1e-4)
    names = ("loss_24", "loss_12", "failed")
    ours, one = (
        [[line[n] for n in names] for line in lines(w, "validation")]
        for w in (tmp_path / "run", trained)
    )
    np.testing.assert_allclose(ours, one, rtol=1e-4)


@pytest.mark.slow
def test_a_batch_in_parts_is_the_whole(trained, config, tmp_path):
    """The mean is over all labels of the batch, and captions are of several lengths."""
    parts = config.copy_and_resolve_references()
    parts.train.grad_accum_steps = 2
    assert train.train(parts, tmp_path / "run") == 0
    assert_same_steps(tmp_path / "run", trained)


@pytest.mark.slow
def test_budgets_by_turns(config, trained, tmp_path):
    """A step has the loss of its budget alone, which is that of a step with all of them."""
    own = config.copy_and_resolve_references()
    own.chat.step_budgets, own.train.epochs = "one", 1
    assert train.train(own, tmp_path / "run") == 0
    found = lines(tmp_path / "run")
    names = [[n for n in line if n.startswith("answer_")] for line in found]
    assert names == [["answer_24"], ["answer_12"], ["answer_24"], ["answer_12"]]
    assert found[0]["answer_24"] == pytest.approx(lines(trained)[0]["answer_24"], rel=1e-5)
    assert all(line["loss"] == line[name] for line, (name,) in zip(found, names, strict=True))


@pytest.mark.slow
def test_images_have_steps_of_their_own(config, tmp_path, capfd):
    """They have fewer tokens than the budgets, which take turns without them, resumed or not."""
    entries = json.loads(Path(config.data.train).read_text())
    for number in range(16):
        name = str(tmp_path / f"{number}.png")
        cv2.imwrite(name, np.full((40, 50, 3), 15 * number, np.uint8))
        entries.append({"image": name, "caption": f"gray {number}"})
    (tmp_path / "both.json").write_text(json.dumps(entries))
    own = config.copy_and_resolve_references()
    own.data.train, own.data.root = str(tmp_path / "both.json"), "/"
    own.data.validation = ""
    own.chat.step_budgets, own.train.epochs, own.log.every_steps = "one", 1, 5
    assert train.train(own, tmp_path / "run") == 0
    log = capfd.readouterr().err
    for what in ("24 tokens for ", "12 tokens for ", "images for 2 grids"):
        assert f"compiled training step of {what}" in log
    found = lines(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in found)
    first = {line["step"]: "answer_24" in line for line in found}
    # Every third step shows images. After each fifth step every kind of step has a line.
    assert first == {1: True, 2: False, 3: True, 5: False, 6: True}
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert train.train(own, tmp_path / "run") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_language_model_can_be_trained_too(config, tmp_path):
    own = config.copy_and_resolve_references()
    own.chat.train, own.train.epochs = "projector+llm", 1
    assert train.train(own, tmp_path / "run") == 0
    params = restore_params(tmp_path / "run")
    assert params.keys() == {*fluxvit.PARAMS, CONNECTOR, LLM}
    start = language_model_files.read(
        config.chat.llm, language_model_files.shapes(flux_chat.llm_config(config))
    )
    moved = jax.tree.map(lambda x, old: not np.array_equal(x, old), params[LLM], start)
    assert all(jax.tree.leaves(moved))


def test_a_run_goes_on_from_the_projector_of_another_one(trained, config, tmp_path):
    """Stage 2 starts from what stage 1 has learned, whether a workdir or a step of it is named."""
    before = restore_params(trained)[CONNECTOR]
    for source in (trained, find_step(trained)):
        own = config.copy_and_resolve_references()
        own.chat.train, own.train.init_from = "projector+llm", str(source)
        optimizer = make_optimizer(own, 1, train_state.abstract_params(own))
        params = train_state.initial_state(own, optimizer, make_mesh(own))["params"]
        jax.tree.map(np.testing.assert_array_equal, params[CONNECTOR], before)
        assert LLM in params


def test_another_language_model_is_refused_on_resume(trained, config, tmp_path):
    llm = shutil.copytree(config.chat.llm, tmp_path / "llm")
    state = safetensors.numpy.load_file(llm / "model.safetensors")
    state["model.norm.weight"] += 1
    write_tensors(llm, state)
    own = config.copy_and_resolve_references()
    own.chat.llm, own.train.epochs = str(llm), 6
    with pytest.raises(UserError, match="begun with other data: other weights of the frozen llm"):
        train.train(own, trained)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chat__llm": ""}, "no language model: add --config.chat.llm=FOLDER"),
        (
            {"chat__frame_times": True, "chat__order": "official"},
            "takes tokens in the order of the video; chat.order is official, set it to time",
        ),
        ({"chat__layer": -9}, "config.chat.layer: -9, and Ti has 2 blocks; -2 is the first"),
        ({"chat__merge": 5}, "config.chat.merge: 24 tokens of train.budgets do not divide by 5"),
        ({"train__freeze": "none"}, 'flux_chat trains no video network; set it "all"'),
        ({"data__grids__tokens": (8, 54)}, "24 tokens, and a grid of data.grids has 8"),
    ],
)
def test_bad_settings_are_one_line(config, tmp_path, changes, message):
    own = config.copy_and_resolve_references()
    for name, value in changes.items():
        own.update_from_flattened_dict({name.replace("__", "."): value})
    with pytest.raises(UserError, match=re.escape(message)):
        train.train(own, tmp_path / "run")
