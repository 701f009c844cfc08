"""Text that people put into a spreadsheet."""

from __future__ import annotations

# A cell that begins so is run as a formula by spreadsheets; callers choose texts.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def inert(words: str) -> str:
    """What a spreadsheet would run as a formula, with a leading `'`."""
    return f"'{words}" if words.startswith(_FORMULA) else words
