"""Our parameter tree <-> the names, shapes and layouts of the official PyTorch code.

An `Architecture` says it all, `FLUXVIT`, its teacher `INTERNVIDEO2` or the `DECODERS` that one has
for the other: one row a tensor. The
official state is flat, its blocks, pooling heads, classifiers and align projectors numbered in the
name; ours is a nested dict in which each of these is stacked on a leading axis. Needs numpy only;
any dtype passes through untouched.

Official names: facts of the released files, checked against tests/golden/full_manifest.json and
tests/golden/internvideo2/manifest.json.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fluxvit_jax.errors import UserError

PATCH_SHAPE = (3, 1, 14, 14)  # channels, frames, height, width of a patch in the official kernel
NAMED_AT_MOST = 5  # tensors of one kind listed in an error


class Layout(NamedTuple):
    """How one tensor is laid out here and there; each function is the other's inverse."""

    to_ours: Callable[[np.ndarray, int], np.ndarray]  # (official tensor, attention heads)
    to_official: Callable[[np.ndarray], np.ndarray]


def _split_qkv(weight: np.ndarray, heads: int) -> np.ndarray:
    """[3C, C] -> [C, 3, heads, head_dim]."""
    width = weight.shape[1]
    if heads < 1 or width % heads:
        raise UserError(f"the weights' width {width} cannot be split into {heads} attention heads")
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
    width of the MLP, E width after pooling, K classes, D and F the teacher's C and E; (3, "C") is 3
    times C.
    """

    path: str
    name: str
    shape: tuple
    layout: Layout = SAME

    @property
    def branch(self) -> str:
        return self.path.split(".")[0]


class Architecture(NamedTuple):
    """The tensors of a network.

    name: in errors; stacked: our branches whose members are numbered, and the official prefix that
    the number follows; counts: how many members each has, from the highest numbers found.
    """

    name: str
    leaves: tuple[Leaf, ...]
    stacked: Mapping[str, str]
    counts: Callable[[Mapping[str, int]], dict[str, int]]

    def names(self, leaf: Leaf, counts: Mapping[str, int]) -> list[str]:
        """The official names of a leaf: one, or one for each member of its stack."""
        if leaf.branch not in self.stacked:
            return [leaf.name]
        return [leaf.name.format(i) for i in range(counts[leaf.branch])]

    def all_names(self, state: Mapping[str, np.ndarray]) -> dict[str, Leaf]:
        """The official names of a network with as many members as those in `state` speak of."""
        counts = self.member_counts(state)
        return {name: leaf for leaf in self.leaves for name in self.names(leaf, counts)}

    def member_counts(self, state: Mapping[str, np.ndarray]) -> dict[str, int]:
        """How many members of each stack the names in a state speak of.

        A number that the state has too few tensors for speaks of none.
        """
        found = {branch: 0 for branch in self.stacked}
        for branch, prefix in self.stacked.items():
            for name in state:
                number = re.match(rf"{prefix}\.(\d{{1,9}})\.", name)
                if number and int(number[1]) < len(state):
                    found[branch] = max(found[branch], int(number[1]) + 1)
        return self.counts(found)


def affine(path: str, name: str, width: str) -> list[Leaf]:
    """Scale and bias of a norm."""
    return [
        Leaf(f"{path}.scale", f"{name}.weight", (width,)),
        Leaf(f"{path}.bias", f"{name}.bias", (width,)),
    ]


def linear(path: str, name: str, inputs: str, outputs: str | tuple[int, str]) -> list[Leaf]:
    """Kernel and bias of a linear layer; inputs, outputs: symbols of `Leaf.shape`."""
    return [
        Leaf(f"{path}.kernel", f"{name}.weight", (outputs, inputs), LINEAR),
        Leaf(f"{path}.bias", f"{name}.bias", (outputs,)),
    ]


def _depthwise(path: str, name: str) -> list[Leaf]:
    return [
        Leaf(f"{path}.scale", f"{name}.depthwise_conv.weight", ("C", 1, 1, 1, 1), DEPTHWISE),
        Leaf(f"{path}.bias", f"{name}.depthwise_conv.bias", ("C",)),
    ]


def _patch_embedding(path: str) -> list[Leaf]:
    return [
        Leaf(f"{path}.kernel", "patch_embed.proj.weight", ("C", *PATCH_SHAPE), PATCH),
        Leaf(f"{path}.bias", "patch_embed.proj.bias", ("C",)),
    ]


def _pooling(name: str) -> list[Leaf]:
    """A pooling head, or all of them if `name` has a place for their number."""
    leaves = linear("pool.proj", f"{name}.cross_attn.proj", "C", "E")
    for letter in "qkv":
        leaves += [
            *affine(f"pool.norm_{letter}", f"{name}.norm1_{letter}", "C"),
            Leaf(f"pool.{letter}.kernel", f"{name}.cross_attn.{letter}.weight", ("C", "C"), LINEAR),
            Leaf(f"pool.{letter}.bias", f"{name}.cross_attn.{letter}_bias", ("C",)),
        ]
    return leaves


_TABLES = (
    Leaf("cls_token", "cls_token", (1, 1, "C"), CLS),
    Leaf("pos_embed", "pos_embed", (1, "L", "C"), POSITIONS),
)
_BLOCKS = (
    Leaf("blocks.norm1.scale", "blocks.{}.norm1.weight", ("C",)),
    Leaf("blocks.attn.qkv.kernel", "blocks.{}.attn.qkv.weight", ((3, "C"), "C"), QKV),
    Leaf("blocks.attn.q_norm.scale", "blocks.{}.attn.q_norm.weight", ("C",)),
    Leaf("blocks.attn.k_norm.scale", "blocks.{}.attn.k_norm.weight", ("C",)),
    *linear("blocks.attn.proj", "blocks.{}.attn.proj", "C", "C"),
    Leaf("blocks.ls1.gamma", "blocks.{}.ls1.gamma", ("C",)),
    Leaf("blocks.norm2.scale", "blocks.{}.norm2.weight", ("C",)),
    *linear("blocks.mlp.fc1", "blocks.{}.mlp.fc1", "C", "M"),
    *linear("blocks.mlp.fc2", "blocks.{}.mlp.fc2", "M", "C"),
    Leaf("blocks.ls2.gamma", "blocks.{}.ls2.gamma", ("C",)),
)


def _fluxvit_counts(found: Mapping[str, int]) -> dict[str, int]:
    budgets = max(found["pool"], found["heads"], found["align"] + 1, 2)
    # Every budget has a pooling head and a classifier; all but the largest are aligned to that.
    return {
        "blocks": max(found["blocks"], 1),
        "pool": budgets,
        "heads": budgets,
        "align": budgets - 1,
    }


FLUXVIT = Architecture(
    "a FluxViT",
    (
        *_TABLES,
        *_depthwise("gpe", "gpe_proj"),
        Leaf("patch_embed.norm_before.scale", "patch_embed.norm_before.weight", (588,)),
        *_patch_embedding("patch_embed.proj"),
        Leaf("patch_embed.norm.scale", "patch_embed.norm.weight", ("C",)),
        *_BLOCKS,
        *_depthwise("blocks.attn.lpe", "blocks.{}.attn.lpe"),
        *_pooling("clip_projector.{}"),
        *affine("fc_norm", "fc_norm", "E"),
        *linear("heads", "head.{}", "E", "K"),
        *linear("align.head", "final_clip_decoder_for_projs.{}.head", "E", "E"),
        *affine("align.norm", "final_clip_decoder_for_projs.{}.norm", "E"),
    ),
    {
        "blocks": "blocks",
        "pool": "clip_projector",
        "heads": "head",
        "align": "final_clip_decoder_for_projs",
    },
    _fluxvit_counts,
)
INTERNVIDEO2 = Architecture(
    "an InternVideo2 vision encoder",
    (*_TABLES, *_patch_embedding("patch_embed"), *_BLOCKS, *_pooling("clip_projector")),
    {"blocks": "blocks"},
    lambda found: {"blocks": max(found["blocks"], 1)},
)


def _decoder(path: str, name: str, width: str, out: str) -> list[Leaf]:
    return [
        *linear(f"{path}.fc1", f"{name}.head.0", width, width),
        *linear(f"{path}.fc2", f"{name}.head.2", width, out),
        *affine(f"{path}.norm", f"{name}.norm", out),
    ]


DECODERS = Architecture(
    "the decoders of an InternVideo2 student",
    (
        Leaf("pos_embed", "clip_pos_embed", (1, "L", "C"), POSITIONS),
        *_decoder("tokens", "clip_decoder.{}", "C", "D"),
        *_decoder("pooled", "final_clip_decoder", "E", "F"),
    ),
    {"tokens": "clip_decoder"},
    lambda found: {"tokens": max(found["tokens"], 1)},
)


def from_official(
    state: Mapping[str, np.ndarray], heads: int = 0, of: Architecture = FLUXVIT
) -> dict[str, Any]:
    """The official state (prefixes already removed) as our nested parameter tree.

    Args:
        state: PyTorch name -> array. Depth, widths, classes and the number of budgets follow
            from it.
        heads: attention heads of a block, where there are blocks; the weights do not tell.

    Raises:
        UserError: a tensor is missing, unexpected or of the wrong shape (all are counted, the
            first few named), or `heads` does not divide the width.
    """
    check(state, of)
    counts = of.member_counts(state)
    tree: dict[str, Any] = {}
    for leaf in of.leaves:
        tensors = [
            leaf.layout.to_ours(np.asarray(state[name]), heads) for name in of.names(leaf, counts)
        ]
        stacked = leaf.branch in of.stacked
        insert(tree, leaf.path, np.stack(tensors) if stacked else tensors[0].copy())
    return tree


def check(state: Mapping[str, np.ndarray], of: Architecture = FLUXVIT) -> None:
    """Raises UserError unless exactly the tensors of `of` are there, in shapes that agree."""
    shapes = {name: leaf.shape for name, leaf in of.all_names(state).items()}
    present = [name for name in shapes if name in state]
    sizes = _bind({name: (shapes[name], state[name].shape) for name in present})
    wrong = []
    for name in present:
        expected = tuple(_size(symbol, sizes) for symbol in shapes[name])
        if tuple(state[name].shape) != expected:
            wrong.append(f"{name} {tuple(state[name].shape)} instead of {expected}")
    faults = {"missing": missing(state, of), "unexpected": unexpected(state, of)}
    _refuse(faults | {"wrong shape": wrong}, of)


def missing(state: Mapping[str, np.ndarray], of: Architecture = FLUXVIT) -> list[str]:
    """The official names that a state lacks."""
    return [name for name in of.all_names(state) if name not in state]


def unexpected(state: Mapping[str, np.ndarray], of: Architecture = FLUXVIT) -> list[str]:
    """The names in a state that are none of the network's."""
    known = of.all_names(state)
    return [name for name in state if name not in known]


