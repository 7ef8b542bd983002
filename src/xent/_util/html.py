"""Small HTML tables of results, for notebooks.

A table has a caption, at most `MOST` rows, and a line that says how many rows there are. It sets no colour
and no background, so that it reads well in a light notebook and in a dark one. Every text in it is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from xent._util.text import counted, printable

MOST = 10
"""Rows of a table."""
_CAPTION = "caption-side:top;text-align:left;white-space:normal"


def shown(result: object, tensors: Iterable[Tensor | None], table: Callable[[], str]) -> str:
    """Return the table of a result, or its repr as text where the numbers of its tensors cannot be read.

    >>> class Result:
    ...     def __repr__(self):
    ...         return "<Result>"
    >>> shown(Result(), [torch.zeros(2)], lambda: "a table")
    'a table'
    >>> shown(Result(), [torch.zeros(2, device="meta")], lambda: "a table")
    '<pre>&lt;Result&gt;</pre>'
    """
    return table() if is_readable(*tensors) else f"<pre>{_escaped(repr(result))}</pre>"


def is_readable(*tensors: Tensor | None) -> bool:
    """Return whether the tensors are ordinary, with data, and no transform or mode of torch is at work."""
    functorch = torch._C._functorch
    if (
        torch.compiler.is_compiling()
        or functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
    ):
        return False
    return all(
        t is None
        or (
            type(t) in (Tensor, torch.nn.Parameter)
            and not t.is_meta
            and not functorch.is_functorch_wrapped_tensor(t)
        )
        for t in tensors
    )


def first(values: Tensor) -> list[object]:
    """Return the first `MOST` numbers of a tensor of any shape, on any device.

    >>> first(torch.tensor([[1, 2], [3, 4]]))
    [1, 2, 3, 4]
    """
    found: list[object] = values.detach().reshape(-1)[:MOST].tolist()
    return found


def first_rows(values: Tensor) -> Tensor:
    """Return the first `MOST` rows of a tensor (..., K) as (R, K).

    >>> first_rows(torch.zeros(4, 5, 3)).shape, first_rows(torch.zeros(3)).shape
    (torch.Size([10, 3]), torch.Size([1, 3]))
    """
    values = values.detach()
    return (values[None] if values.dim() == 1 else values.flatten(0, -2))[:MOST]


def table_by_row(caption: str, shape: Sequence[int], columns: Mapping[str, Sequence[object]]) -> str:
    """Return a table with a line for each of the first rows.

    Args:
        caption: what the table shows, and its unit.
        shape: that of a number for each row; without dimensions there is one row, which has no number.
        columns: the cells of the first `MOST` rows by the name of the column.
    """
    rows = list(zip(*columns.values(), strict=True))
    if not shape:
        return table(caption, list(columns), rows)
    count = math.prod(shape)
    places = zip(*np.unravel_index(np.arange(len(rows)), tuple(shape)), strict=True) if rows else ()
    numbered = [(", ".join(map(str, place)), *row) for place, row in zip(places, rows, strict=True)]
    return table(caption, ["row", *columns], numbered, how_many(len(rows), count, "row"))


def how_many(listed: int, count: int, noun: str, which: str = "first") -> str:
    """Return the line that says how many there are.

    >>> how_many(10, 2000, "row"), how_many(3, 3, "row")
    ('The first 10 of 2,000 rows.', '3 rows.')
    """
    of = f"The {which} {listed:,} of " if listed < count else ""
    return f"{of}{counted(count, noun)}."


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Return a table of HTML.

    >>> print(table("Loss, in nats", ["row", "loss"], [["0", 0.123456]], "1 row."))
    <table style="text-align:right;white-space:nowrap">
    <caption style="caption-side:top;text-align:left;white-space:normal">Loss, in nats</caption>
    <thead><tr><th scope="col">row</th><th scope="col">loss</th></tr></thead>
    <tbody>
    <tr><td>0</td><td>0.1235</td></tr>
    </tbody>
    </table>
    <p>1 row.</p>
    """
    heads = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in header)
    lines = ["".join(f"<td>{_escaped(cell(value))}</td>" for value in row) for row in rows]
    return "\n".join(
        [
            '<table style="text-align:right;white-space:nowrap">',
            f'<caption style="{_CAPTION}">{_escaped(caption)}</caption>',
            *([f"<thead><tr>{heads}</tr></thead>"] if header else []),
            "<tbody>",
            *(f"<tr>{line}</tr>" for line in lines),
            "</tbody>",
            "</table>",
            *([paragraph(note)] if note else []),
        ]
    )


def paragraph(text: str) -> str:
    """Return a line of text below a table.

    >>> paragraph("p < 1")
    '<p>p &lt; 1</p>'
    """
    return f"<p>{_escaped(text)}</p>"


def cell(value: object) -> str:
    """Return a value as the text of a cell: few digits, "yes" or "no", nothing for None.

    >>> [cell(value) for value in (0.123456, 1e-9, float("-inf"), True, 7, "a", None)]
    ['0.1235', '1e-09', '-∞', 'yes', '7', 'a', '']
    """
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float() if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def _escaped(text: str) -> str:
    from html import escape  # its table of entities is not needed where nothing is shown

    return escape("\n".join(map(printable, text.split("\n"))))
