"""Runs a reader of a hostile file in a process of little memory and time."""

from __future__ import annotations

import os
import pickle
import resource
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apq.errors import UserError

MEMORY, SECONDS = 512 << 20, 20  # beyond what this process has; far above what any reader here needs


def refused(read: Callable[[], Any]) -> str:
    """The one line with which `read` refuses. Anything else, also too much memory or time, is an AssertionError."""
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        _answer(read, theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert answer, f"it took too much time or memory, or crashed: status {status}"
    kind, text = pickle.loads(answer)
    assert kind == "refused", f"{kind}: {text}"
    assert text.splitlines() == [text]
    return text


def _answer(read: Callable[[], Any], out: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS,) * 2)
    torch.set_num_threads(1)  # threads do not survive a fork
    try:
        answer = "returned", repr(type(read()))
    except UserError as error:
        answer = "refused", str(error)
    except BaseException:  # whatever the reader raises is reported to the test
        answer = "raised", traceback.format_exc()
    os.write(out, pickle.dumps(answer)[: 1 << 15])
    os._exit(0)
