"""`train.freeze`: what is frozen stays, has no state, and costs no backward pass."""

import shutil

import jax
import numpy as np
import pytest

from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import capacity
from fluxvit_jax.models import fluxvit
from fluxvit_jax.training import train
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, initial_state
from fluxvit_jax.training.train_step import make_objective
from tests import tiny
from tests.training.test_train import grid_batch, make_step, quiet_config, split_of, unfinish

FROZEN = {  # top-level parameters that are frozen whole
    "none": set(),
    "1": {"cls_token", "pos_embed", "gpe", "patch_embed"},
    "backbone": {"cls_token", "pos_embed", "gpe", "patch_embed", "blocks"},
    "all_but_head": set(fluxvit.PARAMS) - {"heads"},
}
FROZEN["2"] = FROZEN["backbone"]  # all of the blocks


def a_batch(config) -> dict:
    grids = admissible_grids(config)
    return grid_batch([grids[i] for i in (0, 19, 17, 5)], capacity(grids))


def lowered_gradients(tiny_data, freeze: str, scan: bool):
    """The gradients of a fixed batch, lowered, with the arrays to call it on."""
    config = quiet_config(
        tiny_data, train__freeze=freeze, model__scan=scan, train__init_from="weights",
        train__budgets=(24,),
    )  # fmt: skip
    model, part = model_config(config), freezing(config)
    objective = make_objective(config, admissible_grids(config), "cpu")
    batch = a_batch(config)
    del batch["failure"]
    batch["key"] = jax.random.split(jax.random.key(0), 8)

    def gradients(params, batch):
        trained, frozen = (
            fluxvit.prepare_params(half, model)
            for half in (part.trained(params), part.frozen(params))
        )
        found, terms = objective.value_and_grad(trained, frozen, batch)
        return fluxvit.stack_layers(found), terms

    params = fluxvit.init_params(model, jax.random.key(1))
    return jax.jit(gradients).lower(params, batch), (params, batch), part


def loops(lowered) -> int:
    return lowered.as_text().count("stablehlo.while")


@pytest.fixture(scope="module")
def unfrozen(tiny_data, compiled):
    lowered, arrays, _ = lowered_gradients(tiny_data, "none", True)
    return loops(lowered), lowered.compile()(*arrays)


@pytest.mark.parametrize("freeze, scan", [("1", True), ("1", False), ("backbone", True)])
def test_gradients_are_those_of_the_trained_part(unfrozen, tiny_data, compiled, freeze, scan):
    unfrozen_loops, (whole, terms) = unfrozen
    lowered, arrays, part = lowered_gradients(tiny_data, freeze, scan)
    gradients, found = lowered.compile()(*arrays)
    assert set(gradients) == set(fluxvit.PARAMS) - FROZEN[freeze]
    for own, other in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(part.trained(whole)), strict=True
    ):
        assert own.shape == other.shape
        assert np.linalg.norm(own - other) <= 1e-5 * np.linalg.norm(other) + 1e-7
    assert found.keys() == terms.keys()
    for name in found:
        np.testing.assert_allclose(found[name], terms[name], rtol=1e-5, err_msg=name)
    if scan:
        # There is a loop forward and one backward. A frozen backbone has none backward; a frozen
        # block has a loop of its own, forward only.
        assert loops(lowered) == unfrozen_loops + {"backbone": -1, "1": 1}[freeze]


def test_a_step_of_a_linear_probe(tiny_data, compiled):
    """Only the head moves, by gradient and decay; nothing else has a state or an average."""
    config = tiny.make_config(
        tiny_data, train__freeze="all_but_head", optim__weight_decay=0.5,
        optim__warmup_learning_rate=0.1, optim__learning_rate=0.1,
    )  # fmt: skip
    call, state, _ = make_step(config)
    before = jax.tree.map(np.array, state)
    moments = before["opt_state"][0]
    assert moments.mu.keys() == moments.nu.keys() == {"heads"}
    after, scalars = call(state, a_batch(config))
    assert np.isfinite(scalars["loss"]) and not [name for name in scalars if "align" in name]
    for tree in ("params", "ema"):
        for name in fluxvit.PARAMS:
            own, other = after[tree][name], before[tree][name]
            same = jax.tree.map(lambda a, b: bool(np.all(a == b)), own, other)
            assert all(jax.tree.leaves(same)) == (name in FROZEN["all_but_head"]), (tree, name)


def test_pooling_that_was_never_trained_is_not_frozen(finished, tiny_data, compiled, capsys):
    """Weights trained at two budgets have a third pooling head, which is as it was drawn."""
    own = {"train__init_from": str(finished.workdir), "train__budgets": (32, 24, 12)}
    own["data__grids__tokens"] = (32, 99)

    def start(freeze):
        config = tiny.make_config(tiny_data, train__freeze=freeze, **own)
        optimizer = make_optimizer(config, 8, abstract_params(config))
        initial_state(config, optimizer, make_mesh(config))

    start("backbone")
    said = "the pooling at 12 tokens was not trained with it, which had 2 of 3 budgets"
    assert f"{finished.workdir}: {said}\n" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"all_but_head would keep all pooling of .*, but {said}"):
        start("all_but_head")


@pytest.mark.slow
def test_a_run_with_a_frozen_block(finished, tiny_data, compiled, tmp_path, capsys):
    """It trains from weights, says what is frozen, and goes on as if never stopped."""
    config = tiny.make_config(
        tiny_data, train__freeze="1", train__init_from=str(finished.workdir), train__epochs=1,
        data__validation="", checkpoint__keep=9,
    )  # fmt: skip
    assert train.train(config, tmp_path / "run") == 0
    log = capsys.readouterr().err
    assert "parameters: 207,448 (110,604 trained, 96,844 frozen)" in log
    assert log.count("  blocks                        50,048") == 2

    start, first = restore_params(finished.workdir), freezing(config)
    for average in (True, False):
        params = restore_params(tmp_path / "run", average)
        jax.tree.map(np.testing.assert_array_equal, first.frozen(params), first.frozen(start))
        trained = zip(
            *(jax.tree.leaves(first.trained(tree)["blocks"]) for tree in (params, start)),
            strict=True,
        )
        assert all(np.any(own != other) for own, other in trained)

    resumed = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    unfinish(resumed, 2)
    assert train.train(config, resumed) == 0
    ours, theirs = (
        (folder / "metrics.jsonl").read_bytes() for folder in (resumed, tmp_path / "run")
    )
    assert ours == theirs and len(split_of(resumed, "train")) == 4
    jax.tree.map(
        np.testing.assert_array_equal, restore_params(resumed), restore_params(tmp_path / "run")
    )


@pytest.mark.parametrize("freeze", FROZEN)
def test_both_parts_together_are_the_whole(tiny_data, freeze):
    config = tiny.make_config(tiny_data, train__freeze=freeze)
    part = freezing(config)
    params = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), abstract_params(config))
    trained, frozen = part.trained(params), part.frozen(params)
    assert set(params) - set(trained) == FROZEN[freeze]
    assert set(frozen) - set(trained) == FROZEN[freeze]
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, frozen, params)]
    assert sizes[0] + sizes[1] == sizes[2]
    if freeze == "1":
        kernel = params["blocks"]["mlp"]["fc1"]["kernel"]
        np.testing.assert_array_equal(trained["blocks"]["mlp"]["fc1"]["kernel"], kernel[1:])
        np.testing.assert_array_equal(frozen["blocks"]["mlp"]["fc1"]["kernel"], kernel[:1])
