"""Devices by name."""

import importlib.util

import jax
import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.preflight.compiler import topology
from fluxvit_jax.preflight.compiler.chips import CHIPS
from fluxvit_jax.preflight.compiler.topology import Topology


def test_names():
    assert topology.parse("v5e:2x4, cpu:8,current,v5e:2x4") == [
        Topology("v5e:2x4", "v5e", (2, 4)),
        Topology("cpu:8", "cpu", (8,)),
        Topology("current", "current", ()),
    ]
    (cube,) = topology.parse("v4:2x2x4")
    assert cube.shape == (2, 2, 4) and cube.chip is CHIPS["v4"]
    assert topology.parse("cpu:1")[0].chip is None


@pytest.mark.parametrize(
    "name", ["", "v7:2x2", "v5e", "v5e:8", "v5e:0x2", "cpu:0", "cpu:2x2", "tpu"]
)
def test_an_unknown_one_lists_those_known(name):
    with pytest.raises(UserError, match=f"{name!r} is none.*v4:AxBxC, v5e:AxB, .*cpu:N, current"):
        topology.parse(name)


def test_a_torus_has_no_more_axes_than_its_chips():
    with pytest.raises(UserError, match="'v5e:2x2x2': chips of v5e form a torus of 2 axes"):
        topology.parse("v5e:2x2x2")


def test_without_libtpu_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match=r"pip install 'libtpu==[\d.]+\*'$"):
        topology._prepare_libtpu()


def test_more_cpus_than_jax_has_started_with():
    jax.devices("cpu")
    with pytest.raises(UserError, match=r"cpu:4096: JAX has started .*device_count=4096$"):
        topology._prepare_cpus(4096)
    topology._prepare_cpus(1)


@pytest.mark.parametrize(
    ("name", "extent", "closed"),
    [
        ("v5e:16x16", 16, True),
        ("v5e:4x16", 4, False),
        ("v4:4x4x8", 8, True),
        ("v4:2x2x4", 4, False),
    ],
)
def test_which_axes_close_to_a_ring(name, extent, closed):
    (one,) = topology.parse(name)
    assert topology.ring(one, extent) == closed
