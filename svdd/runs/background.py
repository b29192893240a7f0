"""One task at a time beside the caller: a batch is written while the next one is drawn."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

__all__ = ["Background"]


class Background:
    """Runs a call in a thread of its own. There is one at a time: `start` first waits for the one before.

    Args:
        name: Of the thread.

    Attributes:
        awaited: The thread for which the main thread waits, by its identifier; None while it does not.
    """

    awaited: ClassVar[int | None] = None

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, function: Callable[..., object], *arguments: Any) -> None:
        """Begins a call; if the one before has raised an error, raises that instead."""
        self.wait()
        self._thread = threading.Thread(
            target=self._run,
            args=(function, arguments),
            name=self._name,
            daemon=True,  # a disk that hangs does not keep the interpreter from ending
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the call has ended; raises its error, once."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Returns when the call has ended; `wait` raises its error later."""
        if self._thread is not None:
            Background.awaited = self._thread.ident
            try:
                self._thread.join()
            finally:
                Background.awaited = None
            self._thread = None

    def _run(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # it belongs to the main thread
            self._error = error
