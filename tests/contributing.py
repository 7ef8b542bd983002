"""The worked examples of CONTRIBUTING.md, for tests to run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def run_example(heading: str) -> dict[str, Any]:
    """Run the one Python block of a section and return its names.

    They belong to a module of their own: a class without one counts as one of `builtins`, and a dataclass
    among them would leave that module containing itself, which torch's compiler walks without end.
    """
    section = re.search(rf"^### {heading}$(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None, heading
    (block,) = re.findall(r"```python\n(.*?)```", section[1], flags=re.S)
    names: dict[str, Any] = {"__name__": "contributing"}
    exec(block, names)
    return names
