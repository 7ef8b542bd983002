"""Docstrings say what a function does and what a class is, in words that stand on their own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "xent"
FILES = sorted(SOURCE.rglob("*.py"))
RIDDLE = re.compile(r"(What|Where|Whether|Of|How|Which|With)\b")
VERB = re.compile(
    r"(Add|Apply|Check|Choose|Compare|Compute|Connect|Convert|Cut|Decode|Describe|"
    r"Disable|Do|Draw|Find|Fit|Flatten|Format|Gather|Handle|Hash|Have|Hold|Iterate|"
    r"Join|Load|Make|Match|Maximise|Minimise|Move|Multiply|Name|Note|Number|Open|"
    r"Print|Put|Raise|Read|Register|Remove|Replace|Resolve|Return|Run|Say|Scatter|Send|Set|"
    r"Shift|Show|Solve|Split|Start|Subtract|Sum|Summarise|Take|Turn|Use|Validate|"
    r"Warn|Write|Yield)\b"
)
"""The words that a function's docstring opens with; add a verb that is missing."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Docstring(NamedTuple):
    line: int
    text: str
    of_function: bool  # False for modules, classes, properties and attributes


def docstrings(code: str) -> Iterator[Docstring]:
    """Yield the docstrings of a module, its classes and functions, and the strings below attributes."""
    for node in ast.walk(ast.parse(code)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    function = isinstance(node, FUNCTIONS) and statement is body[0] and not is_property(node)
                    yield Docstring(statement.lineno, text.strip(), function)


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in function.decorator_list)


def faults(code: str) -> list[str]:
    found = []
    for line, text, of_function in docstrings(code):
        opening = text.split("\n")[0]
        if RIDDLE.match(text):
            found.append(f"line {line} opens with {text.split()[0]}: {opening}")
        elif of_function and not VERB.match(text):
            found.append(f"line {line} does not open with a verb: {opening}")
        if "mathematics page" in text:
            found.append(f"line {line} cites a page that is not in the repository: {opening}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_docstrings_are_plain(path):
    assert faults(path.read_text()) == []


def test_faults_are_found():
    """Every kind of docstring is looked at, and every kind of fault is seen."""
    code = '''"""Where rows come from."""
LIMIT = 3
"""Of a row."""
def f():
    """What f does."""
def g():
    """The number of rows."""
def h():
    """Return x. Formula: mathematics page, §1."""
class C:
    """Whether it is."""
    @property
    def p(self):
        """The number of rows."""
    async def q(self):
        """ℓ = −log p."""
'''
    assert sorted(int(fault.split()[1]) for fault in faults(code)) == [1, 3, 5, 7, 9, 11, 16]
    assert faults('"""Rows."""\ndef f():\n    """Return the number of rows."""\n') == []
