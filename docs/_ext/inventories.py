"""Links into other projects' references, without asking the network for their inventories.

`NAMES` lists what the pages and docstrings link to. At build an inventory of each project is made of it, in
the format that intersphinx reads: https://sphobjinv.readthedocs.io/en/stable/syntax.html
"""

from __future__ import annotations

import zlib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

PROJECTS = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
    "python": "https://docs.python.org/3/",
}

NAMES = {
    "torch": {
        "torch.nn.Linear": ("py:class", "generated/torch.nn.Linear.html"),
        "torch.nn.Module": ("py:class", "generated/torch.nn.Module.html"),
        "torch.nn.CrossEntropyLoss": ("py:class", "generated/torch.nn.CrossEntropyLoss.html"),
        "torch.nn.functional.cross_entropy": (
            "py:function",
            "generated/torch.nn.functional.cross_entropy.html",
        ),
        "torch.nn.functional.kl_div": ("py:function", "generated/torch.nn.functional.kl_div.html"),
        "torch.nn.functional.binary_cross_entropy": (
            "py:function",
            "generated/torch.nn.functional.binary_cross_entropy.html",
        ),
        "torch.Tensor": ("py:class", "tensors.html#torch.Tensor"),
        "torch.compile": ("py:function", "generated/torch.compile.html"),
        "torch.export.export": ("py:function", "export.html#torch.export.export"),
        "torch.func.hessian": ("py:function", "generated/torch.func.hessian.html"),
        "torch.func.vmap": ("py:function", "generated/torch.func.vmap.html"),
        "torch.autocast": ("py:class", "amp.html#torch.autocast"),
    },
    "numpy": {
        "numpy.ndarray": ("py:class", "reference/generated/numpy.ndarray.html"),
        "numpy.load": ("py:function", "reference/generated/numpy.load.html"),
    },
    "sklearn": {
        "sklearn.linear_model.LogisticRegression": (
            "py:class",
            "modules/generated/sklearn.linear_model.LogisticRegression.html",
        ),
        "sklearn.metrics.log_loss": ("py:function", "modules/generated/sklearn.metrics.log_loss.html"),
        "sklearn.isotonic.IsotonicRegression": (
            "py:class",
            "modules/generated/sklearn.isotonic.IsotonicRegression.html",
        ),
    },
    "python": {
        "ValueError": ("py:exception", "library/exceptions.html#ValueError"),
        "TypeError": ("py:exception", "library/exceptions.html#TypeError"),
        "IndexError": ("py:exception", "library/exceptions.html#IndexError"),
    },
}


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write the inventories and return what intersphinx is to read."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, url in PROJECTS.items():
        head = (
            f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
            "# The remainder of this file is compressed using zlib.\n"
        )
        lines = "".join(f"{name} {kind} 1 {page} -\n" for name, (kind, page) in NAMES[project].items())
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress(lines.encode()))
        mapping[project] = (url, str(path))
    return mapping


def _set(app: Sphinx, config: Config) -> None:
    config.intersphinx_mapping = write(Path(app.srcdir) / "_build" / "inventories")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step with Sphinx, before intersphinx checks its mapping."""
    app.connect("config-inited", _set, priority=100)
    return {"parallel_read_safe": True}
