"""What a machine does to a run: a full disk, no memory left. One line says it; a bug has more."""

FAILURES = (OSError, MemoryError, RuntimeError)  # what may be one: ask `reason`


def reason(error: BaseException) -> str | None:
    """The machine's failure in a line, or None where the error is none of the machine's."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        return f"out of memory ({text}); fewer --recipes or --devices take less of it"
    return text if isinstance(error, OSError) else None
