"""Calls on threads that no test waits for without a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def begun(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Calls a function on a thread of its own, which ends with the process at the latest."""
    done: Future[T] = Future()

    def call() -> None:
        try:
            done.set_result(function(*arguments))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done
