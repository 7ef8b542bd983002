"""The site: Sphinx with MyST pages, executed notebooks and a reference made from the package itself.

`make docs` builds it into docs/_build/html; nothing in it is loaded from elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import xent  # noqa: E402

project = "xent"
author = "the authors of xent"
copyright = "2026, the authors of xent"
release = version = xent.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "figures",
    "inventories",
    "notebooks",
    "reference",
]
exclude_patterns = ["_build", "_ext", "reference/api/_*"]

# Pages
smartquotes = False  # options of the command line have two hyphens
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Reference
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types and shapes
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = True  # of estimators, as scikit-learn writes them
napoleon_use_rtype = False
maximum_signature_line_length = 88

# Look
html_theme = "furo"
html_title = "xent"
html_static_path = ["_static", "_build/static"]
html_css_files = ["xent.css"]
html_copy_source = False
html_show_sourcelink = False
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"svg": {"fontCache": "local"}, "options": {"enableMenu": False}}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
