"""Which parameter is cut where, written out, and that it fits the meshes that it should."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.mesh import AXES, mesh_shape
from fluxvit_jax.errors import UserError
from fluxvit_jax.objectives.flux_umt import FluxUMT
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, check_params_divide
from tests import tiny

VARIANTS = ("S", "B", "L")
# path: spec, shape of S, of B, of L
GOLDEN = {
    "cls_token": (P(), (384,), (768,), (1024,)),
    "pos_embed": (P(None, "fsdp"), (7777, 384), (12801, 768), (12801, 1024)),
    "gpe/scale": (P(), (384,), (768,), (1024,)),
    "gpe/bias": (P(), (384,), (768,), (1024,)),
    "patch_embed/norm_before/scale": (P(), (588,), (588,), (588,)),
    "patch_embed/proj/kernel": (P(None, "fsdp"), (588, 384), (588, 768), (588, 1024)),
    "patch_embed/proj/bias": (P(), (384,), (768,), (1024,)),
    "patch_embed/norm/scale": (P(), (384,), (768,), (1024,)),
    "blocks/norm1/scale": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/attn/qkv/kernel": (
        P(None, "fsdp", None, "tensor", None),
        (12, 384, 3, 6, 64),
        (12, 768, 3, 12, 64),
        (24, 1024, 3, 16, 64),
    ),
    "blocks/attn/q_norm/scale": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/attn/k_norm/scale": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/attn/lpe/scale": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/attn/lpe/bias": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/attn/proj/kernel": (
        P(None, "tensor", "fsdp"),
        (12, 384, 384),
        (12, 768, 768),
        (24, 1024, 1024),
    ),
    "blocks/attn/proj/bias": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/ls1/gamma": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/norm2/scale": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/mlp/fc1/kernel": (
        P(None, "fsdp", "tensor"),
        (12, 384, 1536),
        (12, 768, 3072),
        (24, 1024, 4096),
    ),
    "blocks/mlp/fc1/bias": (P(None, "tensor"), (12, 1536), (12, 3072), (24, 4096)),
    "blocks/mlp/fc2/kernel": (
        P(None, "tensor", "fsdp"),
        (12, 1536, 384),
        (12, 3072, 768),
        (24, 4096, 1024),
    ),
    "blocks/mlp/fc2/bias": (P(), (12, 384), (12, 768), (24, 1024)),
    "blocks/ls2/gamma": (P(), (12, 384), (12, 768), (24, 1024)),
    **{
        f"pool/norm_{name}/{kind}": (P(), (3, 384), (3, 768), (3, 1024))
        for name in "qkv"
        for kind in ("scale", "bias")
    },
    **{
        f"pool/{name}/kernel": (
            P(None, "fsdp", "tensor"),
            (3, 384, 384),
            (3, 768, 768),
            (3, 1024, 1024),
        )
        for name in "qkv"
    },
    **{f"pool/{name}/bias": (P(None, "tensor"), (3, 384), (3, 768), (3, 1024)) for name in "qkv"},
    "pool/proj/kernel": (P(None, "tensor", "fsdp"), (3, 384, 768), (3, 768, 768), (3, 1024, 768)),
    "pool/proj/bias": (P(), (3, 768), (3, 768), (3, 768)),
    "fc_norm/scale": (P(), (768,), (768,), (768,)),
    "fc_norm/bias": (P(), (768,), (768,), (768,)),
    "heads/kernel": (P(None, "fsdp", None), (3, 768, 400), (3, 768, 400), (3, 768, 400)),
    "heads/bias": (P(), (3, 400), (3, 400), (3, 400)),
    "align/head/kernel": (P(None, "fsdp", None), (2, 768, 768), (2, 768, 768), (2, 768, 768)),
    "align/head/bias": (P(), (2, 768), (2, 768), (2, 768)),
    "align/norm/scale": (P(), (2, 768), (2, 768), (2, 768)),
    "align/norm/bias": (P(), (2, 768), (2, 768), (2, 768)),
}


def by_path(tree, is_leaf=None) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_spec(x) -> bool:
    return isinstance(x, P)


def mesh_of(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=VARIANTS)
def test_where_every_parameter_lies(number):
    params = abstract_params(default_config(VARIANTS[number]))
    assert {path: leaf.shape for path, leaf in by_path(params).items()} == {
        path: own[1 + number] for path, own in GOLDEN.items()
    }
    assert by_path(partition_rules.specs(params), is_spec) == {
        p: own[0] for p, own in GOLDEN.items()
    }


def test_the_optimiser_and_the_average_lie_as_the_parameters_do():
    config = default_config("B")
    params = abstract_params(config)
    opt_state = jax.eval_shape(make_optimizer(config, 10, params).init, params)
    state = {"opt_state": opt_state, "ema": params, "step": np.int32(0), "bad_clips": np.int32(0)}
    found = by_path(partition_rules.specs(state), is_spec)
    moments = [path for path in found if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2 * len(GOLDEN)
    for path, own in found.items():
        of_parameter = next((p for p in GOLDEN if path.endswith(f"/{p}")), None)
        assert own == (GOLDEN[of_parameter][0] if of_parameter else P()), path


def test_all_but_a_hundredth_of_the_parameters_is_cut_along_fsdp():
    for number in range(len(VARIANTS)):
        sizes = {path: np.prod(own[1 + number]) for path, own in GOLDEN.items()}
        cut = sum(size for path, size in sizes.items() if "fsdp" in GOLDEN[path][0])
        assert cut > 0.99 * sum(sizes.values())


def test_a_parameter_without_a_rule_is_no_whole_one():
    with pytest.raises(ValueError, match="no rule says where blocks/extra/kernel lies"):
        partition_rules.specs({"blocks": {"extra": {"kernel": np.zeros((3, 4))}}})


@pytest.mark.parametrize(
    ("variant", "sides", "message"),
    [
        ("S", (1, 1, 4), r"mesh.tensor: 4 does not divide the 6 heads of FluxViT-S; tensor=2 does"),
        ("B", (1, 1, 8), r"mesh.tensor: 8 does not divide the 12 heads of .*; tensor=4 does"),
        ("S", (1, 256, 1), r"mesh.fsdp: 256 does not divide 384 of .* in FluxViT-S; fsdp=128 does"),
        ("L", (1, 3, 1), r"mesh.fsdp: 3 does not divide 1024 of .*; fsdp=1 does"),
    ],
)
def test_a_side_that_does_not_divide(variant, sides, message):
    config = default_config(variant)
    with pytest.raises(UserError, match=message):
        check_params_divide(config, mesh_of(*sides))


@pytest.mark.parametrize(
    ("variant", "sides"), [("S", (2, 128, 2)), ("B", (1, 256, 1)), ("L", (4, 16, 16))]
)
def test_sides_that_divide(variant, sides):
    """Every device then holds as much: the parts of a parameter are the whole."""
    config, mesh = default_config(variant), mesh_of(*sides)
    params = abstract_params(config)
    check_params_divide(config, mesh)
    shapes, specs = by_path(params), by_path(partition_rules.specs(params), is_spec)
    assert shapes.keys() == specs.keys()
    cut = {
        path: NamedSharding(mesh, specs[path]).shard_shape(x.shape) for path, x in shapes.items()
    }
    for path, part in cut.items():
        shares = np.prod([mesh.shape[axis] for axis in specs[path] if axis])
        assert np.prod(part) * shares == np.prod(shapes[path].shape), path
    kernel = cut["blocks/mlp/fc1/kernel"]
    assert kernel[1] * sides[1] == shapes["cls_token"].shape[0]
    assert kernel[2] * sides[2] == 4 * shapes["cls_token"].shape[0]


def test_the_side_that_is_left_open_follows():
    config = default_config()
    assert mesh_shape(config, 8) == (8, 1, 1)
    config.parallel.mesh.update(data=2, fsdp=-1, tensor=2)
    assert mesh_shape(config, 8) == (2, 2, 2)
    config.parallel.mesh.fsdp = 2
    assert mesh_shape(config, 8) == (2, 2, 2)
    with pytest.raises(UserError, match=r"data=2 x fsdp=2 x tensor=2 is of 8 devices, .* are 4"):
        mesh_shape(config, 4)
    config.parallel.mesh.update(data=-1, fsdp=1, tensor=3)
    with pytest.raises(UserError, match=r"tensor=3 does not divide the 8 devices .* is 2 would"):
        mesh_shape(config, 8)


def test_a_mesh_that_does_not_divide_the_teacher():
    config = tiny.make_pretraining("", "")
    for sides, message in [
        ((1, 32, 1), r"mesh.fsdp: 32 does not divide 48 of .* in InternVideo2-Ti; fsdp=16 does"),
        ((1, 1, 8), r"mesh.tensor: 8 does not divide the 4 heads of InternVideo2-Ti; tensor=4"),
    ]:
        with pytest.raises(UserError, match=message):
            FluxUMT.abstract_frozen(config, mesh_of(*sides))
    kernel = FluxUMT.abstract_frozen(config, mesh_of(2, 4, 2))["blocks"]["mlp"]["fc1"]["kernel"]
    _, width, hidden = kernel.shape
    assert kernel.sharding.shard_shape(kernel.shape) == (4, width // 4, hidden // 2)
