"""A process that has imported the product forks one for each command line. So tests pay for slow imports once.

`Preloaded` is for tests; the fixture `preloaded` has one. Run as a script, this module is the process that forks:

    python tests/preloaded.py [MODULE]

MODULE of tests/ is imported last and may change the product for all command lines. Each command line has a process of
its own, with its own folder, variables, random state and output, which may be killed. Only the seed of Python's hashes
is that of the forking process: where the order of a set could matter, compare with a run of an ordinary process.

Requests are lines of JSON: `{"start": [run, ...]}` begins the runs at once and is answered with their process numbers,
`{"poll": process}` and `{"wait": process}` are answered with the exit code of one, `poll` with null while it runs.
"end" ends all.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("apq", "lut", "dataset", "elastic_nn", "utils", "report", "methods")
LATE = (
    "torch.distributed",
    "torch._dynamo",
    "torchvision",
    "sklearn.cluster",
    "scipy.stats",
    "matplotlib.backends.backend_agg",
)  # by functions
FAULT = 1
END = "end"  # the request that ends the forking process
SECONDS = 300  # until a test gives up


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a process does: `python WORD ...` or `python -m MODULE ...`, without "python"."""

    words: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    stdout: str
    stderr: str


class Run:
    """A command line at work. `returncode` is None until `poll` or `wait` has seen its end."""

    def __init__(self, preloaded: Preloaded, process: int, command: Command) -> None:
        self.preloaded, self.process, self.command = preloaded, process, command
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.preloaded.ask(poll=self.process)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self.preloaded.ask(wait=self.process)
        return self.returncode

    def kill(self) -> None:
        """Kill -9. The process has not been waited for, so that its number is still its own."""
        os.kill(self.process, signal.SIGKILL)

    @property
    def stdout(self) -> str:
        return Path(self.command.stdout).read_text()

    @property
    def stderr(self) -> str:
        return Path(self.command.stderr).read_text()


class Preloaded:
    """The forking process, as a context. It is made when it is first needed."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules

    def __enter__(self) -> Preloaded:
        self.outputs = tempfile.TemporaryDirectory()
        self.server = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            # Not by closing the pipe alone: workers of data loaders, forked since, may still hold it open.
            self.server.communicate(json.dumps(END) + "\n")
        self.outputs.cleanup()

    def start(self, line: Sequence[object], *, cwd: Path, env: Mapping[str, str] = MappingProxyType({})) -> Run:
        """Begin a line, with more variables in its environment."""
        return self.start_all([line], cwd=cwd, env=env)[0]

    def start_all(
        self, lines: Sequence[Sequence[object]], *, cwd: Path, env: Mapping[str, str] = MappingProxyType({})
    ) -> list[Run]:
        """Begin lines at once."""
        commands = []
        for line in lines:
            out, err = (tempfile.mkstemp(dir=self.outputs.name)[1] for _ in range(2))
            words, variables = tuple(map(str, line)), {**os.environ, **env}
            commands.append(Command(words=words, cwd=str(cwd), env=variables, stdout=out, stderr=err))
        processes = self.ask(start=[asdict(command) for command in commands])
        return [Run(self, *known) for known in zip(processes, commands, strict=True)]

    def call(self, line: Sequence[object], *, cwd: Path, env: Mapping[str, str] = MappingProxyType({})) -> Run:
        """Run a line until it ends."""
        run = self.start(line, cwd=cwd, env=env)
        run.wait()
        return run

    def ask(self, **request: object) -> object:
        if self.server is None:
            words = [sys.executable, __file__, *self.modules]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            # Threads do not survive a fork.
            self.server = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **pipes)
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        assert select.select([self.server.stdout], [], [], SECONDS)[0], f"no answer in {SECONDS} s to {request}"
        return json.loads(self.server.stdout.readline())


def preload() -> None:
    """Import all of the product and what its functions import, and make the images that most tests have."""
    for room in ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    from few_images import few_digits

    from apq.presets import DIGITS
    from elastic_nn.networks.named_models import SMALL, named_model

    for spec in (DIGITS, *(named_model(name, "digits") for name in SMALL)):
        few_digits(spec)


def fork(command: Command, ends: tuple[int, int]) -> int:
    """Fork a process for a command. It begins when the second end of a pipe is closed everywhere."""
    if child := os.fork():
        return child
    code = FAULT
    try:
        os.close(ends[1])
        os.setpgid(0, 0)
        os.chdir(command.cwd)
        os.environ.clear()
        os.environ.update(command.env)
        _redirect(command)
        os.read(ends[0], 1)
        os.close(ends[0])
        code = _execute(command.words)
    finally:
        os._exit(code)


def _redirect(command: Command) -> None:
    for number, file in enumerate((os.devnull, command.stdout, command.stderr)):
        os.dup2(os.open(file, os.O_RDWR), number)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)


def _execute(words: tuple[str, ...]) -> int:
    """Run a line as Python does, and return the exit code."""
    import numpy as np
    import torch

    for anew in (random.seed, np.random.seed, torch.seed):  # as in a process of its own
        anew()
    module = words[0] == "-m"
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = ["" if module else str(Path(words[0]).parent), *own]  # instead of the folder of tests
    sys.argv = [*words[module:]]
    try:
        if module:
            if not hasattr(sys.modules.get(words[1]), "__path__"):
                sys.modules.pop(words[1], None)  # or runpy warns
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return FAULT
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answer requests until the last or until their pipe is closed; then end what still runs."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request == END:
            break
        if "start" in request:
            ends = os.pipe()
            answer = [fork(Command(**command), ends) for command in request["start"]]
            running.update(answer)
            for end in ends:
                os.close(end)
        else:
            process = request["poll"] if "poll" in request else request["wait"]
            ended, status = os.waitpid(process, os.WNOHANG if "poll" in request else 0)
            answer = os.waitstatus_to_exitcode(status) if ended else None
            running -= {ended}
        print(json.dumps(answer), flush=True)
    for process in running:
        os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))
    preload()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # so that a child's collections do not copy all pages
    serve()
