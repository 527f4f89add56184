"""The plain PyTorch network against official numbers, the JAX network, and its own exports."""

import copy
import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch, which the package does not")

from fluxvit_jax import grids  # noqa: E402
from fluxvit_jax.config.variants import VARIANTS  # noqa: E402
from fluxvit_jax.convert import official_names, torch_fluxvit  # noqa: E402
from fluxvit_jax.convert.torch_fluxvit import FluxViT  # noqa: E402
from fluxvit_jax.models import fluxvit, token_selection  # noqa: E402
from fluxvit_jax.models.token_selection import GridLimits, Selection  # noqa: E402
from tests import limited  # noqa: E402
from tests.models import golden  # noqa: E402
from tests.models.test_fluxvit_golden import GOOD_CASES, budget_of, close, data  # noqa: E402
from tests.models.test_token_selection import plain_groups, plain_shares  # noqa: E402

PATCH = golden.PATCH
# An oblong native grid, so that no axis can stand in for another.
CONFIG = replace(golden.TINY, frames=6, rows=3, columns=5, rounding="exact")
CAPACITY, LIMITS = 256, GridLimits(16, 6, 8, 1)  # of the cells below


def fields(config: fluxvit.FluxViTConfig, **changes) -> dict:
    """What the PyTorch model takes of a config."""
    known = FluxViT.__init__.__annotations__
    return {name: value for name, value in asdict(config).items() if name in known} | changes


def tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


@cache
def random_state() -> dict[str, np.ndarray]:
    """Weights for CONFIG under the official names, large enough for every one to matter."""
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in golden.arrays("tiny_state").items()}
    shapes["pos_embed"] = (1, 1 + CONFIG.native_tokens, CONFIG.width)
    state = {}
    for name, shape in sorted(shapes.items()):
        values = rng.standard_normal(shape)
        if name in ("cls_token", "pos_embed"):
            values *= 0.5
        elif name.endswith((".bias", "_bias")):
            values *= 0.1
        elif len(shape) == 2 or name == "patch_embed.proj.weight":
            values /= math.sqrt(math.prod(shape[1:]))
        else:  # norms, LayerScale, GPE, LPE
            values = 1 + 0.2 * values
        state[name] = values.astype(np.float32)
    return state


@cache
def random_params() -> dict:
    return official_names.from_official(random_state(), CONFIG.heads)


def torch_model(config: fluxvit.FluxViTConfig = CONFIG, **changes) -> FluxViT:
    model = FluxViT(**fields(config, **changes))
    model.load_state_dict(tensors(random_state()), strict=True)
    return model.eval()


@cache
def structure(config: fluxvit.FluxViTConfig):
    return fluxvit.graphdef(config)


def jax_model(config: fluxvit.FluxViTConfig) -> fluxvit.FluxViT:
    return fluxvit.from_params(structure(config), random_params())


