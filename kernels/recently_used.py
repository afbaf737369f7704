"""A cache that forgets what was not used lately, as soon as all that it holds is larger than a limit."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any


class RecentlyUsed:
    """Values by key. They may be many small ones or few large ones, so their sizes are limited and not their number.

    It may be used by several threads: backward has one for each GPU, and parameters may be stepped inside it.

    Args:
        limit: of the sum of the sizes, in the caller's unit. A value that exceeds it alone is kept until the next one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Any:
        """The value of ``key``, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def add(self, key: Hashable, value: Any, size: int) -> None:
        """Keep ``value``, in place of one that ``key`` may have."""
        with self._lock:
            _, replaced = self._entries.pop(key, (None, 0))
            self._entries[key] = value, size
            self._size += size - replaced
            while self._size > self._limit and len(self._entries) > 1:
                _, (_, freed) = self._entries.popitem(last=False)
                self._size -= freed

    def items(self) -> list[tuple[Hashable, Any]]:
        """The pairs of key and value, the least recently used one first."""
        with self._lock:
            return [(key, value) for key, (value, _) in self._entries.items()]
