"""Cells of CSV files that people open in a spreadsheet."""

from fluxvit_jax.distributed import storage

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # the beginning of a cell that a spreadsheet computes


def cell(text: storage.PathLike) -> str:
    """A text that no spreadsheet takes for a formula; bytes that are no UTF-8 are escaped."""
    text = storage.display_name(text)
    return f"'{text}" if text.startswith(FORMULA) else text
