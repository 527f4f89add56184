"""Configs from recipes, the command line and stored JSON.

A recipe in `configs/` is a file whose `get_config(argument)` starts from `default_config()` and
sets some fields. The command line names the file, with an argument after a colon if the recipe
takes one, and overrides single fields: `--config=configs/k400.py:small --config.train.epochs=3`.
The recipes of this package go by their names as well, wherever the program is started:
`--config=k400:small`.
Every mistake in a config is a `UserError` of one line.
"""

import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from fluxvit_jax import recipes
from fluxvit_jax.config.checks import check_name, check_names, suggestion, type_message, validate
from fluxvit_jax.config.fields import as_tuple, default_config, flatten, hint_at_range, upgraded
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.errors import UserError


def define_flag(
    flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
    """Defines `--config`, with `--config.a.b=VALUE` for every field; `argv` as for sys.argv."""
    return config_flags.DEFINE_config_file(
        "config",
        default=None,
        help_string="Recipe, such as configs/k400.py:small, or k400:small where the file is not "
        "at hand; --config.a.b=VALUE sets a field of it.",
        flag_values=flag_values,
        sys_argv=argv,
    )


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses a command line in which `located` has found the recipe.

    Afterwards the value of `define_flag`'s flag is a locked, validated config, or None without a
    recipe. Returns the name of the program. Raises UserError for every mistake in any flag.
    """
    recipe = flag_argument(argv, "config")
    if recipe is not None:
        check_names(flatten(read_recipe(recipe)))
    for name in override_names(argv):
        check_name(name)
        if recipe is None:
            raise UserError(f"--config.{name}: no recipe to set it in; add one: --config=RECIPE")
    try:
        program, *rest = flag_values(argv)
    except (flags.Error, ValueError) as error:
        raise UserError(_flag_message(error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: every option starts with --")
    config = flag_values["config"].value
    if config is not None:
        overrides = flag_values["config"].override_values  # type: ignore[attr-defined]  # ml_collections
        _follow_variant(config, overrides)
        validate(config)
    return [program]


def load_config(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of `recipe`, "configs/k400.py:small,single=2048", with `overrides` applied.

    Overrides are written as on the command line: "--config.train.epochs=3". Raises UserError.
    """
    argv = located(["load_config", f"--config={recipe}", *overrides])
    flag_values = flags.FlagValues()
    define_flag(flag_values, argv)
    parse_flags(argv, flag_values)
    return flag_values["config"].value


def shipped() -> dict[str, str]:
    """The paths of this package's recipes, by their names."""
    files = sorted(Path(recipes.__path__[0]).glob("*.py"))
    return {file.stem: str(file) for file in files if file.stem not in ("__init__", "common")}


def located(argv: Sequence[str]) -> list[str]:
    """A command line in which `--config=NAME:ARGUMENT` names the file of a recipe of ours.

    Nothing changes where there is a file of that name already.

    Raises UserError for two recipes: fields set between them would be those of the first.
    """
    recipe = flag_argument(argv, "config") or ""
    first, *others = _flag_arguments(argv, "config") or [recipe]
    if set(others) - {first}:
        raise UserError(f"--config={first} and --config={recipe}: leave one of them out")
    path, colon, argument = recipe.partition(":")
    if Path(path).is_file() or path not in shipped():
        return [*argv]
    found = f"{shipped()[path]}{colon}{argument}"
    spellings = {f"{flag}{recipe}": f"{flag}{found}" for flag in ("", "--config=", "-config=")}
    return [spellings.get(argument, argument) for argument in argv]


def read_recipe(recipe: str) -> ConfigDict:
    """The config from `get_config` of "FILE" or "FILE:ARGUMENT", not yet validated.

    Raises UserError if the file is missing or fails, with the line of the file that fails.
    """
    path, colon, argument = recipe.partition(":")
    if not Path(path).is_file():
        nearby = sorted(str(file) for file in Path(path).parent.glob("*.py"))
        nearby = [*shipped()] if path.isidentifier() else nearby
        kind = "recipe" if path.isidentifier() else "file"
        raise UserError(f"--config={recipe}: no {kind} {path}{suggestion(path, nearby)}")
    root = str(Path(path).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)  # a recipe of one's own may import its neighbors
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if colon else get_config()
    except UserError as error:
        raise UserError(f"--config={recipe}: {error}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        message = next(iter(str(error).splitlines()), "")
        # ConfigDict refuses a tuple for a text: "(6, 24, 2) is of original type ...".
        given = re.search(r"[(\[]\d+, \d+, \d+[)\]](?= is of original type)", message)
        hint = f"; {given[0]}{hint_at_range(given[0])}" if given else ""
        raise UserError(f"{where}: {type(error).__name__}: {message}{hint}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returns {type(config).__name__}, not a ConfigDict")
    return config


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """The validated config of a `config.json` or of `ConfigDict.to_dict`; absent fields: default.

    Raises UserError.
    """

    def merged(default: Any, value: Any) -> Any:
        if isinstance(default, dict) and isinstance(value, Mapping):
            return default | {name: merged(default.get(name), value[name]) for name in value}
        return as_tuple(value)

    config = ConfigDict(merged(default_config().to_dict(), upgraded(values)))
    validate(config)
    return config


def flag_argument(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name=VALUE` or `--name VALUE` in argv, if it is there.

    Of several it is the last, as absl has it.
    """
    values = _flag_arguments(argv, name)
    return values[-1] if values else None


def _flag_arguments(argv: Sequence[str], name: str) -> list[str | None]:
    """All values of a flag, in their order."""
    pairs = zip(argv, [*argv[1:], None], strict=True)
    matches = ((re.fullmatch(rf"--?{name}(?:=(.*))?", own), following) for own, following in pairs)
    return [following if match[1] is None else match[1] for match, following in matches if match]


def override_names(argv: Sequence[str]) -> list[str]:
    """The fields of the config that a command line sets, "train.epochs" of each."""
    matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv)
    return [match[1] for match in matches if match]


def _flag_message(error: Exception) -> str:
    """absl's error as one line; for one of our fields, the message that `validate` would give."""
    message = " ".join(str(error).split())
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
    return type_message(match[1], match[2]) if match else message


def _follow_variant(config: ConfigDict, overridden: Mapping[str, Any]) -> None:
    """Sets the native grid of a variant from the command line, unless that is given as well."""
    variant = VARIANTS.get(config.model.variant)
    if variant and "model.variant" in overridden:
        for side in ("frames", "resolution"):
            if f"model.{side}" not in overridden:
                config.model[side] = getattr(variant, side)
