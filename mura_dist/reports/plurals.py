"""Counts as a person reads them."""


def pluralize(num: int, noun: str) -> str:
    """Return a number and its noun: `1 study`, `1,200 studies`, `2 files`."""
    return f"{num:,} {noun if num == 1 else noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"
