"""The version of this program in the config that a run leaves, for messages of other versions."""

from collections.abc import Mapping
from typing import Any

from fluxvit_jax.config.checks import check_types
from fluxvit_jax.config.fields import FIELDS, flatten, upgraded
from fluxvit_jax.errors import UserError
from fluxvit_jax.version import __version__

KEY = "version"  # beside the sections of the config


def stamp(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file for a run's config, a nested dict."""
    return {KEY: __version__, **config}


def unstamp(content: Any, source: Any) -> dict[str, Any]:
    """The config that the file `source` holds; content: the value of its JSON.

    Raises UserError: it is no nested dict of sections, a field has a value of another type, or this
    version does not know it.
    """
    damaged = UserError(f"{source}: is not the config of a run; bring the file back from a copy")
    if not isinstance(content, Mapping) or _sections_without_fields(content):
        raise damaged
    config = {name: value for name, value in content.items() if name != KEY}
    try:
        values = flatten(upgraded(config))
    except TypeError as error:  # a list where a name belongs
        raise damaged from error
    if unknown := values.keys() - FIELDS.keys():
        writer = f"version {content[KEY]}" if KEY in content else "another version"
        raise UserError(
            f"{source}: written by {writer} of fluxvit_jax; this is version {__version__}, which "
            f"does not know its {', '.join(sorted(unknown))}"
        )
    try:
        check_types({name: field.default for name, field in FIELDS.items()} | values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return config


def _sections_without_fields(content: Mapping[str, Any]) -> list[str]:
    """The sections, such as "data.grids", in whose place is something else than a dict."""
    return [n for n in flatten(content) if any(field.startswith(f"{n}.") for field in FIELDS)]
