"""Writes torch_interpolate.npz, what PyTorch's `interpolate` does, for models/test_positions.py.

    python tests/golden/torch_interpolate.py        # with torch 2.13.0; the tests need no torch

`linear.N` and `cubic.N`: float32 [36, 36, N] of the matrices that resize an axis of N places to
1..36 (rows past the size are zero). `table`: float32 [T, H, W, C]; `table.TxHxW`: the same resized
as the official code does, linear in time, then bicubic in space.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

NATIVE = (1, 4, 8, 18, 20, 24)
SIZES = 36
GRIDS = ((1, 1, 1), (5, 3, 7), (6, 4, 5), (8, 6, 2), (13, 9, 9), (4, 1, 8))


def matrices(native: int, mode: str) -> np.ndarray:
    stacked = np.zeros((SIZES, SIZES, native), np.float32)
    identity = torch.eye(native, dtype=torch.float64)
    for size in range(1, SIZES + 1):
        if mode == "linear":
            columns = interpolate(identity[None], size=size, mode=mode, align_corners=False)[0]
        else:  # of an image with columns that are all alike
            image = identity[None, :, :, None].expand(-1, -1, -1, 4)
            shape = (size, 4)
            columns = interpolate(image, size=shape, mode=mode, align_corners=False)[0, ..., 0]
        stacked[size - 1, :size] = columns.T.numpy()
    return stacked


def resized(table: torch.Tensor, grid: tuple[int, int, int]) -> np.ndarray:
    T, H, W = grid
    t, h, w, c = table.shape
    x = table.permute(1, 2, 3, 0).reshape(-1, c, t)
    x = interpolate(x, size=T, mode="linear", align_corners=False)
    x = x.reshape(h, w, c, T).permute(3, 2, 0, 1)
    x = interpolate(x, size=(H, W), mode="bicubic", align_corners=False)
    return x.permute(0, 2, 3, 1).numpy().astype(np.float32)


def main() -> None:
    arrays = {}
    for native in NATIVE:
        arrays[f"linear.{native}"] = matrices(native, "linear")
        arrays[f"cubic.{native}"] = matrices(native, "bicubic")
    table = torch.randn((8, 6, 4, 3), generator=torch.manual_seed(0)).float()
    arrays["table"] = table.numpy()
    for grid in GRIDS:
        arrays["table.{}x{}x{}".format(*grid)] = resized(table.double(), grid)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
