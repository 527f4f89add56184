"""Our parameter tree <-> the names, shapes and layouts of the official PyTorch code.

`LEAVES` says it all: one row a tensor. The official state is flat, its blocks, pooling heads,
classifiers and align projectors numbered in the name; ours is a nested dict in which each of
these is stacked on a leading axis. Needs numpy only; any dtype passes through untouched.

Official names: facts of the released files, checked against tests/golden/full_manifest.json.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fluxvit_jax.errors import UserError

PATCH_SHAPE = (3, 1, 14, 14)  # channels, frames, height, width of a patch in the official kernel
STACKED = {  # our branch: the official prefix that a number follows
    "blocks": "blocks",
    "pool": "clip_projector",
    "heads": "head",
    "align": "final_clip_decoder_for_projs",
}
NAMED_AT_MOST = 5  # tensors of one kind listed in an error


class Layout(NamedTuple):
    """How one tensor is laid out here and there; each function is the other's inverse."""

    to_ours: Callable[[np.ndarray, int], np.ndarray]  # (official tensor, attention heads)
    to_official: Callable[[np.ndarray], np.ndarray]


def _split_qkv(weight: np.ndarray, heads: int) -> np.ndarray:
    """[3C, C] -> [C, 3, heads, head_dim]."""
    width = weight.shape[1]
    return weight.T.reshape(width, 3, heads, width // heads)


SAME = Layout(lambda x, _: x, lambda x: x)
LINEAR = Layout(lambda x, _: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CLS = Layout(lambda x, _: x.reshape(-1), lambda x: x.reshape(1, 1, -1))
POSITIONS = Layout(lambda x, _: x[0], lambda x: x[None])
DEPTHWISE = Layout(lambda x, _: x.reshape(-1), lambda x: x.reshape(-1, 1, 1, 1, 1))  # 1x1x1 kernel
QKV = Layout(_split_qkv, lambda x: x.reshape(x.shape[0], -1).T)
PATCH = Layout(  # [C, 3, 1, 14, 14] <-> [588, C], the 588 in the order h, w, c
    lambda x, _: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(1, *PATCH_SHAPE[2:], 3, x.shape[-1]).transpose(4, 3, 0, 1, 2),
)


class Leaf(NamedTuple):
    """One tensor: our path, the official name (`{}` is the number in the stack) and shape.

    The shape is in symbols that the state itself binds: C width, L positions with CLS, M hidden
    width of the MLP, E width after pooling, K classes; (3, "C") is 3 times C.
    """

    path: str
    name: str
    shape: tuple
    layout: Layout = SAME

    @property
    def branch(self) -> str:
        return self.path.split(".")[0]


def _affine(path: str, name: str, width: str) -> list[Leaf]:
    return [
        Leaf(f"{path}.scale", f"{name}.weight", (width,)),
        Leaf(f"{path}.bias", f"{name}.bias", (width,)),
    ]


def _linear(path: str, name: str, inputs: str, outputs: str) -> list[Leaf]:
    return [
        Leaf(f"{path}.kernel", f"{name}.weight", (outputs, inputs), LINEAR),
        Leaf(f"{path}.bias", f"{name}.bias", (outputs,)),
    ]


def _depthwise(path: str, name: str) -> list[Leaf]:
    return [
        Leaf(f"{path}.scale", f"{name}.depthwise_conv.weight", ("C", 1, 1, 1, 1), DEPTHWISE),
        Leaf(f"{path}.bias", f"{name}.depthwise_conv.bias", ("C",)),
    ]


def _pooling_input(letter: str) -> list[Leaf]:
    """Norm and projection of the queries, keys or values of a pooling head."""
    attention = "clip_projector.{}.cross_attn"
    return [
        *_affine(f"pool.norm_{letter}", f"clip_projector.{{}}.norm1_{letter}", "C"),
        Leaf(f"pool.{letter}.kernel", f"{attention}.{letter}.weight", ("C", "C"), LINEAR),
        Leaf(f"pool.{letter}.bias", f"{attention}.{letter}_bias", ("C",)),
    ]


LEAVES = (
    Leaf("cls_token", "cls_token", (1, 1, "C"), CLS),
    Leaf("pos_embed", "pos_embed", (1, "L", "C"), POSITIONS),
    *_depthwise("gpe", "gpe_proj"),
    Leaf("patch_embed.norm_before.scale", "patch_embed.norm_before.weight", (588,)),
    Leaf("patch_embed.proj.kernel", "patch_embed.proj.weight", ("C", *PATCH_SHAPE), PATCH),
    Leaf("patch_embed.proj.bias", "patch_embed.proj.bias", ("C",)),
    Leaf("patch_embed.norm.scale", "patch_embed.norm.weight", ("C",)),
    Leaf("blocks.norm1.scale", "blocks.{}.norm1.weight", ("C",)),
    Leaf("blocks.attn.qkv.kernel", "blocks.{}.attn.qkv.weight", ((3, "C"), "C"), QKV),
    Leaf("blocks.attn.q_norm.scale", "blocks.{}.attn.q_norm.weight", ("C",)),
    Leaf("blocks.attn.k_norm.scale", "blocks.{}.attn.k_norm.weight", ("C",)),
    *_depthwise("blocks.attn.lpe", "blocks.{}.attn.lpe"),
    *_linear("blocks.attn.proj", "blocks.{}.attn.proj", "C", "C"),
    Leaf("blocks.ls1.gamma", "blocks.{}.ls1.gamma", ("C",)),
    Leaf("blocks.norm2.scale", "blocks.{}.norm2.weight", ("C",)),
    *_linear("blocks.mlp.fc1", "blocks.{}.mlp.fc1", "C", "M"),
    *_linear("blocks.mlp.fc2", "blocks.{}.mlp.fc2", "M", "C"),
    Leaf("blocks.ls2.gamma", "blocks.{}.ls2.gamma", ("C",)),
    *_pooling_input("q"),
    *_pooling_input("k"),
    *_pooling_input("v"),
    *_linear("pool.proj", "clip_projector.{}.cross_attn.proj", "C", "E"),
    *_affine("fc_norm", "fc_norm", "E"),
    *_linear("heads", "head.{}", "E", "K"),
    *_linear("align.head", "final_clip_decoder_for_projs.{}.head", "E", "E"),
    *_affine("align.norm", "final_clip_decoder_for_projs.{}.norm", "E"),
)


def from_official(state: Mapping[str, np.ndarray], heads: int) -> dict[str, Any]:
    """The official state (prefixes already removed) as our nested parameter tree.

    Args:
        state: PyTorch name -> array. Depth, widths, classes and the number of budgets follow
            from it.
        heads: attention heads of a block; the weights do not tell.

    Raises:
        UserError: a tensor is missing, unexpected or of the wrong shape (all are counted, the
            first few named), or `heads` does not divide the width.
    """
    check(state)
    counts = _stack_counts(state)
    width = state["cls_token"].shape[-1]
    if heads < 1 or width % heads:
        raise UserError(f"the weights' width {width} cannot be split into {heads} attention heads")
    tree: dict[str, Any] = {}
    for leaf in LEAVES:
        tensors = [
            leaf.layout.to_ours(np.asarray(state[name]), heads) for name in _names(leaf, counts)
        ]
        stacked = leaf.branch in STACKED
        insert(tree, leaf.path, np.stack(tensors) if stacked else tensors[0].copy())
    return tree


def check(state: Mapping[str, np.ndarray]) -> None:
    """Raises UserError unless exactly the tensors of `LEAVES` are there, in shapes that agree."""
    counts = _stack_counts(state)
    shapes = {name: leaf.shape for leaf in LEAVES for name in _names(leaf, counts)}
    present = [name for name in shapes if name in state]
    sizes = _bind({name: (shapes[name], state[name].shape) for name in present})
    wrong = []
    for name in present:
        expected = tuple(_size(symbol, sizes) for symbol in shapes[name])
        if tuple(state[name].shape) != expected:
            wrong.append(f"{name} {tuple(state[name].shape)} instead of {expected}")
    _refuse({"missing": missing(state), "unexpected": unexpected(state), "wrong shape": wrong})


def missing(state: Mapping[str, np.ndarray]) -> list[str]:
    """The official names that a state lacks."""
    counts = _stack_counts(state)
    return [name for leaf in LEAVES for name in _names(leaf, counts) if name not in state]


def unexpected(state: Mapping[str, np.ndarray]) -> list[str]:
    """The names in a state that are none of a FluxViT's."""
    counts = _stack_counts(state)
    known = {name for leaf in LEAVES for name in _names(leaf, counts)}
    return [name for name in state if name not in known]


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our nested parameter tree as the official flat state, in C order.

    Raises:
        UserError: as `from_official`.
    """
    ours = dict(flatten(params))
    _refuse(
        {"missing": [x.path for x in LEAVES if x.path not in ours], "unexpected": _unknown(ours)}
    )
    counts = {leaf.branch: len(ours[leaf.path]) for leaf in LEAVES if leaf.branch in STACKED}
    state, wrong = {}, []
    for leaf in LEAVES:
        tensor = np.asarray(ours[leaf.path])
        names = _names(leaf, counts)
        slices = tensor if leaf.branch in STACKED else tensor[None]
        try:
            tensors = [np.ascontiguousarray(leaf.layout.to_official(x)) for x in slices]
            state |= dict(zip(names, tensors, strict=True))
        except (ValueError, IndexError):
            wrong.append(f"{leaf.path} {tensor.shape}")
    _refuse({"wrong shape": wrong})
    check(state)
    return state


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("blocks.attn.proj.kernel", array) and so on, of a nested parameter tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Puts one item of `flatten` into a tree, making the branches that it needs."""
    *branches, last = path.split(".")
    for branch in branches:
        tree = tree.setdefault(branch, {})
    tree[last] = value


def _unknown(ours: Mapping[str, Any]) -> list[str]:
    known = {leaf.path for leaf in LEAVES}
    return [path for path in ours if path not in known]


def _names(leaf: Leaf, counts: Mapping[str, int]) -> list[str]:
    """The official names of a leaf: one, or one for each member of its stack."""
    if leaf.branch not in STACKED:
        return [leaf.name]
    return [leaf.name.format(i) for i in range(counts[leaf.branch])]


def _stack_counts(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many blocks, pooling heads, classifiers and align projectors the names speak of."""
    found = {branch: 0 for branch in STACKED}
    for branch, prefix in STACKED.items():
        for name in state:
            if number := re.match(rf"{prefix}\.(\d+)\.", name):
                found[branch] = max(found[branch], int(number[1]) + 1)
    budgets = max(found["pool"], found["heads"], found["align"] + 1, 2)
    # Every budget has a pooling head and a classifier; all but the largest are aligned to that.
    return {
        "blocks": max(found["blocks"], 1),
        "pool": budgets,
        "heads": budgets,
        "align": budgets - 1,
    }


def _bind(shapes: Mapping[str, tuple[tuple, tuple]]) -> dict[str, int]:
    """The size of each symbol, by majority: one odd tensor is reported, not believed."""
    votes: dict[str, Counter] = {}
    for symbols, shape in shapes.values():
        if len(symbols) == len(shape):
            for symbol, size in zip(symbols, shape, strict=True):
                if isinstance(symbol, str):
                    votes.setdefault(symbol, Counter())[size] += 1
    return {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}


def _size(symbol: int | str | tuple[int, str], sizes: Mapping[str, int]) -> int | str:
    if isinstance(symbol, int):
        return symbol
    if isinstance(symbol, str):
        return sizes.get(symbol, symbol)
    times, letter = symbol
    return times * sizes[letter] if letter in sizes else f"{times}{letter}"


def _refuse(faults: Mapping[str, list[str]]) -> None:
    if described := describe_faults(faults):
        raise UserError(f"these are not the weights of a FluxViT; {described}")


def describe_faults(faults: Mapping[str, list[str]]) -> str:
    """Kind of fault -> tensors as one line, the first few of each kind named; "" without any."""
    parts = []
    for kind, tensors in faults.items():
        if tensors:
            more = f" and {len(tensors) - NAMED_AT_MOST} more" * (len(tensors) > NAMED_AT_MOST)
            parts.append(f"{kind}: {', '.join(tensors[:NAMED_AT_MOST])}{more}")
    return "; ".join(parts)
