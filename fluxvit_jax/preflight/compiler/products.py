"""FLOPs of the matrix products of a compiled program; a multiply-add counts as two."""

import math
import re
from dataclasses import dataclass

from fluxvit_jax.preflight.compiler.hlo import Instruction

OPCODES = ("dot", "convolution", "custom-call")

Shape = tuple[int, ...]


def product_flops(product: Instruction, operands: list[Shape]) -> int:
    """FLOPs of one execution of an instruction, 0 if it is not a product.

    operands: shapes of its first operands. TPU programs have convolutions in place of products, GPU
    programs also calls of cuBLAS. The FLOPs of Pallas kernels are unknown.
    """
    if product.opcode == "dot":
        contracted = product.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return _dot_flops(product, operands[0], contracted)
    if product.opcode == "convolution":
        return _convolution_flops(product, operands[0], operands[1])
    if product.opcode == "custom-call" and "dot_dimension_numbers" in product.attributes:
        contracted = product.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        return _dot_flops(product, operands[0], contracted)
    return 0


def _dot_flops(dot: Instruction, left: Shape, contracted: str | None) -> int:
    sides = [left[int(axis)] for axis in re.findall(r"\d+", contracted or "")]
    return 2 * math.prod(dot.arrays[0].shape) * math.prod(sides)


def _convolution_flops(convolution: Instruction, left: Shape, right: Shape) -> int:
    """Window positions outside of the input, or between its elements, do not count.

    That matters: a product with batch axes becomes a convolution whose windows meet one element
    each.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None  # every convolution has them
    sides, kernel, out = labels.groups()
    groups = int(convolution.attribute(r"\bfeature_group_count=(\d+)") or 1)
    batch_groups = int(convolution.attribute(r"\bbatch_group_count=(\d+)") or 1)
    window = convolution.attribute(r"window=\{([^}]*)\}") or ""
    result = convolution.arrays[0].shape
    pairs = math.prod(
        _pairs(
            left[sides.index(axis)],
            right[kernel.index(axis)],
            result[out.index(axis)],
            _window(window, int(axis)),
        )
        for axis in sides
        if axis.isdigit()
    )
    features = left[sides.index("f")] // groups * right[kernel.index("o")]
    return 2 * features * (left[sides.index("b")] // batch_groups) * pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """How a window moves along one axis."""

    stride: int
    before: int  # padding
    left_dilation: int
    right_dilation: int


def _window(text: str, axis: int) -> _Window:
    """Of an axis of "size=1x4 stride=1x2 pad=0_0x3_3 lhs_dilate=1x2 rhs_dilate=1x1"."""

    def value(name: str, default: str) -> str:
        match = re.search(rf"\b{name}=(\S+)", text)
        return match[1].split("x")[axis] if match else default

    return _Window(
        stride=int(value("stride", "1")),
        before=int(value("pad", "0_0").split("_")[0]),
        left_dilation=int(value("lhs_dilate", "1")),
        right_dilation=int(value("rhs_dilate", "1")),
    )


def _pairs(left: int, right: int, out: int, window: _Window) -> int:
    """Pairs of an index of the result and one of the kernel that meet an element of the input."""
    extent = (left - 1) * window.left_dilation + 1
    total = 0
    for index in range(right):
        shift = index * window.right_dilation - window.before
        inputs = range(shift, shift + out * window.stride, window.stride)
        total += sum(0 <= i < extent and i % window.left_dilation == 0 for i in inputs)
    return total
