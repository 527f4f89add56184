"""The contrastive loss against the official code, and over devices against one."""

import json
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.objectives.contrastive_loss import contrastive_loss
from tests import limited, tiny
from tests.models.golden import GOLDEN

TOLD = json.loads((GOLDEN / "clip/loss_cases.json").read_text())
ARRAYS = np.load(GOLDEN / "clip/loss_cases.npz")
CASES = [case for case in TOLD["cases"] if ARRAYS[f"{case['name']}.vision"].ndim == 2]
CASES = [case for case in CASES if ARRAYS[f"{case['name']}.text"].ndim == 2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_loss_and_gradients(case):
    videos, texts = (ARRAYS[f"{case['name']}.{kind}"] for kind in ("vision", "text"))
    identity = np.arange(len(videos)) if case["idx"] is None else np.array(case["idx"])
    temperature = jnp.float32(case["temp"])
    of = jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2))
    loss, gradients = of(videos, texts, temperature, identity)
    assert loss == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)
    expected = [ARRAYS[f"{case['name']}.grad_{kind}"] for kind in ("vision", "text")]
    for found, own in zip(gradients[:2], expected, strict=True):
        rows = np.abs(own).max(axis=1) < 1e6  # a zero vector's gradient is scaled by 1e12
        largest = np.abs(own[rows]).max()
        assert np.abs(found - own)[rows].max() <= 5e-5 * largest + 1e-7
    assert gradients[2] == pytest.approx(case["grad_temp"], rel=5e-5, abs=1e-5)


def test_an_identity_of_two_numbers():
    """Pairs are of one thing if all of their numbers are equal."""
    videos, texts = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    same = [0, 1, 2, 0]
    numbers = np.array([[0, 0], [0, 1], [1, 0], [0, 0]], np.int32)
    losses = [
        contrastive_loss(videos, texts, jnp.float32(0.1), np.array(own)) for own in (same, numbers)
    ]
    assert losses[0] == losses[1]


def test_devices_give_the_gradient_of_the_whole_batch():
    """Where the official code gives each rank 1/world of it: the golden halves are of one batch."""
    program = textwrap.dedent(
        """
        import json
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from fluxvit_jax.objectives.contrastive_loss import contrastive_loss

        rng = np.random.default_rng(0)
        videos, texts = rng.normal(size=(2, 16, 12)).astype(np.float32)
        identity = np.array([*range(12), 3, 3, 5, 0], np.int32)
        value = jax.jit(jax.value_and_grad(contrastive_loss, argnums=(0, 1, 2)))
        answers = []
        for devices in (1, 8):
            mesh = jax.sharding.Mesh(jax.devices()[:devices], "data")
            cut = NamedSharding(mesh, PartitionSpec("data"))
            put = [jax.device_put(x, cut) for x in (videos, texts)]
            loss, gradients = value(*put, np.float32(0.05), jax.device_put(identity, cut))
            answers.append([float(loss), *(np.asarray(g).tolist() for g in gradients)])
        print(json.dumps(answers))
        """
    )
    done = limited.run(
        [sys.executable, "-c", program],
        env=tiny.environment(tiny.ROOT, 8) | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        check=True,
    )
    one, eight = json.loads(done.stdout)
    for own, other in zip(one, eight, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-7)


def test_the_gathered_halves_of_the_official_code():
    videos, texts, identity = (
        np.concatenate([ARRAYS[f"gather.{kind}{rank}"] for rank in (0, 1)])
        for kind in ("vision", "text", "idx")
    )
    of = jax.grad(contrastive_loss, argnums=(0, 1, 2))
    found = of(videos, texts, jnp.float32(TOLD["gather"]["temp"]), identity)
    for gradient, kind in zip(found, ("vision", "text"), strict=False):
        halves = np.concatenate([ARRAYS[f"gather.grad_{kind}{rank}"] for rank in (0, 1)])
        np.testing.assert_allclose(gradient, halves, rtol=1e-4, atol=1e-5)
    assert found[2] == pytest.approx(float(ARRAYS["gather.grad_temp0"]), rel=5e-5)
