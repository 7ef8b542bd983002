"""The tutorial's pages as notebooks to download, beside the pages that are made of them."""

from __future__ import annotations

from pathlib import Path

import jupytext
from sphinx.application import Sphinx


def _write(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "_build" / "download"
    folder.mkdir(parents=True, exist_ok=True)
    for page in sorted((Path(app.srcdir) / "tutorial").glob("*.md")):
        if page.stem != "index":
            notebook = jupytext.reads(page.read_text("utf-8"), fmt="md:myst")
            jupytext.write(notebook, folder / f"{page.stem}.ipynb")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step with Sphinx, before it reads the pages."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True}
