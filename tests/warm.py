"""Python programs that start in milliseconds: each runs in a fork of a process that has only imported.

A new interpreter takes four seconds of a core to import torch, transformers and the packages. A fork has memory,
streams, arguments, a folder and an environment of its own, and ends as any process does. Only what an interpreter or a
library reads while it starts is that of the first process: a test of imports starts a new interpreter.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMEOUT = 300  # seconds


class WarmPython:
    """Runs Python programs, as `subprocess.run([sys.executable, ...], capture_output=True, text=True)` would."""

    def __init__(self, **environment: str):
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}  # a fork needs a process of one thread
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # so that the streams of a fork know that they cannot seek
            text=True,
            env=os.environ | own | environment,
        )
        self._environment = environment

    def run(
        self, *arguments: object, cwd: Path | None = None, stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS`: a script, `-m` and a module, or `-c` and code, and what they are given."""
        program = [*map(str, arguments)]
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
            streams[0].write_text(stdin, encoding="utf-8")
            job = {
                "program": program,
                "cwd": str(cwd or Path.cwd()),
                "env": os.environ | self._environment | environment,
                "streams": [*map(str, streams)],
            }
            print(json.dumps(job), file=self._server.stdin, flush=True)
            ended = self._server.stdout.readline()
            assert ended, self._server.communicate()[1]
            stdout, stderr = (path.read_text(encoding="utf-8", errors="backslashreplace") for path in streams[1:])
        return subprocess.CompletedProcess([sys.executable, *program], int(ended), stdout, stderr)

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate()


def _become(program: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Run `program` in this process, as a new interpreter would."""
    signal.alarm(_TIMEOUT)
    for descriptor, path in enumerate(streams):
        own = os.open(path, os.O_WRONLY | os.O_CREAT if descriptor else os.O_RDONLY)
        os.dup2(own, descriptor)
        os.close(own)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # the old object holds text for the process that forks
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    kind, *rest = program
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(cwd, kind).parent))
        runpy.run_path(kind, run_name="__main__")


def _serve() -> None:
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    import gc

    import accelerate  # noqa: F401
    import torch._dynamo  # noqa: F401

    import globe_fit.cli.commands  # noqa: F401
    import tests.conftest  # noqa: F401

    gc.freeze()  # a fork shares the pages that its collector leaves alone
    _serve()
