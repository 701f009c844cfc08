"""Text that people put into a spreadsheet, and take out of one."""

from __future__ import annotations

# A cell that begins so is run as a formula by spreadsheets (OWASP's list, with the wide forms); callers choose texts.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def inert(words: str) -> str:
    """What a spreadsheet would run as a formula, with a leading `'`. So has what would else look like such a text."""
    return f"'{words}" if _runs(words) else words


def original(cell: str) -> str:
    """What `inert` made the cell of."""
    return cell[1:] if cell.startswith("'") and _runs(cell) else cell


def _runs(words: str) -> bool:
    return words.lstrip("'").startswith(_FORMULA)
