"""Tables from files, models to files.

``read_table`` reads a file by its suffix; ``register_reader`` adds a format. Importing this package imports
no library that a format needs.
"""

from xent.data._registry import register_reader
from xent.data.parquet import table_from_arrow
from xent.data.read import read_table
from xent.data.table import Table, Wanted

__all__ = ["Table", "Wanted", "read_table", "register_reader", "table_from_arrow"]
