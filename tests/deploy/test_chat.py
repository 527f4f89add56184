"""Questions about videos, by a language model of random weights, whose answers are text."""

import io
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fluxvit_jax
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.convert import __main__ as convert
from fluxvit_jax.data import durable_files
from fluxvit_jax.data.chat_templates import VIDEO, follow_up_ids, prompt_ids
from fluxvit_jax.data.clip_cost import clip_cost
from fluxvit_jax.deploy import chat_mode, predict
from fluxvit_jax.deploy.chat import FirstQuestion
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import graphdef
from fluxvit_jax.objectives.flux_chat import FluxChat
from fluxvit_jax.objectives.next_token_loss import with_video
from fluxvit_jax.token_optimization import search
from tests import tiny
from tests.models.chat_golden import STAGE1, write_stage1_folder

ANSWER = 12  # tokens
LENGTH = 160  # of a text, padded


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_stage1_folder(tmp_path_factory.mktemp("llm") / "tiny")


@pytest.fixture(scope="module")
def workdir(tiny_data, llm, tmp_path_factory):
    captions = tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))
    return tiny.write_chat_run(
        tmp_path_factory.mktemp("chat") / "run", tiny.make_chat(captions, tiny_data, llm)
    )


@pytest.fixture(scope="module")
def loaded(workdir):
    return fluxvit_jax.load_chat(workdir)


def answer_by_hand(loaded, tokens, ids, count):
    """Each token from the whole text so far, without a cache."""
    model = fluxvit.from_params(graphdef(loaded._llm_config), loaded._llm)
    found = []

    @jax.jit
    def scores(ids, last):  # of one length: what follows the last token is not seen by it
        place = jnp.argmax(ids == VIDEO)[None]
        x = with_video(model.embed(jnp.maximum(ids, 0)[None]), tokens[None], place)
        return model.logits(model.encode(x)[0, last])

    for _ in range(count):
        whole = np.concatenate([ids, found]).astype(int)
        padded = np.pad(whole, (0, LENGTH - len(whole)))
        found.append(int(jnp.argmax(scores(padded, len(whole) - 1 + len(tokens) - 1))))
    return found


def test_answers_are_those_of_the_whole_text(loaded, tiny_data):
    """With a cache that is filled by padded prompts, and over a second question."""
    conversation = loaded.open(tiny_data / "0.mp4", 24)
    conversation._message = ""
    assert conversation.tokens.shape == (8, 48)
    prompt = prompt_ids([], "What is it?", loaded.tokenizer)
    expected = answer_by_hand(loaded, conversation.tokens, prompt, ANSWER)
    assert loaded.tokenizer.im_end not in expected
    first = list(conversation._answer("What is it?", ANSWER))
    assert first == expected
    so_far = np.concatenate([prompt, first, follow_up_ids("And then?", loaded.tokenizer)])
    second = list(conversation._answer("And then?", ANSWER))
    assert second == answer_by_hand(loaded, conversation.tokens, so_far, ANSWER)


def test_several_at_once_are_answered_as_one_by_one(loaded, tiny_data, monkeypatch):
    """Of several lengths: of prompts, of answers, and by the end of the context."""
    texts = ("What is it?", "And what? " * 5, "Why?", "What? " * 60)
    clips = [loaded.read(tiny_data / f"{number}.mp4", 24)[0].frames for number in range(4)]

    def alone(clip, text):
        return list(loaded.about(clip, 24)._answer(text, ANSWER))

    free = [alone(*pair) for pair in zip(clips[:3], texts[:3], strict=True)]
    end = free[0][4]
    lengths = [len(prompt_ids([], text, loaded.tokenizer)) + 7 for text in texts]
    context = lengths[1] + 6
    assert lengths[2] + ANSWER < context < lengths[3]
    monkeypatch.setattr(loaded.tokenizer, "end_tokens", (end,))
    monkeypatch.setattr(loaded, "_llm_config", replace(loaded._llm_config, context=context))
    expected = [alone(*pair) for pair in zip(clips[:3], texts[:3], strict=True)]
    assert len(expected[0]) < 5 and len(expected[1]) == 6 < len(expected[2])
    asked = [*map(FirstQuestion, texts), None]
    found = loaded.ask_each(np.stack([*clips, clips[0]]), asked, 24, ANSWER)
    assert found[:3] == [loaded.tokenizer.decode(ids) for ids in expected]
    assert "the conversation is too long" in str(found[3]) and found[4] == ""


def test_scores_that_are_no_numbers_are_no_answer(loaded, tiny_data, monkeypatch):
    damaged = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), loaded._llm)
    monkeypatch.setattr(loaded, "_llm", damaged)
    with pytest.raises(UserError, match="no finite numbers"):
        loaded.ask(tiny_data / "0.mp4", "What is it?", tokens=24)
    clip = loaded.read(tiny_data / "0.mp4", 24)[0].frames
    with pytest.raises(UserError, match="no finite numbers"):
        loaded.ask_each(clip[None], [FirstQuestion("What is it?")], 24, ANSWER)


