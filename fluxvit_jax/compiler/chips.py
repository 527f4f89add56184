"""What is public of each TPU chip, and what its compiler lets a program have.

Sources: peak, memory and interconnect are those of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, as
are the cores of a host with four chips. `memory` is the "available HBM" that the compiler names
when a program does not fit (libtpu 0.0.42): less than the chip has. Clocks are not published; these
make the compiler's cycles for an 8192^3 bfloat16 product 88 % of v5e's peak, 70 % of v6e's, 93 % of
v4's and 90 % of v5p's (the last clock is known to 15 % only).
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """A TPU chip, which is one device of JAX.

    memory: bytes of HBM that a program can use; peak: bfloat16 FLOP/s; clock: Hz of its cycles.
    axes: dimensions of the torus that chips form; each has two links a chip.
    link: bytes/s of one link in one direction.
    ring: an axis of so many chips (or of a multiple, on 3D tori, if all axes are) closes to a ring.
    rows: a matrix unit takes so many rows a cycle, which makes the peak from units, side and clock.
    host_cores: CPU cores (hyperthreads) of a host with four chips.
    megacore: two TensorCores act as one device, as they do on a Cloud TPU; the compiler has to be
        told so, as its descriptions of that chip list them one by one otherwise.
    """

    memory: float
    peak: float
    clock: float
    axes: int
    link: float
    ring: int
    rows: int
    host_cores: int
    megacore: bool = False


CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1.05e9, 3, 50e9, 4, 1, 240, megacore=True),
    "v5e": Chip(15.75 * GIB, 197e12, 1.5e9, 2, 50e9, 16, 1, 112),
    "v5p": Chip(95.74 * GIB, 459e12, 1.75e9, 3, 100e9, 4, 1, 208),
    "v6e": Chip(31.25 * GIB, 918e12, 1.75e9, 2, 100e9, 16, 2, 180),
}
