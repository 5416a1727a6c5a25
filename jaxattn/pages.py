"""A stream's keys and values by pages, made once for all passes where as many can be kept."""

from typing import Any

import numpy as np

PAGE_KEYS = 2**14
KEPT = 2**28  # bytes of pages that are kept for walks that come back to them
FEWEST = 4  # pages that are kept at least: walks that go on together need no more

Page = tuple[np.ndarray, np.ndarray]


class Pages:
    """stop: the first key that nobody reads."""

    def __init__(self, stream: Any, stop: int) -> None:
        self.stream, self.stop = stream, stop
        self.made: dict[int, Page] = {}  # by number, the last one read last
        self.dtypes: list[np.dtype] = []  # of key and value

    def read(self, start: int, stop: int) -> Page:
        """Key [stop - start, K, H] and value [stop - start, K, D]."""
        keys, values = [], []
        for number in range(start // PAGE_KEYS, -(-stop // PAGE_KEYS)):
            first = number * PAGE_KEYS
            piece = slice(max(start - first, 0), stop - first)
            key, value = self._page(number)
            keys.append(key[piece])
            values.append(value[piece])
        if len(keys) == 1:
            return keys[0], values[0]
        return np.concatenate(keys), np.concatenate(values)

    def forget(self, below: int) -> None:
        """Lets go of the pages of keys below that one."""
        self.made = {n: page for n, page in self.made.items() if (n + 1) * PAGE_KEYS > below}

    def _page(self, number: int) -> Page:
        page = self.made.pop(number, None)
        if page is None:
            start = number * PAGE_KEYS
            page = self._make(start, min(start + PAGE_KEYS, self.stop))
            size = sum(x.nbytes for x in page)
            while len(self.made) >= FEWEST and (len(self.made) + 1) * size > KEPT:
                # Not the oldest: a walk that comes back asks for those first.
                del self.made[list(self.made)[-FEWEST]]
        self.made[number] = page
        return page

    def _make(self, start: int, stop: int) -> Page:
        key, value = map(np.asarray, self.stream.blocks(start, stop))
        self.dtypes = self.dtypes or [key.dtype, value.dtype]
        dims = self.stream.head_dim, self.stream.value_dim
        shapes = [(stop - start, self.stream.heads, dim) for dim in dims]
        due = list(zip(self.dtypes, shapes, strict=True))
        got = [(x.dtype, x.shape) for x in (key, value)]
        if got != due:
            expected, found = (
                ", ".join(f"{dtype} {list(shape)}" for dtype, shape in some) for some in (due, got)
            )
            raise ValueError(
                f"blocks({start}, {stop}) of a Stream must give key and value as {expected}: the "
                f"keys asked for, of one dtype throughout; got {found}"
            )
        return key, value