def test_a_stream_is_the_answer(loaded, tiny_data):
    conversation = loaded.open(tiny_data / "0.mp4", 24)
    pieces = list(conversation.stream("What is it?", ANSWER))
    assert "".join(pieces) == loaded.ask(tiny_data / "0.mp4", "What is it?", 24, ANSWER)
    assert conversation.history == [("What is it?", "".join(pieces))]


def test_other_videos_and_budgets_are_other_tokens(loaded, tiny_data):
    seen = [loaded.open(tiny_data / name, n).tokens for name, n in (
        ("0.mp4", 24), ("0.mp4", 12), ("1.mp4", 24)
    )]  # fmt: skip
    assert [len(tokens) for tokens in seen] == [8, 4, 8]
    assert not np.allclose(seen[0], seen[2])


def test_a_conversation_ends_at_the_context(loaded, tiny_data, monkeypatch):
    config = loaded._llm_config
    monkeypatch.setattr(loaded, "_llm_config", type(config)(**{**vars(config), "context": 140}))
    conversation = loaded.open(tiny_data / "0.mp4", 24)
    assert len(list(conversation._answer("What is it?", 256))) < 100
    with pytest.raises(UserError, match=r"too long: \d+ tokens, 8 of them of the video, where the"):
        list(conversation.stream("What is it?"))
    assert conversation.history == []  # nothing was asked


def test_a_refused_question_leaves_no_trace(loaded, tiny_data, monkeypatch):
    config = loaded._llm_config
    monkeypatch.setattr(loaded, "_llm_config", type(config)(**{**vars(config), "context": 140}))
    conversation, plain = (loaded.open(tiny_data / "0.mp4", 24) for _ in range(2))
    with pytest.raises(UserError, match="too long"):
        conversation.ask("What is it? " * 99)
    assert conversation.ask("What is it?", 3) == plain.ask("What is it?", 3)
    assert conversation.history == plain.history
    # Of an answer of no tokens, none is left to be read before the next question.
    conversation.ask("And?", 0)
    assert conversation._unread == []


def test_from_the_command_line(workdir, tiny_data, tmp_path, capsys, monkeypatch):
    options = chat_mode.Options(str(workdir), str(tmp_path / "out"), str(tiny_data / "0.mp4"))
    assert chat_mode.run(options._replace(question="What is it?", tokens=24)) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "8 tokens for the language model" in err and "first word after" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nAnd then?\n"))
    assert chat_mode.run(options._replace(tokens=24)) == 0
    again, _ = capsys.readouterr()
    assert again.startswith(out) and len(again) > len(out)


def test_questions_through_a_pipe(workdir, tiny_data, tmp_path, capsys, monkeypatch):
    """Empty lines are passed over, and letters of another encoding are no error."""
    lines = b"What is it?\n\n  \nO\xf9 est-il?\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    video = str(tiny_data / "0.mp4")
    assert chat_mode.run(chat_mode.Options(str(workdir), str(tmp_path), video, tokens=24)) == 0
    assert capsys.readouterr().err.count("first word after") == 2


def test_answers_go_into_no_file(workdir, tiny_data, tmp_path):
    (tmp_path / "videos").mkdir()
    shutil.copy(tiny_data / "0.mp4", tmp_path / "videos")
    (tmp_path / "file").write_text("mine")
    options = chat_mode.Options(
        str(workdir), str(tmp_path / "file"), str(tmp_path / "videos"), question="What?"
    )
    with pytest.raises(UserError, match=r"file: cannot be used as a folder: File exists$"):
        chat_mode.run(options)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_answered_line_by_line(workdir, loaded, tiny_data, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    names = ("0.mp4", "1.mp4", "2.mp4", tiny.BAD)
    for name in names:
        shutil.copy(tiny_data / name, folder)
    options = chat_mode.Options(
        str(workdir), str(tmp_path), str(folder), question="What is it?", tokens=24
    )
    config = default_config()
    config.eval.batch_size = 3
    assert chat_mode.run(options, config) == 0
    rows = [json.loads(line) for line in (tmp_path / chat_mode.ANSWERS).read_text().splitlines()]
    assert [row["video"] for row in rows] == list(names)
    assert tiny.BAD in rows[3]["error"]
    for row in rows[:3]:
        assert row["answer"] == loaded.ask(folder / row["video"], "What is it?", 24)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows

    before = (tmp_path / chat_mode.ANSWERS).read_bytes()
    with (
        durable_files.one_run_at_a_time(tmp_path, "another"),
        pytest.raises(UserError, match="another run of `--mode=chat` is at work here"),
    ):
        chat_mode.run(options, config)
    assert (tmp_path / chat_mode.ANSWERS).read_bytes() == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"video": "none.mp4"}, "--video=none.mp4: no such file or folder"),
        ({"llm": "nowhere"}, r"nowhere: no language model: there is no config\.json"),
        ({"question": "", "video": "."}, "a folder needs one question for all: --question"),
        ({"tokens": 2}, "--tokens=2: 3 tokens are merged into one; ask for more"),
    ],
)
def test_bad_input_is_one_line(workdir, tiny_data, tmp_path, changes, message):
    options = chat_mode.Options(
        str(workdir), str(tmp_path), str(tiny_data / "0.mp4"), question="What?"
    )
    with pytest.raises(UserError, match=message):
        chat_mode.run(options._replace(**changes))


