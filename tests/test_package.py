"""The package as a whole: the cost of importing it, its names and modules, the snippets of its pages."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xent

ROOT = Path(__file__).resolve().parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(xent.__path__, "xent.") if not m.name.endswith("__main__")]
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))  # whose snippets test_how_to runs
MADE = (ROOT / "docs" / "_build", ROOT / "docs" / "reference" / "api")  # by the build of the site
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if page not in HOW_TO and not any(page.is_relative_to(folder) for folder in MADE)
    ),
]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_xent_imports_no_compiler():
    """Which takes a second: more than torch itself."""
    loaded = python(
        "import sys, torch; before = set(sys.modules); import xent; print(*set(sys.modules) - before)"
    )
    assert not [
        name for name in loaded.split() if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))
    ]


def test_importing_xent_imports_no_extra():
    loaded = python("import sys, xent; print(*sys.modules)").split()
    extras = {
        "sklearn",
        "scipy",
        "pyarrow",
        "safetensors",
        "click",
        "rich",
        "matplotlib",
        "jinja2",
        "pandas",
        "onnx",
    }
    assert not extras & set(loaded)


def test_public_names_are_there():
    for name in xent.__all__:
        assert getattr(xent, name) is not None
    assert set(dir(xent)) == set(xent.__all__)
    with pytest.raises(AttributeError, match="no attribute 'crossentropy'"):
        _ = xent.crossentropy


def test_a_missing_extra_is_named():
    """SoftmaxRegression without scikit-learn says which extra to install."""
    code = """
import sys
sys.modules["sklearn"] = None
import xent
try:
    xent.SoftmaxRegression
except ImportError as error:
    print(error)
"""
    assert "xent[probe]" in python(code)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    """Every python block of a page, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}  # see contributing.run_example
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, *HOW_TO], ids=lambda p: p.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


PUBLIC_PACKAGES = ("", ".curvature", ".linear_model", ".metrics", ".nn", ".sinkhorn", ".triplets", ".verify")
ALL_MODULES_PRIVATE = ("curvature", "losses", "metrics", "nn", "sinkhorn", "triplets")


@pytest.mark.parametrize("name", PUBLIC_PACKAGES)
def test_a_public_package_lists_its_names(name):
    package = importlib.import_module(f"xent{name}")
    assert len(package.__all__) == len(set(package.__all__)) > 0
    assert not [public for public in package.__all__ if not hasattr(package, public)]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_shadows_a_public_name(module):
    """Importing a module puts it into its package, in the place of a function or class of that name."""
    package, _, name = module.rpartition(".")
    parent = importlib.import_module(package)
    if name in getattr(parent, "__all__", ()):
        assert inspect.ismodule(getattr(parent, name)), f"{module} and {package}.{name} have one name"


@pytest.mark.parametrize("package", ALL_MODULES_PRIVATE)
def test_private_modules_start_with_an_underscore(package):
    inside = [name.split(".")[2] for name in MODULES if name.startswith(f"xent.{package}.")]
    assert inside
    assert not [name for name in inside if not name.startswith("_")]
