"""The how-to pages: what they show runs, in its order, in a folder of its own, and prints what they say."""

from __future__ import annotations

import pytest

import pages

PAGES = sorted(page for page in pages.FOLDER.glob("*.md") if page.stem != "index")


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_says(tmp_path, page):
    blocks = pages.blocks(page.read_text(encoding="utf-8"))
    assert blocks
    pages.run(blocks, tmp_path)
    wrong = []
    for block in blocks:
        assert (block.status != 0) == (block.kind == "sh fails"), (
            f"{block.code}\n{block.printed}\n{block.said}"
        )
        assert "Traceback" not in block.said, block.said
        printed = block.printed + (block.said if block.kind == "sh fails" else "")
        if not pages.matches(block.output or "", printed):
            wrong.append(f"{block.code}\n--- prints\n{printed}\n--- and not\n{block.output or '(nothing)'}")
    assert not wrong, "\n\n".join(wrong)


def test_the_index_has_a_line_for_each_page():
    index = (pages.FOLDER / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"]({page.name})" in index
        assert f"\n{page.stem}\n" in index  # in its table of contents


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("loss 0.1243 nats\n", "loss 0.1244 nats\n"),
        ("360 rows  0.5 %", "360  rows 0.6 %"),  # 1 in the last digit
        ("in 0.08 s, 17 ms", "in 12.5 s, 2 ms"),
        ("2026-01-31 12:00:01", "2027-11-01 08:15:59"),
        ("1.0e-17", "1.02e-17"),
        ("a\n...\nz 1", "a\nb\nc\nz 1"),
        ("...\nm\n...\nz", "m\nz"),
        ("50,000 classes", "50,010 classes"),
        ("tensor([-1.50, nan])", "tensor([-1.51, nan])"),
    ],
)
def test_outputs_that_match(expected, printed):
    assert pages.matches(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("loss 0.1243 nats", "loss 0.1343 nats"),
        ("loss 0.1243 nats", "loss 0.1243 bits"),
        ("pixel_0_1", "pixel_0_2"),  # a name, no number
        ("float32", "float64"),
        ("a", "a\nb"),
        ("a\n...\nz", "a\nb"),
        ("...\nm\n...\nz", "z"),
        ("1.0e-17", "1.2e-17"),
        ("0.5", "-0.5"),
        ("", "something"),
        ("something", ""),
    ],
)
def test_outputs_that_do_not(expected, printed):
    assert not pages.matches(expected, printed)


def test_an_output_belongs_to_the_code_before_it():
    found = pages.blocks(
        "```sh\nls\n```\nIt prints:\n```text\na\n```\n```{toctree}\nb\n```\n```python\n1\n```\n"
    )
    assert [(block.kind, block.code, block.output) for block in found] == [
        ("sh", "ls\n", "a\n"),
        ("python", "1\n", None),
    ]


def test_blocks_share_names_and_a_folder(tmp_path):
    blocks = [
        pages.Block("python", "# made.py\nprint('of a file')\n"),
        pages.Block("python", "x = 3\n"),
        pages.Block("sh", "python made.py\npip install nothing\nls\n"),
        pages.Block("python", "print(x)\n"),
        pages.Block("sh fails", "echo no >&2; exit 2\n"),
        pages.Block("python", "1 / 0\n"),
        pages.Block("python", "print('not reached')\n"),
    ]
    pages.run(blocks, tmp_path)
    assert [block.printed for block in blocks] == ["", "", "of a file\nmade.py\n", "3\n", "", "", ""]
    assert [block.status for block in blocks] == [0, 0, 0, 0, 2, 1, 0]
    assert blocks[4].said == "no\n"
    assert "ZeroDivisionError" in blocks[5].said