def test_another_language_model_is_refused(workdir, llm, tmp_path):
    other = shutil.copytree(llm, tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"other: is not the language model that .* was trained for"
    ):
        fluxvit_jax.load_chat(workdir, llm=other)


def test_other_modes_tell_what_they_cannot_do(workdir, llm, tiny_data, tmp_path):
    config = tiny.make_chat(tiny.write_captions(tiny_data, tmp_path), tiny_data, llm)
    with pytest.raises(UserError, match="a search ranks by top-1 or by retrieval, not mvbench"):
        search.run(config, workdir)


@pytest.mark.slow
def test_what_reading_a_clip_costs_is_measured_with_its_text(llm, tiny_data, tmp_path):
    """As before a pre-flight."""
    config = tiny.make_chat(tiny.write_captions(tiny_data, tmp_path), tiny_data, llm)
    found = clip_cost(config, FluxChat.open_training, FluxChat.text_arrays(config))
    assert found.measured_on == "32 videos of config.data.train"


def test_a_run_of_another_objective_is_refused(finished):
    with pytest.raises(UserError, match="was trained by flux_multi, and has no projector"):
        fluxvit_jax.load_chat(finished.workdir)


def test_what_the_language_model_reads_is_written(workdir, loaded, tiny_data, tmp_path, capsys):
    """For those who serve it with something else."""
    options = predict.Options(
        str(workdir), str(tmp_path), (24, 12), "", None, str(tiny_data / "0.mp4"), features="llm"
    )
    assert predict.run(options) == 0
    with np.load(tmp_path / "0.mp4.npz") as found:
        for tokens in (24, 12):
            own = loaded.open(tiny_data / "0.mp4", tokens).tokens
            np.testing.assert_allclose(found[f"llm_{tokens}"], own, rtol=1e-6)


def test_a_chat_has_no_classes_to_predict(workdir, tiny_data, tmp_path):
    options = predict.Options(
        str(workdir / "checkpoints" / "0"), str(tmp_path), (24,), "", None, str(tiny_data / "0.mp4")
    )
    with pytest.raises(UserError, match=r"is a video chat and has no classes; ask .* --mode=chat"):
        predict.run(options)
    (workdir / "config.json").rename(tmp_path / "config.json")
    try:
        with pytest.raises(UserError, match="was pre-trained and has no classes; fine-tune it"):
            predict.run(options)
    finally:
        (tmp_path / "config.json").rename(workdir / "config.json")


@pytest.mark.parametrize("file", ["projector.safetensors", "mm_projector.bin"])
def test_the_projector_under_its_official_names(workdir, tmp_path, file):
    if file.endswith(".bin"):
        torch = pytest.importorskip("torch")
    assert convert.main([str(workdir), str(tmp_path / file), "--network=projector"]) == 0
    if file.endswith(".bin"):
        found = {n: x.numpy() for n, x in torch.load(tmp_path / file, weights_only=True).items()}
    else:
        found = safetensors.numpy.load_file(tmp_path / file)
    names = [n.removeprefix("weights.") for n in STAGE1.files if "weights.model.mm_projector" in n]
    assert set(found) == set(names)
    connector = restore_params(workdir)["connector"]
    first = found["model.mm_projector.mlp.0.weight"]
    np.testing.assert_array_equal(first, np.asarray(connector["fc1"]["kernel"]).T)
    assert convert.main([str(workdir), str(tmp_path / "folder"), "--network=projector"]) == 2


def test_a_follow_up_after_an_end(loaded, tiny_data, monkeypatch):
    """The token that ends an answer is read once, as the first of what follows."""
    first = loaded.open(tiny_data / "0.mp4", 24)
    ids = list(first._answer("What is it?", ANSWER))
    number = next(n for n in range(2, ANSWER) if ids[n] not in ids[:n])
    monkeypatch.setattr(loaded.tokenizer, "end_tokens", (ids[number],))
    ended = loaded.open(tiny_data / "0.mp4", 24)
    assert list(ended._answer("What is it?", ANSWER)) == ids[:number]
    monkeypatch.undo()
    cut = loaded.open(tiny_data / "0.mp4", 24)
    cut._message = ended._message
    assert list(cut._answer("What is it?", number)) == ids[:number]
    again = [list(own._answer("And then?", ANSWER)) for own in (ended, cut)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    "frames",
    [
        np.full((4, 28, 28, 3), 0.5, np.float32),
        np.zeros((4, 28, 56, 3), np.uint8),
        np.zeros((4, 56, 28, 3), np.uint8),
        np.zeros((4, 30, 30, 3), np.uint8),
        np.zeros((0, 28, 28, 3), np.uint8),
    ],
)
def test_frames_that_cannot_be_are_refused(loaded, frames):
    """Floats of 0 to 1 would be seen as black, and others as of another grid."""
    with pytest.raises(ValueError, match=r"frames are uint8 \[T, side, side, 3\], the side a mul"):
        loaded.about(frames, 12)
