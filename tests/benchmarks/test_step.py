"""The FLOPs that the benchmark divides by."""

import pytest

from benchmarks.step import multiply_accumulates
from fluxvit_jax.config import default_config, model_config

TOKENS = (3072, 2048, 1024, 512)


@pytest.mark.parametrize(
    ("variant", "paper"), [("S", (154, 83, 32, 13)), ("B", (440, 255, 108, 49))]
)
def test_flops_are_those_of_the_paper(variant, paper):
    """GFLOPs a view, multiply-accumulates, as in the paper's tables of results."""
    model = model_config(default_config(variant))
    ours = [multiply_accumulates(model, tokens) / 1e9 for tokens in TOKENS]
    assert ours == pytest.approx(paper, abs=0.6)
