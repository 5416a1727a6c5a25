"""What the project's command lines share: one line for what was typed wrong, and an exit code."""

import sys
from typing import NoReturn, cast

import typer

# click's ClickException, wherever this version of typer keeps it
CLI_ERROR = cast(type[Exception], typer.BadParameter.__mro__[2])


def fail(program: str, message: object, code: int) -> NoReturn:
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)
