"""What the command line says, and the page that it writes."""

import pytest


@pytest.fixture
def run(run):
    """Calls the command line: (exit code, what it says in one line)."""

    def call(*arguments):
        found = run(*arguments)
        return found.exit_code, " ".join(found.output.split())

    return call


@pytest.fixture
def page(run):
    """Optimizes the model of the folder; gives what is said and the page of the report."""

    def made(work, *arguments):
        data = ("--data", "d.npz", "--bench-seconds", 0)
        code, told = run("optimize", "m.onnx", "o.onnx", *data, "--report", "r.html", *arguments)
        assert code == 0, told
        return told, (work / "r.html").read_text()

    return made
