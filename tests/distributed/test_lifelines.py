"""Connections between hosts: a death is noticed, an end that was told is none, a signal is told."""

import os
import signal
import socket
import time

import pytest

from fluxvit_jax.distributed.lifelines import _Lifelines
from tests import limited


@pytest.fixture
def pair():
    """Both ends of a connection of hosts 0 and 1, each with the deaths that it has noticed."""
    found = []
    for own, other in zip(socket.socketpair(), (1, 0), strict=True):
        deaths: list[int] = []
        found.append((_Lifelines({own: other}, deaths.append), deaths, own))
    yield found
    for lifelines, _, _ in found:
        lifelines.close()


def test_a_death_is_noticed(pair):
    (_, deaths, _), (_, _, killed) = pair
    killed.shutdown(socket.SHUT_RDWR)
    end = time.monotonic() + 5
    while not deaths and time.monotonic() < end:
        time.sleep(0.01)
    assert deaths == [1]


def test_a_signal_is_told(pair):
    (host0, deaths0, _), (host1, deaths1, _) = pair
    os.write(host1.signal_descriptor, bytes([signal.SIGCHLD, signal.SIGTERM, signal.SIGINT]))
    limited.wait_until(lambda: host0.stop_status)
    assert host0.stop_status == host1.stop_status in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert deaths0 == deaths1 == []


def test_an_end_that_was_told_is_no_death(pair):
    (host0, deaths0, _), (host1, deaths1, own1) = pair
    host0.leave()
    time.sleep(0.3)  # host 1 has heard it, and goes on for a while
    assert deaths0 == deaths1 == []
    host1.leave()
    own1.shutdown(socket.SHUT_RDWR)
    time.sleep(0.3)
    assert deaths0 == deaths1 == []
