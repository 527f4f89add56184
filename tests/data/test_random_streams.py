"""Independence of the streams of random numbers."""

from fluxvit_jax.data.random_streams import stream_rng


def test_streams_differ_by_seed_index_and_kind():
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1), (0, 2**40, 1)]
    draws = {tuple(stream_rng(*key).integers(2**63, size=4)) for key in keys}
    assert len(draws) == len(keys)
