"""The cells of a page's data tables, which are kept or dropped whole.

Many pages lay out their columns by tables, too: there a cell is a part of the page and not of a row.
"""

from __future__ import annotations

import numpy as np

MAX_CELL_BLOCKS = 3  # a cell of more is a part of the page


def table_cells(tags: np.ndarray, parent: np.ndarray, leaf: np.ndarray) -> np.ndarray | None:
    """int32 (3, blocks): the elements of the table and the row, and the column from 0, of each block; or -1 each.

    tags: (elements,) of strings, parent: of each element, leaf: the element of each block. Only rows of data count:
    with text in two cells or more, at most MAX_CELL_BLOCKS blocks in each of them, and no table within. None: the page
    has no cells.
    """
    is_row = tags == "tr"
    is_cell = (tags == "td") | (tags == "th")
    is_cell = is_cell & is_row[parent]
    cells = np.flatnonzero(is_cell)
    if len(cells) == 0 or len(leaf) == 0:
        return None
    nearest = _nearest(is_cell, parent)
    rows = parent[cells]
    holds_table = np.zeros(len(parent), bool)
    holds_table[parent[nearest[rows]]] = nearest[rows] > 0
    # a cell's column is its place among its row's
    order = np.argsort(rows, kind="stable")
    _, first, members = np.unique(rows[order], return_index=True, return_counts=True)
    column = np.zeros(len(parent), np.int32)
    column[cells[order]] = np.arange(len(cells)) - np.repeat(first, members)

    cell = nearest[leaf]
    row = np.where(cell > 0, parent[cell], 0)
    blocks_of = np.bincount(cell, minlength=len(parent))
    filled = np.bincount(rows, blocks_of[cells] > 0, minlength=len(parent))
    crowded = np.bincount(rows, blocks_of[cells] > MAX_CELL_BLOCKS, minlength=len(parent))
    of_data = (row > 0) & ~holds_table[row] & (filled[row] >= 2) & (crowded[row] == 0)
    table = _nearest(tags == "table", parent)[row]
    return np.where(of_data, np.stack([table, row, column[cell]]), -1).astype(np.int32)


def _nearest(wanted: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """The nearest wanted element of each, itself if it is one, in steps that double the way; 0 where there is none."""
    nearest = np.where(wanted, np.arange(len(parent)), parent)
    while not np.array_equal(further := nearest[nearest], nearest):
        nearest = further
    return nearest
