"""`llama serve` in a process of its own, for tests: started, asked, and ended."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("uvicorn", reason='no uvicorn: pip install "llama-runner[serve]"')
httpx = pytest.importorskip("httpx", reason="no httpx: pip install httpx")

ADDRESS = re.compile(r"is served at (http://\S+)/v1")
# Constants of llama/server/limits.py may be set before anything has taken them from there.
_START = "import json, sys, llama.server.limits as limits; vars(limits).update(json.loads(sys.argv.pop(1)));"
_START += " from llama.cli.commands import main; main()"


class Service:
    """One that runs at `url`."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, url: str) -> None:
        self.process, self.log, self.url = process, log, url
        self.port = int(url.rsplit(":", 1)[1])
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: dict[str, Any] | bytes, **more: Any) -> "httpx.Response":
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(f"/v1/{path}", content=data, **more)

    def complete(self, prompt: str, **more: Any) -> dict[str, Any]:
        """The body of the response to a greedy completion of a few tokens, or to what `more` says."""
        answer = self.post("completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream, which ends as it should."""
        with self.http.stream("POST", f"/v1/{path}", json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            return events("".join(response.iter_text()))

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"llama_{name} "))

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        """Wait until a metric has a value."""
        until = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def end(self, seconds: float = 30) -> int:
        self.process.terminate()
        return self.process.wait(seconds)


def events(text: str) -> list[dict[str, Any]]:
    """The objects of a stream of events, which ends with [DONE]."""
    *parts, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def command(*flags: str, limits: dict[str, Any] | None = None, first: str = "") -> list[str]:
    return [sys.executable, "-c", f"{first}\n{_START}", json.dumps(limits or {}), "serve", *flags]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **more}


@contextmanager
def service(*flags: str, limits: dict[str, Any] | None = None, first: str = "", **env: str) -> Iterator[Service]:
    """One on a free port, on the demo in float32 unless the flags say otherwise; it is ended afterwards.

    `first` is code that its process runs before all else.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = command("--port", "0", "--device", "cpu", "--dtype", "float32", *flags, limits=limits, first=first)
        with open(log, "wb") as file:
            process = subprocess.Popen(words, stderr=file, env=environment(**env))
        try:
            until = time.monotonic() + 120
            while not (found := ADDRESS.search(log.read_text())):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.02)
            running = Service(process, log, found[1])
            with running.http:
                yield running
        finally:
            process.kill()
            process.wait()
