"""Processes as torchrun starts them, but without torchrun: it would take as long to start as one of them."""

import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist
from conftest import Ended
from talks import environment


class Run:
    """Processes of one run. Where one fails, the others are not ended, as torchrun would.

    They meet at a store of this process, as of torchrun's, or (`hosts`) at one that the first of them has.
    """

    def __init__(self, home: Path, processes: int = 2, *, hosts: bool = False) -> None:
        self._store = None if hosts else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._common = {
            **environment(home), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port if self._store else free_port()),
            "TORCHELASTIC_USE_AGENT_STORE": str(not hosts), "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip

    def environment(self, rank: int, dies: int | None) -> dict[str, str]:
        return {**self._common, "RANK": str(rank), "LOCAL_RANK": str(rank), "DIES": str(dies)}

    def start(self, rank: int, code: str, *words: str, dies: int | None = None) -> None:
        command = [sys.executable, "-c", code, *words]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        settings = self.environment(rank, dies)
        self._processes[rank] = subprocess.Popen(command, **pipes, encoding="utf-8", env=settings)

    def ends(self) -> dict[int, Ended]:
        """How each process ended: its exit code, what it said on stdout and on stderr."""
        try:
            said = {rank: process.communicate(timeout=180) for rank, process in self._processes.items()}
            return {rank: (self._processes[rank].returncode, *said[rank]) for rank in said}
        finally:
            for process in self._processes.values():
                process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(
    home: Path, code: str, *words: str, processes: int = 2, dies: int | None = None, hosts: bool = False
) -> dict[int, Ended]:
    together = Run(home, processes, hosts=hosts)
    for rank in range(processes):
        together.start(rank, code, *words, dies=dies)
    return together.ends()
