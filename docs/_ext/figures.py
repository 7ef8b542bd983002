"""The figures of the identities, as `xent verify --figures` draws them, where they are not there yet."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx


def _draw(app: Sphinx) -> None:
    from xent.verify import figures

    folder = Path(app.srcdir) / "figures"
    if any(not (folder / f"{name}.svg").exists() for name in figures.FIGURES):
        figures.draw(folder)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step with Sphinx, before it reads the pages."""
    app.connect("builder-inited", _draw)
    return {"parallel_read_safe": True}
