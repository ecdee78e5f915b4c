"""Forked children that cannot hang the tests."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable


def exit_code_of(body: Callable[[], object], *, seconds: int = 60) -> int:
    """Run `body` in a forked child: 0 when it returns, 1 when it raises, -SIGALRM when it hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            body()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees the exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_beside(work: Callable[[], object], *, children: int = 8, seconds: int = 60) -> None:
    """Fork children that do the work, while a thread does it over and over; all must end well."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work_on() -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:  # noqa: BLE001 - the assertion below shows it
            failures.append(error)

    thread = threading.Thread(target=work_on)
    thread.start()
    codes = [exit_code_of(work, seconds=seconds) for _ in range(children)]
    stop.set()
    thread.join(seconds)
    assert (codes, failures) == ([0] * children, [])
