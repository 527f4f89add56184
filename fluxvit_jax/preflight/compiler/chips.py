"""Public specifications of TPU chips, and the memory that their compiler lets a program use.

Sources: peak, memory and interconnect are those of cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, as
are the cores of a host with four chips. `memory` is the "available HBM" that the compiler names
when a program does not fit (libtpu 0.0.42): less than the chip has. Clocks are not published; these
make the compiler's cycles for an 8192^3 bfloat16 product 88 % of v5e's peak, 70 % of v6e's, 93 % of
v4's and 90 % of v5p's (the last clock is known to 15 % only).
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A TPU chip, which is one device of JAX.

    memory: bytes of HBM that a program can use; peak: bfloat16 FLOP/s; clock: Hz of its cycles.
    axes: dimensions of the torus that chips form; each has two links per chip.
    link: bytes/s of one link in one direction.
    ring: length at which an axis closes to a ring (on 3D tori any multiple of it, if all axes are).
    rows: rows that a matrix unit takes per cycle; the peak follows from it, units, side and clock.
    host_cores: CPU cores (hyperthreads) of a host with four chips.
    megacore: two TensorCores act as one device, as on a Cloud TPU. This is an option of the
        compiler, whose descriptions of that chip list them one by one otherwise.
    """

    memory: float
    peak: float
    clock: float
    axes: int
    link: float
    ring: int
    host_cores: int
    rows: int = 1
    megacore: bool = False


CHIPS = {
    "v4": Chip(
        memory=30.75 * GIB, peak=275e12, clock=1.05e9, axes=3, link=50e9, ring=4, host_cores=240,
        megacore=True,
    ),
    "v5e": Chip(
        memory=15.75 * GIB, peak=197e12, clock=1.5e9, axes=2, link=50e9, ring=16, host_cores=112
    ),
    "v5p": Chip(
        memory=95.74 * GIB, peak=459e12, clock=1.75e9, axes=3, link=100e9, ring=4, host_cores=208
    ),
    "v6e": Chip(
        memory=31.25 * GIB, peak=918e12, clock=1.75e9, axes=2, link=100e9, ring=16, rows=2,
        host_cores=180,
    ),
}  # fmt: skip
