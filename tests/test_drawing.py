"""The process that draws: it waits for rows, says what it cannot draw, and never stays behind."""

import subprocess

import pytest

import sweeps.__main__ as cli
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


def test_a_run_that_is_interrupted_while_it_draws_leaves_no_figure(tmp_path):
    def interrupted(root):
        raise KeyboardInterrupt

    (tmp_path / "_figures").mkdir()
    (tmp_path / "_figures" / "passing.svg").write_text("half")
    (tmp_path / "_figures" / "mine.svg").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        cli._drawn(interrupted, tmp_path)
    assert [path.name for path in (tmp_path / "_figures").iterdir()] == ["mine.svg"]


def test_what_cannot_be_drawn_is_said(tmp_path, capfd):
    with drawing() as draw:
        assert not draw(tmp_path)
    said = capfd.readouterr().err
    assert said.startswith(f"plots: {tmp_path}") and said.count("\n") == 1
