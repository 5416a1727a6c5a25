"""The command line, run in this process."""

from jaxattn import __main__ as cli


def run(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of `jaxattn` with these arguments."""
    monkeypatch.setattr("sys.argv", ["jaxattn", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()
