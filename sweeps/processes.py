"""Many processes and many devices, on jax's own engine: where a process stands among them.

jax.distributed makes the processes known to each other. Each computes its share of what is missing
on its own devices and stores it under the lock that process 0 holds; nothing else is exchanged.
A process that dies leaves its share undone and the others at work; without process 0, jax ends
them.
"""

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from sweeps.store import Store

AUTO = "auto"  # as a number of processes: let jax ask the cluster
PATIENCE = 240  # seconds for process 0 to come
HEARTBEAT = 30  # seconds without one, and a process counts as dead
MOST = 65535  # of processes, and the highest port
MOST_DEVICES = 1024  # of one process; XLA makes more of a CPU without an end in sight


@dataclass(frozen=True)
class Place:
    """One process of `count`; devices: those of its own to spread each call over, if chosen."""

    index: int = 0
    count: int = 1
    devices: tuple[Any, ...] | None = None

    @property
    def name(self) -> str:
        """What a line of progress starts with."""
        return f"process {self.index}: " if self.count > 1 else ""

    def mesh(self, heads: int) -> Any:
        """The devices as error_curves takes them, for inputs of so many key/value heads."""
        from jax.sharding import Mesh

        if self.devices is None:
            return None
        across = math.gcd(len(self.devices), heads)
        return Mesh(np.array(self.devices).reshape(-1, across), ("recipes", "heads"))

    def begin(
        self,
        store: Store,
        manifest: Mapping[str, Any],
        keys: Sequence[str],
        note: Callable[[str], object],
    ) -> dict[str, dict[str, Any]]:
        """The finished parts: process 0 writes the manifest, then all look, then any may write."""
        if self.index == 0:
            finished = store.begin(manifest, keys, note)
        self.wait()
        if self.index:
            finished = store.join(keys)
        self.wait()
        return finished

    def wait(self) -> None:
        """Returns once every process is here; raises ConnectionError if one no longer lives."""
        if self.count > 1:
            _interruptible(_meet)

    def leave(self) -> None:
        if self.count > 1:
            import jax

            jax.distributed.shutdown()


def check(processes: str | None, process: int | None, coordinator: str | None) -> None:
    """Raises ValueError unless the three say where this process stands, or nothing at all."""
    rest = {"--process": process, "--coordinator": coordinator}
    given = [name for name, value in rest.items() if value is not None]
    if processes is None or processes == AUTO:
        if given:
            raise ValueError(f"{given[0]} goes with --processes N, a number")
        return
    if not (processes.isascii() and processes.isdecimal()) or not 1 <= int(processes) <= MOST:
        raise ValueError(f"--processes must be a number from 1 or {AUTO!r}, got {processes!r}")
    if process is None or coordinator is None:
        raise ValueError(
            f"--processes {processes} needs --process I and --coordinator HOST:PORT as well"
        )
    if not 0 <= process < int(processes):
        raise ValueError(f"--process must be from 0 to {int(processes) - 1}, got {process}")
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= MOST:
        raise ValueError(f"--coordinator must be HOST:PORT of process 0, got {coordinator!r}")


def place_of(
    processes: str | None,
    process: int | None,
    coordinator: str | None,
    devices: int | None,
    note: Callable[[str], object],
) -> Place:
    """Joins the other processes and finds the devices: before anything starts jax's backend.

    The arguments are those that `check` lets pass. Raises ValueError for a cluster that jax does
    not find and for fewer devices than asked for.
    """
    import jax

    if devices is not None:
        with contextlib.suppress(RuntimeError):  # a backend that has started has what it has
            jax.config.update("jax_num_cpu_devices", devices)
    index, count = 0, 1
    if processes is not None and (processes == AUTO or int(processes) > 1):
        if processes == AUTO:
            note("looking for the other processes")
            _connect()
        else:
            whom = "the others" if process == 0 else f"process 0, {PATIENCE} seconds at most,"
            note(f"process {process} of {processes}: waiting for {whom} at {coordinator}")
            _reach(coordinator, process == 0)
            _connect(coordinator, int(processes), process)
        index, count = jax.process_index(), jax.process_count()
    return Place(index, count, None if devices is None else _local_devices(devices))


def _reach(coordinator: str | None, first: bool) -> None:
    """What jax would not survive: a port that is taken, a host that is not there."""
    host, _, port = str(coordinator).rpartition(":")
    host = host.strip("[]")
    try:
        socket.getaddrinfo(host, int(port))
        if first:
            with socket.create_server(("", int(port))):
                return
    except OSError as error:
        raise ValueError(f"--coordinator {coordinator}: {error.strerror or error}") from None
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5):
            return
        if time.monotonic() > deadline:
            raise ConnectionError(f"process 0 did not come to {coordinator} in {PATIENCE} seconds")
        time.sleep(0.5)


def _connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    import jax

    # One that dies does not end the others, and SIGTERM ends a process as it would any other.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        raise ValueError(
            f"--processes {AUTO}: jax finds no cluster here ({error}); say --processes N "
            "--process I --coordinator HOST:PORT"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"no connection to the other processes ({error})") from None


def _local_devices(count: int) -> tuple[Any, ...]:
    import jax

    devices = jax.local_devices()
    if len(devices) < count:
        raise ValueError(
            f"--devices {count}: this process has {len(devices)} ({devices[0].device_kind})"
        )
    return tuple(devices[:count])


def _meet() -> None:
    import jax
    from jax.experimental.multihost_utils import ProcessFailureError, live_devices

    try:
        with live_devices(jax.devices()):
            pass
    except ProcessFailureError as error:
        lost = sorted({device.process_index for device in error.failed_devices})
        raise ConnectionError(f"process {', '.join(map(str, lost))} ended early") from None
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"process 0 ended early ({error})") from None


def _interruptible(call: Callable[[], None]) -> None:
    """Calls in a thread: Ctrl-C is not heard while the main one waits inside C++."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        done.result()
    except KeyboardInterrupt:
        import jax

        jax.distributed.shutdown()  # which ends the call: no thread may outlive the interpreter
        thread.join(HEARTBEAT)
        raise
