"""The float64 reference of a stream, taken in by threads of its own while passes walk the keys."""

import functools
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from jaxattn import reference
from jaxattn.pages import PAGE_KEYS, Pages

AHEAD = 2  # pages that may wait for it


class Exact:
    """Reference outputs at ascending contexts: a state that takes in the keys as passes go.

    It has as many threads as NumPy's products had, each of which makes its products alone: those of
    OpenBLAS wait for each other without rest, and XLA's for them.
    """

    def __init__(self, pages: Pages, query: np.ndarray, contexts: list[int]) -> None:
        self.pages, self.query, self.contexts = pages, query, contexts
        self.state: reference.State | None = None
        self.at = 0
        self.waiting: list[tuple[int, Future]] = []
        self.known: dict[int, Future] = {}
        self.failed: BaseException | None = None
        self.stack = ExitStack()  # an interrupt while one thing ends does not keep the others

    def __enter__(self) -> "Exact":
        threads = self.stack.enter_context(ONE_THREAD)
        self.pool = self.stack.enter_context(ThreadPoolExecutor(threads, "reference"))
        self.worker = ThreadPoolExecutor(1, "reference")
        self.stack.callback(self.worker.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def advance(self, position: int) -> None:
        """Takes in whole pages, and what leads up to a context, as far as `position`."""
        while (stop := next((n for n in self.contexts if n > self.at), None)) is not None:
            end = min(self.at - self.at % PAGE_KEYS + PAGE_KEYS, stop)
            if end > position:
                return
            piece = self.worker.submit(self._extend, *self.pages.read(self.at, end), end == stop)
            if end == stop:
                self.known[stop] = piece
            self.waiting.append((end, piece))
            self.at = end
            while self.waiting[0][0] <= end - AHEAD * PAGE_KEYS:
                self.waiting.pop(0)[1].result()

    def _extend(self, key: np.ndarray, value: np.ndarray, finish: bool) -> Any:
        if self.failed is not None:  # what follows would lack keys
            raise self.failed
        try:
            self.state = reference.extend(self.state, self.query, key, value, self.pool.map)
        except BaseException as error:
            self.failed = error
            raise
        return reference.finish(self.state) if finish else None

    def __call__(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """(output [K, R, D], log-sum-exp [K, R]) in float64 over the first `context` keys."""
        self.advance(context)
        return self.known[context].result()


class _OneThread:
    """NumPy's products have one thread from the first that enters to the last that leaves.

    Entering tells how many they had.
    """

    def __init__(self) -> None:
        self.lock, self.users, self.count = threading.Lock(), 0, 1

    def __enter__(self) -> int:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self.count = thread_count()
                self.limit = _threads().limit(limits=1, user_api="blas")
            return self.count

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.limit.restore_original_limits()


ONE_THREAD = _OneThread()


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def thread_count() -> int:
    """Threads that NumPy's products may take now."""
    found = [x["num_threads"] for x in _threads().info() if x["user_api"] == "blas"]
    return max(found, default=os.cpu_count() or 1)
