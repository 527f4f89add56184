"""Flux-CLIP's objective: in parts, over devices and hosts, and against the official training."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.convert import official_names
from fluxvit_jax.convert.official_names import INTERNVIDEO2
from fluxvit_jax.convert.text_encoder_names import TEXT_ENCODER, text_state
from fluxvit_jax.data.captions import clean
from fluxvit_jax.data.tokenizer import tokenize
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.grids import capacity
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.clip_head import ClipHead
from fluxvit_jax.models.internvideo2 import InternVideo2, InternVideo2Config
from fluxvit_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from fluxvit_jax.models.token_selection import Selection
from fluxvit_jax.objectives.contrastive_loss import contrastive_loss
from fluxvit_jax.objectives.flux_clip import HEAD, TEMPERATURE, TEXT
from fluxvit_jax.training import train_step as steps
from fluxvit_jax.training.optimizer import decay_mask, floored_schedule
from fluxvit_jax.training.train_state import abstract_params
from tests import hosts, tiny
from tests.models.golden import GOLDEN

GROUP = 2


def clip_config(**changes):
    """Flux-CLIP without data, for batches of `random_batch`."""
    return tiny.make_clip("captions.json", ".", data__clips_per_grid=GROUP, **changes)


def random_batch(config, clips: int = 16) -> dict:
    """Clips on several grids; two pairs show the same thing."""
    rng, grids = np.random.default_rng(0), admissible_grids(config)
    P, number = capacity(grids), [0, 19, 17, 5, 3, 11, 8, 14]
    own = [grids[number[clip // GROUP % 8]] for clip in range(clips)]
    patches = rng.integers(0, 256, (clips, P, 588), np.uint8)
    for row, grid in zip(patches, own, strict=True):
        row[grid.tokens :] = 0
    identity = np.stack([np.arange(clips), np.arange(clips)], axis=1).astype(np.int32)
    identity[1], identity[-1] = identity[0], identity[5]
    return {
        "patches": patches,
        "grid": np.array(own, np.int32),
        "label": np.zeros(clips, np.int32),
        "text": tokenize([f"a cat, number {clip}" for clip in range(clips)]),
        "identity": identity,
        "key": jax.random.split(jax.random.key(0), clips),
    }


def make_objective(config):
    return steps.make_objective(config, admissible_grids(config), "cpu")


def random_params(config) -> dict:
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: np.asarray(0.1 * rng.normal(size=x.shape), x.dtype), abstract_params(config)
    )
    return params | {TEMPERATURE: np.float32(0.05)}


def compare(found, expected, tolerance: float = 1e-5) -> None:
    for (path, own), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        difference = np.linalg.norm(own - other)
        assert difference <= tolerance * np.linalg.norm(other) + 1e-7, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("freeze", "budgets"),
    [pytest.param("none", (24, 12), marks=pytest.mark.slow), ("backbone", (24,))],
)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(freeze, budgets):
    """Each clip is compared with all captions of the batch, not with those of its part.

    Each budget has its pooling head.
    """

    def gradients(parts: int):
        changes = {"train__freeze": freeze, "model__drop_path": 0.1, "train__batch_size": 16}
        changes["train__budgets"] = budgets
        config = clip_config(train__grad_accum_steps=parts, **changes)
        objective, params = make_objective(config), random_params(config)
        part, model = freezing(config), model_config(config)
        trained, fixed = (
            fluxvit.prepare_params(own, model)
            for own in (part.trained(params), part.frozen(params))
        )
        return jax.jit(objective.value_and_grad)(trained, fixed, random_batch(config))

    (whole, measured), (parts, of_parts) = gradients(1), gradients(4)
    terms = {"contrastive_24", "contrastive_12", "align_12", "top1_12", "loss"}
    assert set(measured) >= (terms if len(budgets) > 1 else {"contrastive_24", "loss"})
    compare(of_parts, measured)
    compare(parts, whole)
    assert np.linalg.norm(whole[TEXT]["token_embed"]) > 0
    assert ("patch_embed" in whole) == (freeze == "none")
    kernels = whole["pool"]["proj"]["kernel"]
    assert [bool(np.any(kernel)) for kernel in kernels] == [True, len(budgets) > 1, False]


@pytest.mark.parametrize(
    "case",
    json.loads((GOLDEN / "clip/loss_cases.json").read_text())["temperature_clamp"],
    ids=lambda case: str(case["before"]),
)
def test_the_floor_of_the_temperature(case):
    config = clip_config(clip__least_temperature=0.01)
    objective = make_objective(config)
    kept = objective.constrained({TEMPERATURE: jnp.float32(case["before"]), HEAD: 1})
    assert kept[TEMPERATURE] == pytest.approx(case["after"], rel=1e-6) and kept[HEAD] == 1


def test_a_start_below_the_floor_of_the_temperature():
    """Official: it is moved before each forward pass, so before the first one too."""
    config = clip_config(train__budgets=(24,), clip__least_temperature=0.1)
    objective, params, batch = make_objective(config), random_params(config), random_batch(config)
    step = jax.jit(objective.value_and_grad)
    _, below = step(params, {}, batch)
    gradients, at = step(params | {TEMPERATURE: np.float32(0.1)}, {}, batch)
    assert below == at and below[TEMPERATURE] == np.float32(0.1)
    assert gradients[TEMPERATURE] != 0


GRADIENTS = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.mesh import AXES, batch_sharding, device_put_global, traced_on_mesh
from tests.objectives.test_flux_clip import (
    clip_config, compare, make_objective, random_batch, random_params
)

told = dict(word.lstrip("-").split("=") for word in sys.argv[1:])
if "hosts" in told:
    jax.distributed.initialize(told["coordinator"], int(told["hosts"]), int(told["host"]))
own = {"train__batch_size": 32, "train__budgets": (24,)}
config = clip_config(train__grad_accum_steps=int(told["parts"]), **own)
batch = random_batch(config, 32)
objective, params = make_objective(config), random_params(config)

def gradients(shape, devices):
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), AXES)
    cut, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    own = partition_rules.shardings(params, mesh, objective.partition_rules)
    on = device_put_global(jax.tree.map(np.asarray, params), own)
    data = jax.random.key_data(batch["key"])
    put = device_put_global(batch | {"key": np.asarray(data)}, {name: cut for name in batch})
    def compute(params, batch):
        batch = batch | {"key": jax.random.wrap_key_data(batch["key"])}
        return objective.value_and_grad(params, {}, batch)
    program = jax.jit(traced_on_mesh(compute, mesh), out_shardings=whole)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), program(on, put))

found = [gradients(shape, jax.devices()) for shape in eval(told["meshes"])]
if jax.process_index() == 0:  # all have the same
    one = gradients((1, 1, 1), jax.local_devices()[:1])
    for own in found:
        compare(own, one)
print("same")
"""