def to_official(params: Mapping[str, Any], of: Architecture = FLUXVIT) -> dict[str, np.ndarray]:
    """Our nested parameter tree as the official flat state, in C order.

    Raises:
        UserError: as `from_official`.
    """
    ours = dict(flatten(params))
    known = {leaf.path for leaf in of.leaves}
    _refuse(
        {
            "missing": [leaf.path for leaf in of.leaves if leaf.path not in ours],
            "unexpected": [path for path in ours if path not in known],
        },
        of,
    )
    counts = {leaf.branch: len(ours[leaf.path]) for leaf in of.leaves if leaf.branch in of.stacked}
    state: dict[str, np.ndarray] = {}
    wrong: list[str] = []
    for leaf in of.leaves:
        tensor = np.asarray(ours[leaf.path])
        names = of.names(leaf, counts)
        slices = tensor if leaf.branch in of.stacked else tensor[None]
        try:
            tensors = [np.ascontiguousarray(leaf.layout.to_official(x)) for x in slices]
            state |= dict(zip(names, tensors, strict=True))
        except (ValueError, IndexError):
            wrong.append(f"{leaf.path} {tensor.shape}")
    _refuse({"wrong shape": wrong}, of)
    check(state, of)
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


def _refuse(faults: Mapping[str, list[str]], of: Architecture) -> None:
    if described := describe_faults(faults):
        raise UserError(f"these are not the weights of {of.name}; {described}")


def describe_faults(faults: Mapping[str, list[str]]) -> str:
    """Kind of fault -> tensors as one line, the first few of each kind named; "" without any."""
    parts = []
    for kind, tensors in faults.items():
        if tensors:
            more = f" and {len(tensors) - NAMED_AT_MOST} more" * (len(tensors) > NAMED_AT_MOST)
            parts.append(f"{kind}: {', '.join(tensors[:NAMED_AT_MOST])}{more}")
    return "; ".join(parts)


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 of a nested dict of parameters: the paths, shapes and values as float32.

    It is the same for NumPy and JAX arrays of equal values, whatever their dtype.
    """
    digest = hashlib.sha256()
    for path, array in sorted(flatten(params), key=lambda item: item[0]):
        array = np.asarray(array).astype("<f4")
        digest.update(f"{path} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
