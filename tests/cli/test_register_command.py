"""A command made outside the package, run as ``xent NAME``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from contributing import run_example
from xent.cli import _registry, register_command
from xent.cli.commands import cli


@pytest.fixture(autouse=True)
def classes_command(monkeypatch):
    """Register the worked example, for one test."""
    monkeypatch.setattr(_registry, "_COMMANDS", dict(_registry._COMMANDS))
    run_example("A command")


def test_the_worked_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.csv").write_text("u,kind\n1,a\n2,b\n3,a\n4,a\n")
    done = CliRunner().invoke(cli, ["classes", "f.csv", "--label", "kind"])
    assert (done.exit_code, done.stdout) == (0, "a  3\nb  1\n")
    assert "classes" in CliRunner().invoke(cli, ["--help"]).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.csv", "--label", "kind"], "xent: none.csv: no such file\n"),
        (["none.csv"], "xent: Missing option '--label'. (xent classes --help)\n"),
    ],
)
def test_its_errors_are_a_line_and_an_exit_code(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["classes", *arguments], prog_name="xent")
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", said)


def test_a_command_is_imported_when_it_is_asked_for(tmp_path):
    register_command("late", "a_module_that_is_not_there:late")
    assert CliRunner().invoke(cli, ["fit", "--help"]).exit_code == 0
    done = CliRunner().invoke(cli, ["late"])
    assert isinstance(done.exception, ModuleNotFoundError)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="there is a command called 'fit' already"):
        register_command("fit", "somewhere:else")


def test_starting_imports_no_command():
    code = (
        "import sys; from xent.cli.commands import cli; "
        "print({'xent.cli.fit', 'xent.verify', 'rich', 'sklearn', 'scipy', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("package", ["click", "rich"])
def test_a_missing_package_of_the_command_line_is_one_line(package):
    code = f"import sys; sys.modules[{package!r}] = None; from xent.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "fit"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"xent: the command line needs {package}: pip install 'xent[cli,probe]'\n"
