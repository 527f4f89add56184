"""The trained and the frozen part of a network's parameters (`train.freeze`).

Frozen is always what comes first in the network, so no gradient has to pass through it: embeddings,
then blocks, then pooling.
"""

from dataclasses import dataclass
from typing import Any

import jax

Tree = dict[str, Any]

EMBEDDINGS = ("cls_token", "pos_embed", "gpe", "patch_embed")


@dataclass(frozen=True, slots=True)
class Freezing:
    """The frozen part of a tree of parameters, or of a tree like it; by default none of it.

    Attributes:
        names: top-level parameters that are frozen as a whole.
        blocks: the number of first blocks that are frozen while the others are trained. Leaves of
            stacked blocks, [depth, ...], are then cut after that many.
    """

    names: tuple[str, ...] = ()
    blocks: int = 0

    def trained(self, params: Tree) -> Tree:
        """The trained part: leaves [depth - blocks, ...] of the blocks."""
        part = {name: tree for name, tree in params.items() if name not in self.names}
        if self.blocks:
            part["blocks"] = jax.tree.map(lambda x: x[self.blocks :], part["blocks"])
        return part

    def frozen(self, params: Tree) -> Tree:
        """The frozen part: leaves [blocks, ...] of the blocks."""
        part = {name: tree for name, tree in params.items() if name in self.names}
        if self.blocks:
            part["blocks"] = jax.tree.map(lambda x: x[: self.blocks], params["blocks"])
        return part

    def replaced(self, params: Tree, trained: Tree) -> Tree:
        """All parameters, with another trained part."""
        whole = params | trained
        if self.blocks:
            whole["blocks"] = jax.tree.map(
                lambda x, new: x.at[self.blocks :].set(new), params["blocks"], trained["blocks"]
            )
        return whole


def freezing_of(freeze: str, depth: int) -> Freezing:
    """What a value of `train.freeze` freezes in a network of `depth` blocks."""
    if freeze == "none":
        return Freezing()
    if freeze in ("all_but_head", "all"):
        head = ("heads",) if freeze == "all" else ()
        return Freezing((*EMBEDDINGS, "blocks", "pool", "fc_norm", "align", *head))
    if freeze == "backbone" or int(freeze) == depth:
        return Freezing((*EMBEDDINGS, "blocks"))
    return Freezing(EMBEDDINGS, int(freeze))