def run_gradients(tmp_path, compiled, meshes, parts: int, devices: int, processes: int) -> None:
    """Fails unless the gradients on all meshes are those on one device."""
    for ended in hosts.run(
        *(tmp_path, compiled, f"--meshes={meshes}", f"--parts={parts}"),
        code=GRADIENTS,
        devices=devices,
        flags=processes > 1,
        folders=[tiny.ROOT] * processes,
        environments=[{}] * processes,
    ):
        assert ended.status == 0 and ended.out.endswith("same\n"), ended.err


@pytest.mark.slow
def test_devices_change_no_gradient(compiled, tmp_path):
    """The true gradient of the global loss: the official code's is divided by the ranks."""
    run_gradients(tmp_path, compiled, [(2, 2, 2)], parts=2, devices=8, processes=1)


@pytest.mark.slow
def test_hosts_change_no_gradient(compiled, tmp_path):
    run_gradients(tmp_path, compiled, [(2, 2, 1)], parts=1, devices=2, processes=2)


# --- Against the official code, whose video encoder is InternVideo2's

CASES = json.loads((GOLDEN / "clip/clip_cases.json").read_text())
ARRAYS = np.load(GOLDEN / "clip/clip_cases.npz")
STATE = dict(np.load(GOLDEN / "clip/clip_state.npz"))
VISION, ALIGN = "vision_encoder.", "vision_align."
OFFICIAL = InternVideo2Config(
    width=48, depth=2, heads=4, hidden=192, frames=4, rows=2, columns=2, pool_width=32,
    pool_heads=4, gelu="erf", dtype="float32",
)  # fmt: skip


def below(prefix: str, state: dict) -> dict:
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


def official_params(state: dict) -> dict:
    """The official state as parameters of ours: video encoder, head, temperature."""
    align = below(ALIGN, state)
    return {
        "vision": official_names.from_official(below(VISION, state), 4, INTERNVIDEO2),
        HEAD: {
            "norm": {"scale": align["0.weight"], "bias": align["0.bias"]},
            "proj": {"kernel": align["1.weight"].T, "bias": align["1.bias"]},
        },
        TEMPERATURE: np.float32(state["temp"]),
    }


