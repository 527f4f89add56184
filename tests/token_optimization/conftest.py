"""Short timings: tests ask how they are made, and never how long a network takes."""

import pytest

from fluxvit_jax.token_optimization import latency


@pytest.fixture(autouse=True, scope="package")
def short_timing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "WARM_UP_SECONDS", 0.05)
        patch.setattr(latency, "SECONDS", 0.1)
        yield
