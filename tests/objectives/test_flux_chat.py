"""Video chat against numbers of the official code."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import blocks, fluxvit
from fluxvit_jax.models.connector import Connector, merge
from fluxvit_jax.models.language_model import graphdef
from fluxvit_jax.models.token_selection import GridLimits, Selection
from fluxvit_jax.objectives import flux_chat
from fluxvit_jax.objectives.frame_times import VideoTokens, with_times
from fluxvit_jax.objectives.next_token_loss import answer_scores, labels_counted, with_video
from tests import tiny
from tests.models.chat_golden import CHAT, STAGE1, write_stage1_folder

PROMPTS = json.loads((CHAT / "prompts.json").read_text())
VIDEO = -200


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_stage1_folder(tmp_path_factory.mktemp("llm"))
    config = language_model_files.read_config(folder)
    params = language_model_files.read(folder, language_model_files.shapes(config))
    return fluxvit.from_params(graphdef(config), jax.tree.map(jnp.asarray, params))


def projector_weights():
    return {
        ours: {
            "kernel": STAGE1[f"weights.model.mm_projector.mlp.{theirs}.weight"].T,
            "bias": STAGE1[f"weights.model.mm_projector.mlp.{theirs}.bias"],
        }
        for ours, theirs in (("fc1", 0), ("fc2", 2))
    }


def close(found, expected, tolerance):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("run", PROMPTS["runs"])
def test_golden_stage_1(llm, run):
    """Features of the encoder to the loss, and the gradients of the projector and the features.

    The official code merges clips of four frames, and images, by themselves.
    """
    case, sizes = PROMPTS["runs"][run], PROMPTS["model"]["connector"]
    golden = {n.removeprefix(f"{run}."): x for n, x in STAGE1.items() if n.startswith(f"{run}.")}
    graph = blocks.graphdef(partial(Connector, sizes["width"], sizes["hidden"], jnp.float32))
    rows = range(len(case["lengths"]))
    features = [jnp.asarray(golden[f"features.{row}"]) for row in rows]
    labels = jnp.asarray(golden["labels_in"])
    assert labels_counted(labels) == case["labels_counted"]

    def embedded(params, features, row):
        clip = min(len(features), sizes["frames_a_clip"])
        tokens = rearrange(features, "(c t) n d -> c (t n) d", t=clip)
        merged = merge(tokens, 64, sizes["heads"]).tokens
        video = rearrange(fluxvit.from_params(graph, params)(merged), "c n d -> 1 (c n) d")
        ids = golden["input_ids"][row][None]
        place = jnp.asarray(np.argmax(ids == VIDEO, axis=1))
        return with_video(llm.embed(np.maximum(ids, 0)), video, place), place

    @jax.jit
    def loss(params, features):
        total = 0.0
        for row in rows:
            x, place = embedded(params, features[row], row)
            hidden = llm.encode(x, remat=True)
            total += answer_scores(hidden, labels[row][None], place, llm.logits)[0][0]
        return total / labels_counted(labels)

    for row in rows:
        x = embedded(projector_weights(), features[row], row)[0][0]
        real = golden["attention_mask"][row] == 1
        close(x[: real.sum()], golden["inputs_embeds"][row][real], 2e-6)
    value, (d_params, d_features) = jax.value_and_grad(loss, argnums=(0, 1))(
        projector_weights(), features
    )
    assert value == pytest.approx(case["loss"], rel=1e-6)
    for ours, theirs in (("fc1", 0), ("fc2", 2)):
        name = f"d.model.mm_projector.mlp.{theirs}"
        close(d_params[ours]["kernel"].T, golden[f"{name}.weight"], 1e-5)
        close(d_params[ours]["bias"], golden[f"{name}.bias"], 1e-5)
    for row in rows:
        close(d_features[row], golden[f"d_features.{row}"], 1e-5)


def test_only_the_tokens_before_labels_are_scored(llm):
    """By hand: a text of several parts, with labels on both sides of its video."""
    keys = jax.random.split(jax.random.key(0), 2)
    T, K, place = 45, 7, 3
    text, video = (jax.random.normal(key, (1, n, 48)) for key, n in zip(keys, (T, K), strict=True))
    labels = np.full((1, T), -100)
    labels[0, [0, 2, 4, 40]] = 5, 6, 7, 8  # the first one has nothing before it
    x = with_video(text, video, jnp.array([place]))
    np.testing.assert_array_equal(
        x[0], np.concatenate([text[0, :place], video[0], text[0, place + 1 :]])
    )
    hidden = llm.encode(x)
    scores = jax.nn.log_softmax(llm.logits(hidden))[0]
    expected = -(scores[1, 6] + scores[place + K - 1, 7] + scores[40 + K - 2, 8])
    losses, hits = answer_scores(hidden, jnp.asarray(labels), jnp.array([place]), llm.logits)
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-6)
    assert (hits[0], labels_counted(labels)) == (0, 3)


def test_the_layer_whose_tokens_are_projected():
    """The output of that block, without CLS, in the order of the video."""
    config = tiny.make_chat("captions.json", ".", ".", chat__layer=-2)
    network, whole = flux_chat.encoder_config(config), model_config(config)
    params = fluxvit.init_params(whole, jax.random.key(0))
    grid = Grid(4, 3, 3)
    limits = GridLimits(*grid, grid.tokens)
    patches = jax.random.randint(jax.random.key(1), (2, grid.tokens, 588), 0, 256).astype(jnp.uint8)
    index = jax.random.permutation(jax.random.key(2), grid.tokens)[:24]
    kept = Selection(jnp.stack([index, index[::-1]]), None)
    grids = jnp.array([grid], jnp.int32)
    model = fluxvit.from_params(
        fluxvit.graphdef(network), flux_chat.encoder_params(params, network)
    )
    found, frame = flux_chat.features(model, patches, grids, kept, limits)

    ordered = Selection(jnp.sort(kept.token_index), None)
    full = fluxvit.from_params(fluxvit.graphdef(whole), params)
    tokens = fluxvit.normalize(fluxvit.gather_tokens(patches, ordered))
    position = full.position(grids, ordered.token_index, limits)
    expected = full.features(tokens, position, ordered, (whole.depth - 2,)).hidden_states[0, :, 1:]
    close(found, expected, 1e-6)
    np.testing.assert_array_equal(ordered.token_index[0], ordered.token_index[1])
    np.testing.assert_array_equal(frame, ordered.token_index // 9)


def test_texts_of_times_stand_before_the_tokens_of_their_frames():
    """By hand: texts of several lengths, one of a frame without tokens, and one that is missing."""
    frame = np.array([[0, 0, 2, 2, 2], [1, 1, 1, 3, 3]])
    T, M, D = 4, 3, 2
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = np.asarray(jax.random.normal(keys[0], (2, 5, D)))
    texts = np.asarray(jax.random.normal(keys[1], (2, T, M, D)))
    lengths = np.array([[1, 2, 3, 0], [2, 0, 1, 3]])
    real = np.arange(M) < lengths[..., None]
    found, length = with_times(VideoTokens(jnp.asarray(tokens), jnp.asarray(frame)), texts, real)
    assert found.shape == (2, 5 + T * M, D)
    for row in range(2):
        expected = []
        for t in range(T):
            own = tokens[row, frame[row] == t]
            expected += [*(texts[row, t, : lengths[row, t]] if len(own) else ()), *own]
        assert length[row] == len(expected)
        np.testing.assert_array_equal(found[row, : len(expected)], expected)


def test_videos_of_several_lengths_in_texts(llm):
    """A shorter one with padding is as if there were none: texts, losses and hits."""
    keys = jax.random.split(jax.random.key(0), 2)
    text = jax.random.normal(keys[0], (2, 10, 48))
    video = jax.random.normal(keys[1], (2, 7, 48))
    labels = jax.random.randint(keys[0], (2, 10), 0, 160).at[:, :3].set(-100)
    place, length = jnp.array([2, 5]), jnp.array([4, 7])

    @jax.jit
    def scores(text, video, labels, place, length):
        x = with_video(text, video, place, length)
        return answer_scores(llm.encode(x), labels, place, llm.logits, length)

    found = scores(text, video, labels, place, length)
    for row, (own, count) in enumerate(zip(place, length, strict=True)):
        at = slice(row, row + 1)
        alone = scores(text[at], video[at, :count], labels[at], own[None], count[None])
        close(np.stack(found)[:, at], np.stack(alone), 1e-6)
