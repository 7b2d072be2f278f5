"""What every room uses to say what is wrong: all faults at once, by name."""


def raise_faults(faults: list[str], what: str) -> None:
    """Raises ValueError with the faults by name, if there are any."""
    if faults:
        shown = "\n  ".join(faults[:20]) + ("\n  ..." if len(faults) > 20 else "")
        raise ValueError(f"{what} ({len(faults)} faults):\n  {shown}")
