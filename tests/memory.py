"""How much memory a call needs."""

import tracemalloc
from collections.abc import Callable


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that Python held during the call, the lesser of two calls.

    Now and then a table of the whole process doubles in one of them: that of the interned strings, by 15 MB.
    """

    def once() -> int:
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return min(once(), once())