def official_state(params: dict) -> dict:
    """The inverse of `official_params`."""
    head = params[HEAD]
    vision = official_names.to_official(jax.tree.map(np.asarray, params["vision"]), INTERNVIDEO2)
    return {f"{VISION}{name}": x for name, x in vision.items()} | {
        f"{ALIGN}0.weight": head["norm"]["scale"],
        f"{ALIGN}0.bias": head["norm"]["bias"],
        f"{ALIGN}1.weight": head["proj"]["kernel"].T,
        f"{ALIGN}1.bias": head["proj"]["bias"],
        "temp": params[TEMPERATURE],
    }


@jax.jit
def pooled_and_embedded(params: dict, clips: np.ndarray):
    """The official model's clip vectors and embeddings of clips [B, T, 3, 28, 28]."""
    B, T = clips.shape[:2]
    patches = clips.reshape(B, T, 3, 2, 14, 2, 14).transpose(0, 1, 3, 5, 4, 6, 2)
    patches = jnp.asarray(patches.reshape(B, 4 * T, 588))
    network = nnx.eval_shape(lambda: InternVideo2(OFFICIAL, nnx.Rngs(0)))
    nnx.update(network, nnx.State(jax.tree.map(jnp.asarray, params["vision"])))
    table = params["vision"]["pos_embed"]
    position = jnp.asarray(table)[None]
    if T == 1:  # the mean over the frames
        places = table[1:].reshape(4, 4, -1).mean(axis=0)
        position = jnp.concatenate([table[:1], places])[None]
    kept = Selection(jnp.broadcast_to(jnp.arange(4 * T), (B, 4 * T)), None)
    padded = jnp.pad(patches, ((0, 0), (1, 0), (0, 0)))
    pooled = network.features(padded, jnp.repeat(position, B, axis=0), kept, ()).pooled
    return pooled, embed(params[HEAD], pooled)


def embed(head: dict, pooled):
    module = nnx.eval_shape(lambda: ClipHead(32, 24, jnp.float32, nnx.Rngs(0)))
    nnx.update(module, nnx.State(jax.tree.map(jnp.asarray, head)))
    return module(pooled)


def official_texts(texts=None):
    """Vectors of texts, by default of the captions of the cases."""
    encoder = TextEncoderConfig(width=16, depth=2, heads=2, hidden=64, out=24)
    module = nnx.eval_shape(lambda: TextEncoder(encoder, nnx.Rngs(0)))
    params = official_names.from_official(text_state(STATE), of=TEXT_ENCODER)
    nnx.update(module, nnx.State(jax.tree.map(jnp.asarray, params)))
    if texts is None:
        texts = [clean(caption) for caption in CASES["captions"]]
        assert np.array_equal(tokenize(texts), ARRAYS["ids"])
    return jax.jit(lambda ids: module(ids))(tokenize(texts))


def close(found, expected, tolerance: float) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max() + 1e-9


def loss_of(params, clips, texts, identity):
    _, vectors = pooled_and_embedded(params, clips)
    return contrastive_loss(vectors, texts, params[TEMPERATURE], np.array(identity))


def test_golden_embeddings():
    params, texts = official_params(STATE), official_texts()
    close(texts, ARRAYS["text.embed"], 1e-5)
    for medium in ("video", "image"):
        pooled, embedded = pooled_and_embedded(params, ARRAYS[medium])
        close(pooled, ARRAYS[f"{medium}.pooled"], 1e-5)
        close(embedded, ARRAYS[f"{medium}.embed"], 1e-5)
    close(embed(params[HEAD], ARRAYS["align_eps.in"]), ARRAYS["align_eps.out"], 1e-5)


@pytest.mark.parametrize("medium", ["video", "image"])
def test_golden_loss_and_gradients_of_the_whole_model(medium):
    told, params = CASES["losses"][medium], official_params(STATE)
    both = jax.jit(jax.value_and_grad(partial(loss_of, identity=told["idx"])))
    loss, gradients = both(params, ARRAYS[medium], official_texts())
    assert loss == pytest.approx(told["loss"], rel=1e-5)
    found = official_state(gradients)
    for name in told["grads"]:
        if "norm1_k.bias" not in name and "k_bias" not in name:  # nothing but rounding
            close(found[name], ARRAYS[f"{medium}.grad.{name}"].reshape(found[name].shape), 5e-5)


