"""Limits of the operating system."""

from __future__ import annotations


def increase_file_limit(new_soft: int = 2**15, new_hard: int = 2**15) -> None:
    """Raise the number of files this process may open, as far as that is allowed. Does nothing on Windows."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = max(hard, new_hard)
    for limits in ((max(soft, new_soft), ceiling), (min(max(soft, new_soft), hard), hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (ValueError, OSError):
            continue
        return
