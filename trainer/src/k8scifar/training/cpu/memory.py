"""The process's memory, kept from step to step."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
KEEP, KEEP_OLD = 1 << 30, 1 << 25  # bytes; the most that older versions accept


def keep() -> None:
    """Have the C library keep freed memory for the next step; does nothing where it has no such setting.

    It would give large blocks back to the kernel at once, which then fills them with zeros again, page by page, at the
    next step: on a CPU two thirds of the time of the data path, and some hundredths of a step.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        library = ctypes.CDLL(None)
        library.mallopt(TRIM_THRESHOLD, KEEP)
        if not library.mallopt(MMAP_THRESHOLD, KEEP):
            library.mallopt(MMAP_THRESHOLD, KEEP_OLD)
