"""Meshes of eight devices: where arrays lie, and that a step does not depend on it."""

import json
import sys
import textwrap

import numpy as np
import pytest

from tests import limited, tiny

# data, fsdp, tensor
MESHES = {"data x fsdp x tensor": (2, 2, 2), "data x fsdp x tensor, taught, two parts": (2, 2, 2)}
# Where a step would tell nothing more. Steps of data parallel devices are in test_two_processes.py.
OTHER_MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 2)}


@pytest.fixture(scope="module")
def steps(tiny_data, compiled, tmp_path_factory):
    """Three steps on each mesh, in one process: losses, gradient norms and all parameters.

    And the share of the state that a device holds.
    """
    out = tmp_path_factory.mktemp("steps")
    teacher = tiny.write_teacher(out / "teacher")
    program = textwrap.dedent(
        f"""
        import json

        import jax
        import numpy as np

        from fluxvit_jax.distributed import mesh as parallel
        from fluxvit_jax.training import train_step as step, train
        from fluxvit_jax.grids import capacity
        from fluxvit_jax.config.grids import admissible_grids
        from fluxvit_jax.training.optimizer import make_optimizer
        from fluxvit_jax.objectives.base import objective_class
        from fluxvit_jax.training.train_state import (
            abstract_params, abstract_state, initial_state
        )
        from tests import tiny
        from tests.training.test_train import grid_batch

        def share_of(state):
            leaves = jax.tree.leaves(state)
            held = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
            if isinstance(leaves[0], jax.Array):
                assert held == sum(x.addressable_shards[0].data.size for x in leaves)
            return float(held / sum(np.prod(x.shape) for x in leaves))

        def run(sides, parts, teacher, count):
            data = {str(tiny_data)!r}
            own = dict(train__batch_size=16, train__ema_decay=0.0)
            if teacher:
                own |= dict(train__budgets=(24,))
                config = tiny.make_pretraining(data, {str(teacher)!r}, **own)
            else:
                config = tiny.make_config(data, **own)
            config.train.grad_accum_steps = parts
            # The keys' bias in a softmax has no gradient but rounding, which Adam would blow up.
            config.optim.eps = 1e-5
            for axis, side in zip(parallel.AXES, sides):
                config.parallel.mesh[axis] = side
            grids = admissible_grids(config)
            mesh = parallel.make_mesh(config, jax.devices()[: int(np.prod(sides))])
            optimizer = make_optimizer(config, 20, abstract_params(config))
            if not count:
                return [], share_of(abstract_state(config, optimizer, mesh)), np.zeros(0)
            state = initial_state(config, optimizer, mesh)
            frozen = objective_class(config).load_frozen(config, mesh)
            objective = step.make_objective(config, grids, "cpu")
            train_step = step.make_train_step(config, objective, optimizer, mesh)
            shapes = step.abstract_batch(config, grids, mesh)
            train_step = train_step.lower(state, frozen, shapes).compile()
            chosen = [grids[i % len(grids)] for i in (0, 19, 17, 5, 3, 11, 12, 8)]
            measured = []
            for seed in range(count):
                batch = step.device_batch(grid_batch(chosen, capacity(grids), seed=seed))
                state, numbers = train_step(state, frozen, parallel.shard_batch(batch, mesh))
                measured.append([float(numbers["loss"]), float(numbers["gradient_norm"])])
            flat, _ = jax.flatten_util.ravel_pytree(jax.device_get(state["params"]))
            return measured, share_of(state), np.asarray(flat)

        others = json.loads({json.dumps(json.dumps(OTHER_MESHES))})
        meshes = others | json.loads({json.dumps(json.dumps(MESHES))})
        meshes |= {{name: (1, 1, 1) for name in ("one", "one, taught")}}
        told = {{}}
        for name, sides in meshes.items():
            parts, count = 2 if "parts" in name else 1, 0 if name in others else 3
            measured, share, params = run(sides, parts, "taught" in name, count)
            told[name] = {{"measured": measured, "share": share}}
            np.save({str(out)!r} + f"/{{name}}.npy", params)
        print(json.dumps(told))
        """
    )
    done = limited.run(
        [sys.executable, "-c", program],
        env=tiny.environment(compiled, 8),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return {name: own | {"params": np.load(out / f"{name}.npy")} for name, own in told.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_step_does_not_depend_on_the_mesh(steps, name):
    own, one = steps[name], steps["one, taught" if "taught" in name else "one"]
    np.testing.assert_allclose(own["measured"], one["measured"], rtol=1e-5)
    np.testing.assert_allclose(own["params"], one["params"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_state_is_cut_where_the_mesh_says(steps):
    """The share of the training state that a device holds."""
    assert steps["data"]["share"] == 1.0
    assert steps["fsdp"]["share"] < 0.15
    assert 0.5 < steps["tensor"]["share"] < 0.8
    assert steps["data x fsdp x tensor"]["share"] < 0.5
