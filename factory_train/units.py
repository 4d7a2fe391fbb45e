"""Numbers, durations and sizes as people read them."""

from __future__ import annotations


def format_count(value: float) -> str:
    """Returns `value` with three digits and a decimal prefix: 12.3k, 1.24B."""
    size, suffix = float(value), ""
    # 999.5 and more would be rounded to a fourth digit, so the next prefix takes over there.
    for suffix in ("", "k", "M", "B", "T"):
        if abs(size) < 999.5 or suffix == "T":
            break
        size /= 1000
    if not suffix and size == int(size):
        return str(int(size))
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f}{suffix}"


def format_bytes(value: float) -> str:
    """Returns a size in decimal units: 512B, 1.20GB."""
    return format_count(value).replace("B", "G") + "B"


def format_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: 0.4s, 12s, 1m23s, 5h26m, 2d03h."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_wait(seconds: float) -> str:
    """Returns a duration that may be a matter of milliseconds: 3.2 ms, else as `format_duration`."""
    return f"{1000 * seconds:.3g} ms" if 0 < seconds < 0.95 else format_duration(seconds)
