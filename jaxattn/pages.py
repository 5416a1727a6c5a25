"""A stream's keys and values by pages, each made once for all passes."""

from typing import Any

import numpy as np

PAGE_KEYS = 2**14
KEPT = 2**28  # bytes of pages that are kept for walks that come back to them

Page = tuple[np.ndarray, np.ndarray]


class Pages:
    """stop: the first key that nobody reads."""

    def __init__(self, stream: Any, stop: int) -> None:
        self.stream, self.stop = stream, stop
        self.made: dict[int, Page] = {}  # by number, the last one read last

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
            key, value = self.stream.blocks(start, min(start + PAGE_KEYS, self.stop))
            page = np.asarray(key), np.asarray(value)
            size = sum(x.nbytes for x in page)
            while len(self.made) * size > KEPT:
                del self.made[next(iter(self.made))]
        self.made[number] = page
        return page
