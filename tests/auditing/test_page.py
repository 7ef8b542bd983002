"""The page of an audit in headless Chromium: it is drawn, it sorts, and no request leaves it."""

from __future__ import annotations

import re

import numpy as np
import pytest

import xent
from browser import browser, requested


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rng = np.random.default_rng(0)
    z = 2 * rng.standard_normal((3000, 12))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    y[:60] = (y[:60] + 1) % 12
    names = [f"class {c}" for c in range(10)] + [
        "<script>alert(1)</script>",
        '<img src=x onerror=alert(2)> & "ü"',
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    result = xent.audit(logits=1.4 * z, target=np.array(names)[y], classes=names)
    result.report(path)
    return path, result


def test_it_is_one_file_under_a_megabyte(page):
    path, _ = page
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "default-src 'none'" in text
    assert text.count("<svg") == text.count('role="img"') == 6
    assert "<script>alert" not in text
    assert "<img" not in text


@pytest.mark.pages
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (390, False)])
def test_it_is_drawn_and_sorts(page, width, dark):
    path, result = page
    with browser(width, dark) as driver:
        driver.get(path.as_uri())
        assert not driver.get_log("browser")
        assert requested(driver) == {path.as_uri()}
        heights = driver.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().height)"
        )
        assert len(heights) == 6
        assert min(heights) > 100
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper != "rgb(255, 255, 255)") == dark
        # the second column of the first table, the rows of each class
        column = (
            "return [...document.querySelectorAll('table')[0].tBodies[0].rows]"
            ".map(r => r.cells[%d].dataset.value)"
        )
        click = "document.querySelectorAll('table')[0].querySelectorAll('th button')[%d].click()"
        counts = sorted((row.rows for row in result.per_class), reverse=True)
        driver.execute_script(click % 1)
        assert [float(value) for value in driver.execute_script(column % 1)] == counts
        driver.execute_script(click % 1)
        assert [float(value) for value in driver.execute_script(column % 1)] == counts[::-1]
        driver.execute_script(click % 0)
        names = driver.execute_script(column % 0)
        assert [name for name in names if name.startswith("class")] == [
            f"class {c}" for c in range(9, -1, -1)
        ]
        assert "<script>alert(1)</script>" in names
        assert not driver.get_log("browser")
