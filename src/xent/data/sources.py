"""The table of handwritten digits that scikit-learn ships, and tables written to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xent._processes.group import ALONE, Ranks
from xent._util.atomic_write import atomic_write
from xent.data.batches import as_array
from xent.data.rows import SelectedRows, blocks
from xent.data.table import Table
from xent.errors import needs


def digits(ranks: Ranks = ALONE) -> Table:
    """Return 1,797 handwritten digits, 8 × 8 pixels of 0 to 16, in the package itself: no network."""
    with needs("probe"):
        from sklearn.datasets import load_digits
    found = load_digits()
    rows = ranks.share.of(len(found.data))
    return Table(
        source="scikit-learn's digits",
        features=found.data[rows],
        feature_names=tuple(found.feature_names),
        label_name="digit",
        codes=found.target[rows].astype(np.int64),
        classes=np.arange(10),
        start=rows.start,
    )


def write_parquet(table: Table, rows: np.ndarray, path: Path) -> Path:
    """Write those rows of the table as Parquet, the label last."""
    with needs("probe"):
        import pyarrow as pa
        from pyarrow import parquet
    features = np.concatenate([as_array(x) for _, x in blocks(SelectedRows(table.rows, rows))])
    columns = {name: features[:, j] for j, name in enumerate(table.feature_names)}
    if table.codes is not None and table.classes is not None:
        columns[str(table.label_name)] = table.classes[table.codes[rows]]
    with atomic_write(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)
    return path
