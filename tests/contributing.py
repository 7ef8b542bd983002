"""The worked examples of the how-to pages on extending xent, for tests to run as they stand there."""

from __future__ import annotations

import re
from typing import Any

import pages


def run_example(heading: str) -> dict[str, Any]:
    """Run the first Python block of a section of a page and return its names.

    They belong to a module of their own: a class without one counts as one of `builtins`, and a dataclass
    among them would leave that module containing itself, which torch's compiler walks without end.
    """
    texts = [page.read_text(encoding="utf-8") for page in sorted(pages.FOLDER.glob("*.md"))]
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", "\n".join(texts), re.M | re.S)
    example = next(block for block in pages.blocks(section) if block.kind == "python")
    names: dict[str, Any] = {"__name__": "contributing"}
    exec(example.code, names)
    return names
