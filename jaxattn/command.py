"""What the project's command lines share: one line for what was typed wrong, and an exit code."""

import sys
from typing import NoReturn, cast

import typer

# click's ClickException, wherever this version of typer keeps it
CLI_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])


def call(app: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """The exit code of a command line, by default this process's; raises CLI_ERROR for what was
    typed wrong, and KeyboardInterrupt, which typer makes a code of 130."""
    code = app(arguments, prog_name=program, standalone_mode=False) or 0
    if code == 130:
        raise KeyboardInterrupt
    return int(code)


def fail(program: str, message: object, code: int) -> NoReturn:
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
