"""The how-to pages: their commands run, in their order, in a folder of their own, as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"^```(sh|sh fails|python)\n(.*?)^```$", re.S | re.M)


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_as_printed(tmp_path, page):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks)
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    for kind, text in blocks:
        text = re.sub(r"^pip install .*\n", "", text, flags=re.M)  # it is there
        command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-ec", text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert (done.returncode == 0) == (kind != "sh fails"), (text, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
