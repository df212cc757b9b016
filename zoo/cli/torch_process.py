"""How a command imports torch: with what only the owner of a process may decide."""

from __future__ import annotations

from zoo.cli.allocator import keep_freed_memory
from zoo.cli.threads import import_torch_bound


def import_torch() -> None:
    """Import torch with its threads bound to cores and freed memory kept; once in a process."""
    keep_freed_memory()
    import_torch_bound()
