"""The recipes: the folder `configs` of a clone. A wheel holds its files here, without this one."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "configs")]
