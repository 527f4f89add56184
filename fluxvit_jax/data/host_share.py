"""The items that one host makes of each global batch."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


Plan = Any  # what is made an item of: its number, or a tuple of that and other numbers
Make = Callable[[Plan], Arrays]


class Items(Protocol):
    """A random-access sequence of items, each a dict of arrays with a leading axis.

    Item n is `make(plan(n))`: plans are made in the main process, `make` goes to its workers.
    """

    def __len__(self) -> int: ...

    def plan(self, number: int, /) -> Plan: ...

    @property
    def make(self) -> Make: ...


class NumberedItems:
    """Items that are made of their number alone, by `__getitem__`."""

    def __getitem__(self, number: int) -> Arrays:
        raise NotImplementedError

    def plan(self, number: int) -> Plan:
        return number

    @property
    def make(self) -> Make:
        return self.__getitem__


def make_numbered(make: Make, numbered: tuple[int, Plan]) -> Arrays:
    """The item of a plan that bears a number, by which the main process knows it again."""
    return make(numbered[1])


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
        return self.make(self.plan(number))

    def plan(self, number: int) -> Plan:
        step, row = divmod(number, self.per_batch)
        place = (self._start_step + step) * self._items_per_batch + self._rows[row]
        return self._items.plan(place)

    @property
    def make(self) -> Make:
        return self._items.make
