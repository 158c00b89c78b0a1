"""Run the API server of vLLM as processes of its own, on a free port of this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_START, SECONDS_TO_END = 600, 60
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class ApiServer:
    """A server that answers."""

    process: subprocess.Popen
    url: str
    log: Path
    seconds: float  # from the start to the first answer

    def get(self, path: str) -> str:
        """Return what the server says at a path."""
        with urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()


@contextmanager
def api_server(directory: Path, log: Path, *options: str) -> Iterator[ApiServer]:
    """Start a server for the model in `directory`, named "model", wait until it answers, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *options]
    began = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,  # its processes are ended together
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield ApiServer(process, url, log, time.perf_counter() - began)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with suppress(URLError, ConnectionError, TimeoutError), urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"The server did not start: {process.args}\n{log.read_text()[-4000:]}")
