"""Partition rules: regular expression of a parameter's path -> PartitionSpec.

Every kernel is split over `fsdp` along its width axis, and gathered one block at a time. Over
`tensor`, attention is split by heads and the MLP by hidden units: a device's share of a block's
first product is the input of its share of the second, so only the results of the second are
summed. Vectors are replicated, because they are small, except those of hidden units.

Optimizer state and moving averages are split like their parameter: a rule matches the end of a
path.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxvit_jax.errors import UserError

Tree = Any
Rules = tuple[tuple[str, P], ...]

# The first rule that matches the end of a path applies. Blocks, pooling heads, classifiers and
# projectors are stacked; that first axis is never split.
RULES = (
    ("pos_embed", P(None, "fsdp")),  # [1 + T H W, C]
    ("patch_embed/proj/kernel", P(None, "fsdp")),  # [588, C]
    ("attn/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # [depth, C, 3, heads, C / heads]
    ("attn/proj/kernel", P(None, "tensor", "fsdp")),  # [depth, C, C], heads first
    ("mlp/fc1/kernel", P(None, "fsdp", "tensor")),  # [depth, C, 4 C]
    ("mlp/fc1/bias", P(None, "tensor")),  # [depth, 4 C]
    ("mlp/fc2/kernel", P(None, "tensor", "fsdp")),  # [depth, 4 C, C]
    ("pool/(q|k|v)/kernel", P(None, "fsdp", "tensor")),  # [heads, C, C]
    ("pool/(q|k|v)/bias", P(None, "tensor")),  # [heads, C]
    ("pool/proj/kernel", P(None, "tensor", "fsdp")),  # [heads, C, pool width]
    ("heads/kernel", P(None, "fsdp", None)),  # [heads, pool width, classes]
    ("align/head/kernel", P(None, "fsdp", None)),  # [projectors, pool width, pool width]
    ("(scale|bias|gamma|cls_token)", P()),
    ("(count|step|bad_clips)", P()),  # of the training state
)


def spec(path: str, rules: Rules = ()) -> P:
    """PartitionSpec of a tensor from its path, such as "opt_state/1/mu/blocks/mlp/fc1/kernel".

    rules: of an objective, which go before `RULES`.

    Raises ValueError for a path that no rule matches, so that none is forgotten.
    """
    for pattern, partition in (*rules, *RULES):
        if re.search(f"(^|/){pattern}$", path):
            return partition
    raise ValueError(f"no rule says where {path} lies on the mesh")


def specs(tree: Tree, rules: Rules = ()) -> Tree:
    """PartitionSpecs of the leaves of parameters or of a training state."""
    return jax.tree_util.tree_map_with_path(lambda path, _: spec(_name(path), rules), tree)


def shardings(tree: Tree, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> Tree:
    """NamedShardings of the leaves of parameters or of a training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, spec(_name(path), rules)), tree
    )


def check(params: Tree, mesh: Mesh | AbstractMesh, network: str, rules: Rules = ()) -> None:
    """Raises UserError if a side of the mesh does not divide an axis that is split over it.

    params: arrays or their shapes; network: their name for the message.
    """
    leaves = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for name, leaf in leaves:
        # Checked before all other tensors: users know the number of heads.
        if name.endswith("attn/qkv/kernel") and leaf.shape[3] % mesh.shape["tensor"]:
            raise UserError(
                f"config.parallel.mesh.tensor: {mesh.shape['tensor']} does not divide the "
                f"{leaf.shape[3]} heads of {network}; {_nearest(leaf.shape[3], 'tensor', mesh)}"
            )
    for name, leaf in leaves:
        for size, axis in zip(leaf.shape, spec(name, rules), strict=False):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"config.parallel.mesh.{axis}: {mesh.shape[axis]} does not divide {size} of "
                    f"{name} in {network}; {_nearest(size, axis, mesh)}"
                )


def _nearest(size: int, axis: str, mesh: Mesh | AbstractMesh) -> str:
    side = math.gcd(size, mesh.shape[axis])
    return f"{axis}={side} does"


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
