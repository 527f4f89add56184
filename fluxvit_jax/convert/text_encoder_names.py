"""Our text encoder's parameters <-> MobileCLIP's names, and open_clip's for the same weights."""

import re
from collections.abc import Mapping

import numpy as np

from fluxvit_jax.convert.official_names import SAME, Architecture, Layout, Leaf, affine, linear

POSITIONS = Layout(lambda x, _: x[0, 0], lambda x: x[None, None])
_MHA, _FFN = "transformer.{}.pre_norm_mha", "transformer.{}.pre_norm_ffn"

TEXT_ENCODER = Architecture(
    "a CLIP text encoder",
    (
        Leaf("token_embed", "embedding_layer.weight", ("V", "C"), SAME),
        Leaf("pos_embed", "positional_embedding.pos_embed.pos_embed", (1, 1, "L", "C"), POSITIONS),
        *affine("blocks.norm1", f"{_MHA}.0", "C"),
        *linear("blocks.qkv", f"{_MHA}.1.qkv_proj", "C", (3, "C")),
        *linear("blocks.proj", f"{_MHA}.1.out_proj", "C", "C"),
        *affine("blocks.norm2", f"{_FFN}.0", "C"),
        *linear("blocks.fc1", f"{_FFN}.1", "C", "M"),
        *linear("blocks.fc2", f"{_FFN}.4", "M", "C"),
        *affine("norm", "final_layer_norm", "C"),
        Leaf("projection", "projection_layer", ("C", "E"), SAME),
    ),
    {"blocks": "transformer"},
    lambda found: {"blocks": max(found["blocks"], 1)},
)

PREFIX = "text_encoder."  # in MobileCLIP's and InternVideo2's files
# open_clip's name -> MobileCLIP's; a block's number goes into the braces.
_OPEN_CLIP = {
    "token_embedding.weight": "embedding_layer.weight",
    "text_projection": "projection_layer",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_BLOCK = {
    "ln_1.": f"{_MHA}.0.",
    "attn.in_proj_": f"{_MHA}.1.qkv_proj.",
    "attn.out_proj.": f"{_MHA}.1.out_proj.",
    "ln_2.": f"{_FFN}.0.",
    "mlp.c_fc.": f"{_FFN}.1.",
    "mlp.c_proj.": f"{_FFN}.4.",
}


def text_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The text encoder's tensors in a file of a whole model, by MobileCLIP's names.

    state: of MobileCLIP (`mobileclip_blt.pt`), of InternVideo2, or of open_clip.
    """
    for prefix in ("text.", ""):
        if f"{prefix}token_embedding.weight" in state:
            return _from_open_clip(_below(prefix, state))
    return _below(PREFIX, state)


def _below(prefix: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


def _from_open_clip(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name == "positional_embedding":
            found["positional_embedding.pos_embed.pos_embed"] = tensor[None, None]
        elif block:
            found[_of_block(*block.groups())] = tensor
        else:
            found[_OPEN_CLIP.get(name, name)] = tensor
    return found


def _of_block(number: str, name: str) -> str:
    for theirs, ours in _OPEN_CLIP_BLOCK.items():
        if name.startswith(theirs):
            return ours.format(number) + name.removeprefix(theirs)
    return f"transformer.{number}.{name}"
