"""Tables of measured tile sizes, one a device, and the command that fills them.

`python -m pallas_kernels.tuning --help`; docs/tuning.md has the rest.
"""

from pallas_kernels.tuning.lookup import use_table
from pallas_kernels.tuning.product import Cut, Product
from pallas_kernels.tuning.table import Entry, Measured, Table, TableError, read_table

__all__ = [
    "Cut",
    "Entry",
    "Measured",
    "Product",
    "Table",
    "TableError",
    "read_table",
    "use_table",
]
