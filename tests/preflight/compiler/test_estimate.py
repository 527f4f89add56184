"""Times put together from cycles and bytes."""

from typing import NamedTuple

import pytest

from fluxvit_jax.preflight.compiler import topology
from fluxvit_jax.preflight.compiler.chips import CHIPS
from fluxvit_jax.preflight.compiler.collectives import Collective
from fluxvit_jax.preflight.compiler.estimate import HOP, estimate, exchange_seconds
from fluxvit_jax.preflight.compiler.work import Work

S = 10**9  # bytes
LINK = CHIPS["v5e"].link


class Device(NamedTuple):
    coords: tuple[int, int, int]


def slice_of(name: str):
    """A topology and its devices, row by row."""
    (one,) = topology.parse(name)
    x, y = one.shape
    return one, [Device((i, j, 0)) for i in range(x) for j in range(y)]


def make_work(cycles: int, kernel_cycles: int, collectives: tuple[Collective, ...]) -> Work:
    return Work(
        flops=0,
        attention_flops=0,
        cycles=cycles,
        kernel_cycles=kernel_cycles,
        frozen_cycles=0,
        kernels={},
        unknown_kernels=0,
        untimed={},
        unknown_loops=0,
        collectives=collectives,
    )


def exchange(kind: str, group, size: int = S, times: int = 1, covered: int = 0) -> Collective:
    return Collective(kind=kind, bytes=size, group=tuple(group), times=times, covered=covered)


@pytest.mark.parametrize(
    ("name", "kind", "group", "seconds"),
    [
        # Two neighbours: each sends half of it there and back.
        ("v5e:2x2", "all-reduce", (0, 1), S / LINK),
        # A row of four, no ring.
        ("v5e:4x4", "all-gather", range(4), S * 3 / 4 / LINK),
        ("v5e:4x4", "reduce-scatter", range(0, 16, 4), S * 3 / 4 / LINK),
        # Along two axes at once.
        ("v5e:4x4", "all-reduce", range(16), 2 * S * 15 / 16 / (2 * LINK)),
        # A ring goes both ways round.
        ("v5e:16x16", "all-gather", range(16), S * 15 / 16 / (2 * LINK)),
        ("v5e:16x16", "all-reduce", range(256), 2 * S * 255 / 256 / (4 * LINK)),
        ("v5e:16x16", "all-to-all", range(16), S * 15 / 16 * 4 / (2 * LINK)),
        ("v5e:4x4", "collective-permute", (0, 1), S / LINK),
        ("v5e:4x4", "all-reduce", (3,), 0.0),
    ],
)
def test_bytes_over_links(name, kind, group, seconds):
    assert exchange_seconds(exchange(kind, group), *slice_of(name)) == pytest.approx(seconds)


def test_small_exchanges_take_as_long_as_the_way():
    small = exchange("all-reduce", range(256), size=4)
    assert exchange_seconds(small, *slice_of("v5e:16x16")) == pytest.approx(2 * 16 * HOP)


def test_what_work_hides_takes_no_time():
    clock = CHIPS["v5e"].clock
    needs = exchange_seconds(exchange("all-gather", range(4)), *slice_of("v5e:4x4"))
    exchanges = (
        exchange("all-gather", range(4), times=3),
        exchange("all-gather", range(4), times=5, covered=round(needs / 2 * clock)),
        exchange("all-gather", range(4), times=7, covered=round(needs * 2 * clock)),
    )
    work = make_work(6 * 10**9, 3 * 10**9, exchanges)
    found = estimate(work, *slice_of("v5e:4x4"))
    assert found.computing == pytest.approx(9e9 / clock)
    assert found.kernels == pytest.approx(3e9 / clock)
    assert found.exchanging == pytest.approx(3 * needs + 5 * needs / 2, rel=1e-6)
    assert found.seconds == found.computing + found.exchanging


def test_only_tpus_by_name_have_cycles():
    (cpu,) = topology.parse("cpu:2")
    with pytest.raises(ValueError, match="no cycles"):
        estimate(make_work(0, 0, ()), cpu, [])
