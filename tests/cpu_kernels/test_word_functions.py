"""Functions for a driver's thread, called here by ctypes on threads of its own."""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from cpu_kernels.word_functions import wait_function, write_function

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def test_a_wait_ends_with_the_write_that_it_is_for() -> None:
    word = np.array([7, 99], np.uint32)
    wanted = np.array([word.ctypes.data, 3], np.int64)
    other = np.array([word.ctypes.data, 2], np.int64)
    wait, write = _Function(wait_function()), _Function(write_function())
    seen: list[int] = []

    def work() -> None:
        wait(wanted.ctypes.data)
        seen.append(int(word[0]))

    thread = threading.Thread(target=work)
    thread.start()
    write(other.ctypes.data)
    assert not seen
    assert word.tolist() == [2, 99]
    write(wanted.ctypes.data)
    thread.join()
    assert seen == [3]
    assert word.tolist() == [3, 99]
