"""Forked children that cannot hang the tests."""

from __future__ import annotations

import os
import signal
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
