"""The worked examples of CONTRIBUTING.md, for tests to run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def example(heading: str) -> str:
    """Return the one Python block of a section."""
    section = re.search(rf"^### {heading}$(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert section is not None, heading
    (block,) = re.findall(r"```python\n(.*?)```", section[1], flags=re.S)
    return block