def test_golden_training():
    """Six steps of images and videos in turn, from below the floor of the temperature."""
    told = CASES["training"]
    params, texts = official_params(STATE), official_texts()
    params[TEMPERATURE] = np.float32(told["start_temp"])
    trained = {
        HEAD: params[HEAD],
        "pool": params["vision"]["pool"],
        TEMPERATURE: params[TEMPERATURE],
    }
    rates = floored_schedule(
        told["optimizer"]["lr"],
        told["optimizer"]["lr"] * told["min_lr_multi"],
        told["num_training_steps"],
        told["num_warmup_steps"],
    )
    b1, b2 = told["optimizer"]["opt_betas"]
    optimizer = optax.adamw(
        lambda step: jnp.asarray(rates, jnp.float32)[step],
        *(b1, b2, 1e-8),
        weight_decay=told["optimizer"]["weight_decay"],
        mask=decay_mask,
    )
    objective = make_objective(clip_config())
    update = jax.jit(optimizer.update)
    state = optimizer.init(trained)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(trained, clips):
        vision = params["vision"] | {"pool": trained["pool"]}
        return loss_of(trained | {"vision": vision}, clips, texts, range(4))

    for number, step in enumerate(told["steps"]):
        assert rates[number] == pytest.approx(step["lr"])
        trained = objective.constrained(trained)
        assert trained[TEMPERATURE] == pytest.approx(step["temp_clamped"], rel=1e-5)
        value, gradients = loss_and_gradients(trained, ARRAYS[f"train.{number}.x"])
        assert value == pytest.approx(step["loss"], rel=2e-4)
        updates, state = update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
    found = official_state(
        params | trained | {"vision": params["vision"] | {"pool": trained["pool"]}}
    )
    for key in ARRAYS.files:
        name = key.removeprefix("train.final.")
        if key != name and name not in told["do_not_compare"]:
            expected = ARRAYS[key].reshape(found[name].shape)
            np.testing.assert_allclose(found[name], expected, atol=3e-4, err_msg=name)


OPTIMIZER = json.loads((GOLDEN / "clip/optim_cases.json").read_text())


@pytest.mark.parametrize(
    "case", OPTIMIZER["schedules"], ids=lambda case: case["num_training_steps"]
)
def test_golden_learning_rates(case):
    least = case["base_lr"] * case["min_lr_multi"]
    steps, warmup = case["num_training_steps"], case["num_warmup_steps"]
    rates = floored_schedule(case["base_lr"], least, steps, warmup)
    np.testing.assert_allclose(rates, case["lr_of_step"], rtol=1e-6, atol=1e-12)


def test_golden_weight_decay():
    """Decayed are the kernels of pooling and head, as in the official groups of B14."""
    config = clip_config(train__freeze="backbone", clip__train_text=False)
    masks = jax.tree_util.tree_leaves_with_path(
        decay_mask({n: x for n, x in abstract_params(config).items() if n in (HEAD, "pool")})
    )
    decayed = {jax.tree_util.keystr(path, simple=True, separator=".") for path, own in masks if own}
    assert decayed == {f"pool.{name}.kernel" for name in ("q", "k", "v", "proj")} | {
        f"{HEAD}.proj.kernel"
    }
    for sizes in OPTIMIZER["param_groups"].values():
        (group,) = (one for one in sizes["groups"] if one["weight_decay"])
        assert len(group["params"]) == len(decayed)


def test_golden_zero_shot_classes_end_to_end():
    """Texts of classes and clips through the tiny model, to the official similarities."""
    told = json.loads((GOLDEN / "clip/zeroshot_cases.json").read_text())
    arrays = np.load(GOLDEN / "clip/zeroshot_cases.npz")
    texts = zero_shot.texts_of_classes(told["class_order"])
    vectors = official_texts(texts)
    close(vectors, arrays["e2e.text_embed"], 1e-5)
    _, videos = pooled_and_embedded(official_params(STATE), arrays["e2e.clips_times8"] / 8)
    close(videos, arrays["e2e.video_embed"], 1e-5)
    scores = zero_shot.class_scores(np.asarray(videos), np.asarray(vectors), told["num_prompts"])
    close(scores, arrays["e2e.sim_v2t"], 1e-5)