def make_video(*shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels, uint8 [..., T, 14 H, 14 W, 3] for a shape [..., T, H, W]."""
    *front, rows, columns = shape
    size = (*front, rows * PATCH, columns * PATCH, 3)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def to_patches(video: np.ndarray) -> np.ndarray:
    """[B, T, Y, X, 3] -> [B, P, 588], as the JAX network takes them."""
    return golden.patches_of(video.transpose(0, 4, 1, 2, 3))[0]


# ---------------------------------------------------------------------------------------------
# Names, shapes and numbers of the official code


@pytest.mark.parametrize("name, variant", [("small", "S"), ("base", "B")])
def test_state_of_the_official_models(name, variant):
    keys = golden.manifest("full_manifest")[f"fluxvit_{name}_patch14"]["keys"]
    size = VARIANTS[variant]
    side = size.resolution // PATCH
    with torch.device("meta"):
        model = FluxViT(
            width=size.width, depth=size.depth, heads=size.heads,
            frames=size.frames, rows=side, columns=side, classes=400,
        )  # fmt: skip
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == keys


@cache
def official_model() -> FluxViT:
    model = FluxViT(**fields(golden.TINY))
    model.load_state_dict(tensors(golden.arrays("tiny_state")), strict=True)
    return model.eval()


@pytest.mark.parametrize("case", GOOD_CASES, ids=lambda case: case["id"])
def test_official_numbers(case):
    model, options = official_model(), case["kwargs"]
    video = torch.from_numpy(data(f"{case['video']}.x")).permute(0, 2, 3, 4, 1)
    with torch.no_grad():
        logits, pooled = model(video, budget_of(case), options["output_head"], normalized=True)
        projected = model.project(pooled, options["align_proj"])
        kept = model.select(video, budget_of(case), normalized=True)
    close(logits, data(case["outputs"]["logits"]))
    close(pooled, data(case["outputs"]["x_final"]))
    close(projected, data(case["outputs"]["projected"]))
    if "mask" in case["outputs"]:
        np.testing.assert_array_equal(~kept.flatten(1), data(case["outputs"]["mask"]))


# ---------------------------------------------------------------------------------------------
# The JAX network


class Cell(NamedTuple):
    sides: tuple[int, int, int]  # frames, rows, columns
    tokens: int
    head: int = 0
    changes: dict = {}  # noqa: RUF012  of CONFIG

    @property
    def id(self) -> str:
        words = [*map(str, self.changes.values()), f"head{self.head}"]
        return "-".join(["x".join(map(str, self.sides)), str(self.tokens), *words])


L1, L2, NONE, OFFICIAL = (
    {"selector": "dynamic_l1"},
    {"selector": "dynamic_l2"},
    {"selector": "none"},
    {"rounding": "official"},
)
INSIDE, TANH = {"cls": "inside"}, {"gelu": "tanh"}
CELLS = [
    Cell((1, 3, 5), 7),
    Cell((1, 4, 4), 16, 1, TANH),
    Cell((2, 4, 4), 21, 2),
    Cell((2, 1, 7), 5, 0, L1),
    Cell((3, 2, 5), 16, 1, INSIDE),
    Cell((3, 3, 3), 13, 2, OFFICIAL),
    Cell((4, 4, 4), 33),
    Cell((4, 2, 6), 30, 1, TANH | OFFICIAL),
    Cell((4, 1, 1), 1, 2, INSIDE),
    Cell((5, 3, 4), 37),
    Cell((5, 1, 2), 7, 1, OFFICIAL),
    Cell((5, 4, 3), 31, 2, INSIDE | TANH),
    Cell((6, 3, 5), 41),
    Cell((6, 3, 5), 90, 1),
    Cell((7, 5, 3), 52, 2, L2),
    Cell((7, 2, 3), 16, 0, {"groups": 3}),
    Cell((8, 4, 4), 40, 1, TANH),
    Cell((8, 4, 4), 77, 2, OFFICIAL),
    Cell((8, 2, 8), 3),
    Cell((9, 2, 5), 44, 1, INSIDE | OFFICIAL),
    Cell((11, 4, 3), 61, 2, {"groups": 5}),
    Cell((12, 4, 5), 100),
    Cell((12, 6, 3), 77, 1, L1 | INSIDE),
    Cell((12, 3, 4), 50, 2, NONE),
    Cell((13, 3, 3), 64, 0, OFFICIAL | L2),
    Cell((16, 4, 4), 128, 1),
    Cell((16, 2, 8), 300, 2),
]


class Reference(NamedTuple):
    """What the JAX network makes of two clips at a cell."""

    kept: np.ndarray  # bool [B, T, H, W]
    outputs: np.ndarray  # logits and clip vectors, [B, K + E]
    patches: np.ndarray  # the normalised video, [B, P, 588]
    gradient: np.ndarray  # of (outputs * WEIGHTS).sum() with respect to `patches`


OUTPUTS = CONFIG.classes + CONFIG.pool_width
WEIGHTS = np.random.default_rng(1).standard_normal((2, OUTPUTS)).astype(np.float32)


def jax_reference(video: np.ndarray, cell: Cell) -> Reference:
    """Padded to CAPACITY, so that two programs (one a GELU) serve all cells."""
    config, total = replace(CONFIG, **cell.changes), math.prod(cell.sides)
    patches = fluxvit.normalize(jnp.asarray(to_patches(video)))
    patches = jnp.pad(patches, ((0, 0), (0, CAPACITY - total), (0, 0)))
    grid = jnp.tile(jnp.asarray(cell.sides, jnp.int32), (2, 1))
    kept = jax_select(patches, grid, config, cell.tokens)
    mask = np.zeros((2, total), bool)
    for clip in range(2):
        mask[clip, kept.token_index[clip][kept.valid[clip]]] = True
    outputs, gradient = jax_outputs(patches, grid, kept, cell.head, config.gelu)
    return Reference(
        mask.reshape(2, *cell.sides),
        *map(np.asarray, (outputs, patches[:, :total], gradient[:, :total])),
    )


def jax_select(patches, grid, config, tokens) -> Selection:
    """N = CAPACITY places. Not compiled as a whole: that takes longer than to run it once."""
    kept = jax_model(config).select(patches, grid, tokens, LIMITS)
    valid = jnp.ones_like(kept.token_index, bool) if kept.valid is None else kept.valid
    room = ((0, 0), (0, CAPACITY - kept.token_index.shape[1]))
    return Selection(jnp.pad(kept.token_index, room), jnp.pad(valid, room))


@partial(jax.jit, static_argnames="gelu")
def jax_outputs(patches, grid, kept, head, gelu):
    def weighted(patches):
        model = jax_model(replace(CONFIG, gelu=gelu))
        position = model.position(grid, kept.token_index, LIMITS)
        tokens = model.encode(fluxvit.gather_tokens(patches, kept), position, kept)
        pooled = [model.pool_tokens(tokens, kept, head) for head in range(3)]
        logits = [model.classify(vector, head) for head, vector in enumerate(pooled)]
        outputs = jnp.concatenate([jnp.stack(logits), jnp.stack(pooled)], axis=-1)[head]
        return jnp.sum(outputs * WEIGHTS), outputs

    gradient, outputs = jax.grad(weighted, has_aux=True)(patches)
    return outputs, gradient


def from_patches(patches: np.ndarray, cell: Cell) -> torch.Tensor:
    """The inverse of `to_patches`."""
    cut = patches.reshape(2, *cell.sides, PATCH, PATCH, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    return torch.tensor(cut).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_equals_the_jax_network(cell):
    video = make_video(2, *cell.sides, seed=sum(cell.sides))
    reference = jax_reference(video, cell)
    model = torch_model(replace(CONFIG, **cell.changes))

    kept = model.select(torch.from_numpy(video), cell.tokens)
    np.testing.assert_array_equal(kept, reference.kept)

    with torch.no_grad():
        outputs = model(torch.from_numpy(video), cell.tokens, cell.head)
        alone = model(torch.from_numpy(video[1]), cell.tokens, cell.head)
    close(torch.cat(outputs, dim=1), reference.outputs)
    close(torch.cat(alone, dim=1), reference.outputs[1:])

    floats = from_patches(reference.patches, cell).requires_grad_()
    outputs = torch.cat(model(floats, cell.tokens, cell.head, normalized=True), dim=1)
    close(outputs.detach(), reference.outputs)
    (outputs * torch.from_numpy(WEIGHTS)).sum().backward()
    gradient = to_patches(floats.grad.numpy())
    largest = np.abs(reference.gradient).max()
    np.testing.assert_allclose(gradient, reference.gradient, rtol=1e-5, atol=1e-5 * largest)
    np.testing.assert_array_equal(gradient.any(axis=-1), reference.kept.reshape(2, -1))


def test_projectors_equal_those_of_jax():
    pooled = np.random.default_rng(0).standard_normal((2, CONFIG.pool_width), np.float32)
    model, reference = torch_model(), jax_model(CONFIG)
    for projector in range(2):
        with torch.no_grad():
            ours = model.project(torch.from_numpy(pooled), projector)
        close(ours, reference.project(pooled, projector))


# ---------------------------------------------------------------------------------------------
# Budgets: arithmetic, heads, drawn selections


@pytest.mark.parametrize("groups", [0, 3, 5])
def test_shares_of_groups(groups):
    for T in range(1, 24):
        frames = torch_fluxvit.group_frames(T, groups)
        assert frames == [len(group) for group in plain_groups(T, groups)]
        sizes = [3 * count for count in frames]
        for budget in range(3 * T + 1):
            assert torch_fluxvit.shares(sizes, budget) == plain_shares(sizes, budget)


def test_official_counts():
    for groups in (1, 2, 4):
        for places in (1, 3, 40, 77, 100):
            table = token_selection.official_kept_table(places, 300)
            for total in range(1, 301):
                kept = torch_fluxvit.kept_tokens(total, groups, places, "official")
                assert kept == table[groups, total]


def test_official_rounding_of_a_wide_grid():
    """12 x 224 px at 1024 keeps 1020 in the official code."""
    model = torch_model()
    video = torch.from_numpy(make_video(12, 16, 16))
    assert model.select(video, 1024, rounding="official").sum() == 1020
    assert model.select(video, 1024).sum() == 1024


@pytest.mark.parametrize("head_budgets", [(3072, 2048, 1024), (40, 20), (64,)])
def test_the_head_of_the_nearest_budget(head_budgets):
    model = torch_model(head_budgets=head_budgets)
    video = torch.from_numpy(make_video(4, 4, 4))
    for tokens in (1, 28, 29, 40, 64, 1448, 1449, 2508, 2509, 9999):
        assert model.nearest_head(tokens) == grids.nearest_head(tokens, head_budgets)
    with torch.no_grad():
        for tokens, count in ((10, 10), (30, 30), (None, 64)):
            head = grids.nearest_head(count, head_budgets)
            explicit = [model(video, tokens, head=head)[0] for head in range(3)]
            same = [torch.equal(model(video, tokens)[0], logits) for logits in explicit]
            assert same == [other == head for other in range(3)]


def test_drawn_selections():
    video = torch.from_numpy(make_video(2, 5, 3, 4))
    for selector in ("random", "tube"):
        model = torch_model(selector=selector)
        torch.manual_seed(0)
        first, second = model.select(video, 20), model.select(video, 20)
        assert (first.flatten(1).sum(1) == 20).all() and (second.flatten(1).sum(1) == 20).all()
        assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
        assert (first == first[:, :1]).all() == (selector == "tube")


def test_all_tokens_are_a_budget_of_all():
    model, video = torch_model(), torch.from_numpy(make_video(3, 3, 4))
    with torch.no_grad():
        every = model(video, head=1)
        for tokens in (36, 5000):
            for a, b in zip(model(video, tokens, head=1), every, strict=True):
                assert torch.equal(a, b)
        assert not torch.equal(model(video, 35, head=1)[0], every[0])


def test_bfloat16():
    model, video = torch_model(), torch.from_numpy(make_video(4, 4, 4))
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        (logits, _), (rounded, _) = model(video), low(video)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - logits).abs().max() < 0.1 * logits.abs().max()


def test_every_tensor_is_on_the_device_of_the_model():
    with torch.device("meta"):
        model = FluxViT(**fields(CONFIG))
    for dtype in (torch.uint8, torch.float32):
        video = torch.empty(2, 5, 42, 56, 3, dtype=dtype, device="meta")
        normalized = dtype == torch.float32
        logits, pooled = model(video, 20, normalized=normalized)
        assert logits.is_meta and logits.shape == (2, CONFIG.classes)
        assert pooled.is_meta and pooled.shape == (2, CONFIG.pool_width)
        assert model.select(video, 20, normalized=normalized).is_meta


# ---------------------------------------------------------------------------------------------
# Exports


@pytest.mark.parametrize("cell", [CELLS[9], CELLS[16]], ids=lambda cell: cell.id)
def test_onnx(cell, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason="needs what PyTorch exports ONNX with")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    model = torch_model(replace(CONFIG, **cell.changes))
    example, video = (make_video(2, *cell.sides, seed=seed) for seed in range(2))
    options, path = {"tokens": cell.tokens, "head": cell.head}, tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.from_numpy(example[0]),), path, kwargs=options, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    assert [given.name for given in session.get_inputs()] == ["video"]
    reference = jax_reference(video, cell).outputs
    for clip in range(2):
        ours = np.concatenate(session.run(None, {"video": video[clip]}), axis=1)
        with torch.no_grad():
            close(ours, torch.cat(model(torch.from_numpy(video[clip]), **options), dim=1))
        close(ours, reference[clip : clip + 1])


def test_torch_export_round_trip(tmp_path):
    model, options = torch_model(), {"tokens": 33}
    example, video = (torch.from_numpy(make_video(2, 5, 3, 4, seed=seed)) for seed in range(2))
    torch.export.save(torch.export.export(model, (example,), options), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for ours, reference in zip(loaded(video, **options), model(video, **options), strict=True):
            close(ours, reference, 1e-6)


# ---------------------------------------------------------------------------------------------
# Folders and what is refused


def write_folder(folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    from safetensors.torch import save_file

    config = fields(CONFIG, head_budgets=[64, 32], model_type="fluxvit", class_names=["a"])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state or tensors(random_state()), folder / "model.safetensors")
    return folder


def test_from_folder(tmp_path):
    halves = {name: tensor.half() for name, tensor in tensors(random_state()).items()}
    model = FluxViT.from_folder(write_folder(tmp_path, halves))
    assert not model.training and model.head_budgets == (64, 32)
    assert model.state_dict().keys() == halves.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, halves[name].float()), name
    changed = FluxViT.from_folder(tmp_path, cls="inside", selector="none", head_budgets=(7,))
    assert (changed.cls, changed.selector, changed.head_budgets) == ("inside", "none", (7,))
    video = torch.from_numpy(make_video(2, 3, 3))
    assert np.flatnonzero(changed.select(video, 5)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fault", ["Missing", "Unexpected", "size mismatch"])
def test_weights_that_do_not_fit_are_refused(fault, tmp_path):
    state, name = tensors(random_state()), "blocks.1.attn.q_norm.weight"
    if fault == "Missing":
        del state[name]
    elif fault == "Unexpected":
        name = "blocks.1.attn.relative_position"
        state[name] = torch.zeros(3)
    else:
        state[name] = torch.zeros(50)
    with pytest.raises(RuntimeError, match=rf"(?s){fault}.*{name}"):
        FluxViT.from_folder(write_folder(tmp_path, state))


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from torch_fluxvit import FluxViT
with torch.no_grad():
    logits, _ = FluxViT.from_folder(sys.argv[1])(torch.from_numpy(np.load(sys.argv[2])), 33)
packages = {name.split(".")[0] for name in sys.modules}
print(json.dumps([logits.tolist(), sorted(packages & {"fluxvit_jax", "jax", "flax"})]))
"""


def test_the_file_stands_alone(tmp_path):
    folder = write_folder(tmp_path)
    shutil.copy(torch_fluxvit.__file__, folder)
    video = make_video(4, 3, 5)
    np.save(folder / "video.npy", video)
    command = [sys.executable, "-I", "-c", ALONE, str(folder), str(folder / "video.npy")]
    process = limited.run(command, cwd=folder)
    assert process.returncode == 0, process.stderr
    logits, foreign = json.loads(process.stdout)
    assert foreign == []
    with torch.no_grad():
        reference, _ = torch_model(head_budgets=(64, 32))(torch.from_numpy(video), 33)
    close(logits, reference)


@pytest.mark.parametrize(
    "video, message",
    [
        (torch.zeros(4, 57, 56, 3), "57 x 56 pixels .* multiples of 14"),
        (torch.zeros(2, 4, 56, 100, 3), "56 x 100 pixels .* multiples of 14"),
        (torch.zeros(2, 3, 4, 56, 56), r"shape is \(2, 3, 4, 56, 56\)"),
        (torch.zeros(56, 56, 3), r"shape is \(56, 56, 3\)"),
        (torch.zeros(4, 56, 56, 3, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, 56, 56, 3), "torch.float32, with normalized=False: pass uint8 pixels"),
    ],
)
def test_videos_that_are_refused(video, message):
    model = torch_model()
    for call in (model, partial(model.select, tokens=5)):
        with pytest.raises(ValueError, match=message) as error:
            call(video)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_only_floats_are_normalized(dtype):
    with pytest.raises(ValueError, match=f"{dtype}, with normalized=True: pass uint8 pixels"):
        torch_model()(torch.zeros(4, 56, 56, 3, dtype=dtype), normalized=True)


def test_words_and_budgets_that_are_refused():
    for field in torch_fluxvit.CHOICES:
        with pytest.raises(ValueError, match=f"{field} is 'new' but must be one of"):
            torch_model(**{field: "new"})
    model, video = torch_model(), torch.from_numpy(make_video(2, 3, 3))
    with pytest.raises(ValueError, match="rounding is 'new' but must be one of"):
        model(video, 5, rounding="new")
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        model(video, 0)
