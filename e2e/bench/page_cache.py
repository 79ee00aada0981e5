"""Empties the kernel's page cache, with names and inodes: all of this machine's, so it must be nobody else's."""

import functools
import os


@functools.cache
def cannot() -> str | None:
    """Why it cannot be emptied here."""
    try:
        drop()
    except OSError as error:
        return f"the page cache cannot be emptied here: {error}"
    return None


def drop() -> None:
    # What is dirty cannot be dropped.
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3\n")
