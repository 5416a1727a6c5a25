"""The process that draws: it waits for rows, says what it cannot draw, and never stays behind."""

import subprocess

import pytest

from sweeps.drawing import drawing


@pytest.fixture
def started(monkeypatch):
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return processes


def test_what_was_not_asked_for_ends(started):
    with drawing():
        assert started[0].poll() is None
    assert started[0].returncode is not None


def test_an_interrupted_run_ends_it_too(started):
    with pytest.raises(KeyboardInterrupt), drawing():
        raise KeyboardInterrupt
    assert started[0].returncode is not None


def test_what_cannot_be_drawn_is_said(tmp_path, capfd):
    with drawing() as draw:
        assert not draw(tmp_path)
    said = capfd.readouterr().err
    assert said.startswith(f"plots: {tmp_path}") and said.count("\n") == 1
