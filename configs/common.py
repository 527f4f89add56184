"""What recipes share: reading the text after the colon of `--config=configs/k400.py:TEXT`.

Nothing else: a recipe is copied and changed, never inherited from.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fluxvit_jax.errors import UserError

VARIANTS = {"small": "S", "base": "B", "large": "L"}


class Options(NamedTuple):
    """variant: a key of `fluxvit_jax.config.VARIANTS`. budgets: tokens of each training pass."""

    variant: str
    budgets: tuple[int, ...]
    recipe: str


def parse(text: str, recipes: Sequence[str] = ()) -> Options:
    """Options of "VARIANT,single=TOKENS,recipe=NAME"; every part may be left out.

    The variant is base unless named. `single` trains one budget (Flux-Single) in place of the three
    of Flux-Multi [T3]. `recipes` are the names that the recipe knows, the default first.

    Raises UserError for a part that is none of these.
    """
    variant, budgets, recipe = "base", (3072, 2048, 1024), recipes[0] if recipes else ""
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            variant = _one_of(part, tuple(VARIANTS))
        elif name == "single" and value.isdecimal():
            budgets = (int(value),)
        elif name == "recipe" and recipes:
            recipe = _one_of(value, recipes)
        else:
            known = "single=TOKENS" + (f" or recipe={'|'.join(recipes)}" if recipes else "")
            raise UserError(f"{part!r} is not {known}")
    return Options(VARIANTS[variant], budgets, recipe)


def _one_of(word: str, known: Sequence[str]) -> str:
    if word not in known:
        raise UserError(f"{word!r} is none of {', '.join(known)}")
    return word
