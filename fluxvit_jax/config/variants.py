"""Sizes of networks and teachers by name, and constants that they share."""

from typing import NamedTuple

NO_CLASSES = 1  # model.classes without a trained classifier: the minimum
HEADS = 3  # pooling heads of the network, and so the maximum number of trained budgets


class Variant(NamedTuple):
    """Size of a network and the native grid of its position table."""

    width: int
    depth: int
    heads: int
    frames: int  # of the native grid
    resolution: int  # of the native grid, pixels
    pool_width: int = 768  # of the clip vector
    pool_heads: int = 16  # of the attention pooling
    layer_scale: float = 1e-5  # initial value of LayerScale
    kernel_std: float = 0.02  # standard deviation of initial kernels
    position_scale: float = 1.0  # initial value of GPE's scale


# S and B as released (facts of the official checkpoints). The paper names L but no file of it is
# out: ViT-L's size on B's grid is the natural reading. Ti is ours, for the demo and the tests. The
# official initial values suit wide networks that were pre-trained for long: with them Ti stays at
# chance for the demo's whole length; with larger kernels and positions it learns within 500 steps.
VARIANTS = {
    "Ti": Variant(
        width=64,
        depth=2,
        heads=2,
        frames=8,
        resolution=56,
        pool_width=64,
        pool_heads=2,
        layer_scale=1.0,
        kernel_std=0.06,
        position_scale=2.0,
    ),
    "S": Variant(384, 12, 6, frames=24, resolution=252),
    "B": Variant(768, 12, 12, frames=32, resolution=280),
    "L": Variant(1024, 24, 16, frames=32, resolution=280),
}


class TeacherSizes(NamedTuple):
    """An InternVideo2 encoder, by the fields of `models.internvideo2.InternVideo2Config`."""

    width: int
    depth: int
    heads: int
    hidden: int
    pool_width: int = 768
    pool_heads: int = 16


# Sizes of the official models (facts of the released files); Ti is ours, for the tests.
TEACHERS = {
    "InternVideo2-Ti": TeacherSizes(48, 4, 4, hidden=96, pool_width=32, pool_heads=4),
    "InternVideo2-1B": TeacherSizes(1408, 40, 16, hidden=6144),
    "InternVideo2-6B": TeacherSizes(3200, 48, 25, hidden=12800),
}


class TextEncoderSizes(NamedTuple):
    """A text encoder, by the fields of `models.text_encoder.TextEncoderConfig`."""

    width: int
    depth: int
    heads: int
    hidden: int
    out: int  # of a text's vector, and so of a video's


# MobileCLIP-B's is InternVideo2 CLIP's; Ti is ours, for the study and the tests.
TEXT_ENCODERS = {
    "MobileCLIP-B": TextEncoderSizes(512, 12, 8, hidden=2048, out=512),
    "Ti": TextEncoderSizes(64, 2, 2, hidden=128, out=64),
}
