"""The version of this program in the config that a run leaves, for messages of other versions."""

from collections.abc import Mapping
from typing import Any

from fluxvit_jax.config.fields import FIELDS, flatten, upgraded
from fluxvit_jax.errors import UserError
from fluxvit_jax.version import __version__

KEY = "version"  # beside the sections of the config


def stamp(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file for a run's config, a nested dict."""
    return {KEY: __version__, **config}


def unstamp(content: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """The config that the file `source` holds.

    Raises UserError for fields that this version does not know.
    """
    config = {name: value for name, value in content.items() if name != KEY}
    if unknown := flatten(upgraded(config)).keys() - FIELDS.keys():
        writer = f"version {content[KEY]}" if KEY in content else "another version"
        raise UserError(
            f"{source}: written by {writer} of fluxvit_jax; this is version {__version__}, which "
            f"does not know its {', '.join(sorted(unknown))}"
        )
    return config
