"""Settings of an evaluation: a token budget, the grid it selects from, the head it uses."""

from typing import NamedTuple

from ml_collections import ConfigDict

from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid, kept_tokens, nearest_head
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.token_optimization import planner


class Setting(NamedTuple):
    """Setting of an evaluation: token budget, grid that the tokens are selected from, and head."""

    budget: int
    grid: Grid
    head: int


def settings_of(config: ConfigDict) -> list[Setting]:
    """`eval.settings`, each with the head trained at the nearest budget."""
    return [
        Setting(budget, Grid.square(*size), nearest_head(budget, config.train.budgets))
        for budget, *size in config.eval.settings
    ]


def tokens_kept(model: FluxViTConfig, grid: Grid, budget: int) -> int:
    """Number of tokens that a budget keeps of a grid, with CLS if it counts in the budget."""
    inside = model.cls == "inside"
    return kept_tokens(grid, budget - inside, model.rounding) + inside


def planned_or_given(config: ConfigDict, params: dict) -> list[Setting]:
    """The setting that the report `eval.plan` chose for each budget; without one, `eval.settings`.

    Raises UserError: a report of other weights, or one that chose nothing.
    """
    if not config.eval.plan:
        return settings_of(config)
    report = compute_on_host0(lambda: planner.read_report(config.eval.plan))
    planner.check_weights(report, fluxvit.network_params(params), config.eval.plan)
    cells = planner.chosen_cells(report)
    if not cells:
        raise UserError(f"{config.eval.plan}: chose no cells that select; let --mode=search finish")
    for note in report["notes"]:
        say(f"warning: {config.eval.plan}: {note}")
    return [
        Setting(cell["budget"], Grid.square(cell["frames"], cell["resolution"]), cell["head"])
        for cell in cells
    ]
