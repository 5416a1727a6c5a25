"""What the project's command lines share: exit codes, a line for what was typed wrong, and where
compiled programs are kept."""

import _thread
import contextlib
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import typer

AGAIN = 0.05  # seconds after which the callback has ended
# click's ClickException, wherever this version of typer keeps it
CLI_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])


def call(app: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """The exit code of a command line, by default this process's; raises CLI_ERROR for what was
    typed wrong, and KeyboardInterrupt, which typer makes a code of 130."""
    with _interruptible():
        code = app(arguments, prog_name=program, standalone_mode=False) or 0
    if code == 130:
        raise KeyboardInterrupt
    return int(code)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is raised again where it met jax's garbage-collection callback, which ignores it."""
    hook = sys.unraisablehook

    def ignored(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN, _thread.interrupt_main).start()
        else:
            hook(what)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook


def fail(program: str, message: object, code: int) -> NoReturn:
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def use_compilation_cache() -> None:
    """Keep compiled programs under the user's cache directory, one folder per kind of CPU.

    Changes jax's configuration for the whole process: for a command line only. Does nothing where
    the user has set a cache already, or where the folder cannot be made.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(base, "jaxattn", f"xla-{_cpu()}")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError:
        return
    if os.access(path, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cpu() -> str:
    """A short hash of the CPU's features: programs compiled for one may not run on another."""
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
