"""Which parameter is cut where: rules from its path to a PartitionSpec.

Along `fsdp` every kernel is cut on the side of the width, which all devices gather a block at a
time. Along `tensor` attention is cut by heads and the MLP by hidden units, so that what a device
has of a block's first product is what it needs for the second, and only the second's results are
added up. Vectors but for those of hidden units are whole everywhere: they are small.

What the optimiser keeps of a parameter, and its moving average, lie as the parameter does: a rule
looks at the end of a path.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fluxvit_jax.errors import UserError

Tree = Any

# The first rule that matches the end of a path holds. Blocks, pooling heads, classifiers and
# projectors are stacked: their first axis is never cut.
RULES = (
    ("internvideo2/patch_embed/kernel", P(None, "fsdp")),  # [588, C]
    ("internvideo2/pool/(q|k|v)/kernel", P("fsdp", "tensor")),  # [C, C]
    ("internvideo2/pool/(q|k|v)/bias", P("tensor")),  # [C]
    ("internvideo2/pool/proj/kernel", P("tensor", "fsdp")),  # [C, pool width]
    ("decoders/tokens/fc[12]/kernel", P(None, "fsdp", None)),  # [pairs of layers, C, C or D]
    ("decoders/pooled/fc[12]/kernel", P("fsdp", None)),  # [pool width, pool width]
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


def spec(path: str) -> P:
    """Where a tensor lies, by its path: "opt_state/1/mu/blocks/mlp/fc1/kernel".

    Raises ValueError for one that no rule names, so that none is forgotten.
    """
    for pattern, found in RULES:
        if re.search(f"(^|/){pattern}$", path):
            return found
    raise ValueError(f"no rule says where {path} lies on the mesh")


def specs(tree: Tree) -> Tree:
    """The PartitionSpec of each leaf of parameters or of a training state."""
    return jax.tree_util.tree_map_with_path(lambda path, _: spec(_name(path)), tree)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The same as shardings of a mesh."""
    return jax.tree.map(
        lambda own: NamedSharding(mesh, own), specs(tree), is_leaf=lambda x: isinstance(x, P)
    )


def check(config: ConfigDict, params: Tree, mesh: Mesh, teacher: str = "") -> None:
    """Raises UserError if a side of the mesh does not divide what is cut along it.

    params: arrays or their shapes, of the network that is trained, or of a teacher of the kind
    that `RULES` names.
    """
    network = config.distill.network if teacher else f"FluxViT-{config.model.variant}"

    def check_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> None:
        name = f"{teacher}/{_name(path)}"
        for size, axis in zip(leaf.shape, spec(name), strict=False):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"config.parallel.mesh.{axis}: {mesh.shape[axis]} does not divide {size} of "
                    f"{_name(path)} in {network}; {_nearest(size, axis, mesh)}"
                )

    _check_heads(params, mesh, network)
    jax.tree_util.tree_map_with_path(check_leaf, params)


def _check_heads(params: Tree, mesh: Mesh, network: str) -> None:
    """Said before any tensor: the number of heads is what a user knows of."""
    heads, tensor = params["blocks"]["attn"]["qkv"]["kernel"].shape[3], mesh.shape["tensor"]
    if heads % tensor:
        raise UserError(
            f"config.parallel.mesh.tensor: {tensor} does not divide the {heads} heads of "
            f"{network}; {_nearest(heads, 'tensor', mesh)}"
        )


def _nearest(size: int, axis: str, mesh: Mesh) -> str:
    side = math.gcd(size, mesh.shape[axis])
    return f"{axis}={side} does"


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
