"""command: what both command lines share."""

import time

import pytest
import typer

from jaxattn.command import call


def test_an_interrupt_that_was_ignored_comes_again():
    app = typer.Typer()

    class Ignores:
        def __del__(self):
            raise KeyboardInterrupt

    @app.command()
    def work():
        Ignores()
        for _ in range(1000):
            time.sleep(0.01)
        raise AssertionError("the interrupt was lost")

    with pytest.raises((KeyboardInterrupt, typer.Abort)):
        call(app, "work", [])
