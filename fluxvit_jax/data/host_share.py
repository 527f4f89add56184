"""The items that one host makes of each global batch."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Items(Protocol):
    """A random-access sequence of items, each a dict of arrays with a leading axis."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Arrays: ...


class HostShare:
    """The items that one host makes: those at `rows` of each global batch, in order.

    Its length is a whole number of batches, the same for all hosts, so it may index `items` beyond
    their length.

    items_per_batch: of a global batch. rows: all by default.
    """

    def __init__(
        self,
        items: Items,
        items_per_batch: int,
        rows: Sequence[int] | None = None,
        start_step: int = 0,
    ):
        self._items = items
        self._items_per_batch = items_per_batch
        self._rows = [int(row) for row in (range(items_per_batch) if rows is None else rows)]
        self._start_step = start_step

    @property
    def per_batch(self) -> int:
        """Items of a batch that this host makes."""
        return len(self._rows)

    def __len__(self) -> int:
        # In integers: training groups are 2**62.
        batches = (len(self._items) + self._items_per_batch - 1) // self._items_per_batch
        return max(0, batches - self._start_step) * self.per_batch

    def __getitem__(self, number: int) -> Arrays:
        step, row = divmod(number, self.per_batch)
        return self._items[(self._start_step + step) * self._items_per_batch + self._rows[row]]
