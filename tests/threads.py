"""Threads that take turns as often as Python lets them, and whose errors reach the test."""

import sys
import threading
from collections.abc import Callable


def together(work: Callable[[int], object], threads: int) -> None:
    """Run work(0) .. work(threads - 1) at once; raise the first error of any."""
    errors: list[BaseException] = []

    def noting_errors(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        running = [threading.Thread(target=noting_errors, args=(number,), daemon=True) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(60)
            assert not thread.is_alive(), "a thread waits for ever"
    finally:
        sys.setswitchinterval(before)
    if errors:
        raise errors[0]
