import threading
import time

import pytest

from fluxvit_jax.data.decoding import DecodeError
from fluxvit_jax.data.time_limit import within


def test_results_and_errors_come_through():
    assert within(0, "a.mp4", lambda: threading.current_thread().daemon) is True
    with pytest.raises(ZeroDivisionError):
        within(10, "a.mp4", lambda: 1 // 0)


def test_a_read_that_hangs_is_left_behind():
    with pytest.raises(DecodeError, match=r"a.mp4: hangs: not read within 0.2 s"):
        within(0.2, "a.mp4", lambda: time.sleep(1000))
