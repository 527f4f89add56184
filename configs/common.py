"""The text after the colon of `--config=configs/k400.py:TEXT`, of recipes for real data sets."""

from collections.abc import Sequence
from dataclasses import dataclass

from fluxvit_jax.errors import UserError

VARIANTS = {"small": "S", "base": "B", "large": "L"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """variant: a key of `fluxvit_jax.config.VARIANTS`. budgets: tokens of each training pass.

    data: what to train on, "" where it is not said.
    """

    variant: str
    budgets: tuple[int, ...]
    recipe: str
    data: str


def parse(
    text: str,
    recipes: Sequence[str] = (),
    budgets: tuple[int, ...] = (3072, 2048, 1024),
    data: bool = False,
    word: str = "recipe",
) -> Options:
    """Options of "VARIANT,single=TOKENS,recipe=NAME,data=LIST"; every part may be left out.

    The variant is base unless named. `single` trains one budget (Flux-Single) in place of `budgets`
    (by default those of Flux-Multi [T3]). `recipes` are the names that the recipe knows, the
    default first; `word` is what they are chosen by. Only where `data` is true may it be named.

    Raises UserError for a part that is none of these.
    """
    variant, recipe, named = "base", recipes[0] if recipes else "", ""
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            variant = _one_of(part, tuple(VARIANTS))
        elif name == "single" and value.isdecimal():
            budgets = (int(value),)
        elif name == word and recipes:
            recipe = _one_of(value, recipes)
        elif name == "data" and data:
            named = value
        else:
            known = ["single=TOKENS"]
            known += [f"{word}={'|'.join(recipes)}"] * bool(recipes) + ["data=LIST"] * data
            raise UserError(f"{part!r} is not {' or '.join(known)}")
    return Options(variant=VARIANTS[variant], budgets=budgets, recipe=recipe, data=named)


def _one_of(word: str, known: Sequence[str]) -> str:
    if word not in known:
        raise UserError(f"{word!r} is none of {', '.join(known)}")
    return word
