"""Docstrings as the reference shows them.

An argument that a docstring describes by "as in :func:`name`" gets the text of that function, so that each
page is complete. Names such as ``coef_`` are kept from being read as links.
"""

from __future__ import annotations

import importlib
import inspect
import re

from sphinx.application import Sphinx

AS_IN = re.compile(r"as in :(?:func|class):`~?([\w.]+)`[.;,]?\s*(.*)", re.S)
ENTRY = re.compile(r"((?:\*{0,2}\w+,\s+)*(?:\*{0,2}\w+|\.\.\.)):\s+(.*)", re.S)
HEADING = re.compile(r"^[A-Z]\w+:$")
TRAILING = re.compile(r"(?<![`\w*|.])([A-Za-z]\w*)_(?![\w`*])")


def arguments(lines: list[str]) -> tuple[int, int, dict[str, str]]:
    """Return where the lines below ``Args:`` start and end, and the text of each argument."""
    try:
        start = lines.index("Args:") + 1
    except ValueError:
        return 0, 0, {}
    end = next((i for i in range(start, len(lines)) if HEADING.match(lines[i])), len(lines))
    entries: list[str] = []
    for line in lines[start:end]:
        if re.match(r"    \S", line):
            entries.append(line.strip())
        elif line.strip():
            entries[-1] += " " + line.strip()
    found = {}
    for entry in entries:
        match = ENTRY.fullmatch(entry)
        assert match is not None, f"not an argument: {entry}"
        for name in re.split(r",\s+", match[1]):
            found[name] = match[2]
    return start, end, found


def complete(name: str, text: str, module: str) -> str:
    """Return the text of an argument, with that of another function in the place of "as in"."""
    match = AS_IN.fullmatch(text)
    if match is None:
        return text
    where, _, function = match[1].rpartition(".")
    owner = importlib.import_module(where or module)
    while not hasattr(owner, function):
        owner = importlib.import_module(owner.__name__.rpartition(".")[0])
    other = getattr(owner, function)
    _, _, theirs = arguments((inspect.getdoc(other) or "").splitlines())
    also = match[2] if f"``{name}``" in match[2] or "," not in text else ""
    if name not in theirs:
        return text
    return " ".join(part for part in (complete(name, theirs[name], other.__module__), also) if part)


def _docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    start, end, found = arguments(lines)
    module = getattr(thing, "__module__", None) or "xent"
    if "..." in found:  # all others
        text = found.pop("...")
        found.update({key: text for key in inspect.signature(thing).parameters if key not in found})
    if found:
        lines[start:end] = [f"    {key}: {complete(key, text, module)}" for key, text in found.items()] + [""]
    lines[:] = map(escaped, lines)


def escaped(line: str) -> str:
    """Return a line in which an underscore that ends a name is no link."""
    return TRAILING.sub(r"\1\\_", line)


def _help(app: Sphinx, context: object, lines: list[str]) -> None:
    lines[:] = map(escaped, lines)


def _skip(app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object) -> bool | None:
    """Leave out what scikit-learn's base class adds for metadata routing."""
    return True if re.fullmatch(r"set_\w+_request|get_metadata_routing", name) else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the steps with Sphinx, before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _docstring, priority=300)
    app.connect("autodoc-skip-member", _skip)
    for part in ("description", "options", "arguments", "usage"):
        app.connect(f"sphinx-click-process-{part}", _help)
    return {"parallel_read_safe": True}
