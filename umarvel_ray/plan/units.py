"""Amounts for people."""


def human_bytes(amount: float) -> str:
    """`40.1 GB`; empty for nothing."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{amount / size:,.1f} {unit}"
    return f"{amount:.0f} B" if amount else ""
