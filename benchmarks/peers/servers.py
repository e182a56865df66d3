"""Others that serve the same models: vLLM over HTTP, transformers' continuous batching behind a pipe."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 300.0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",  # where ours compute; its API server is where there is room
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def vllm(
    environment: Path,
    target: Path,
    streams: int,
    method: str = "",
    model: Path | None = None,
    num_draft_tokens: int = 4,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL of a vLLM server, and its process, for as long as the block lasts.

    Args:
        environment: The virtual environment that vLLM is installed in.
        streams: Most requests at once.
        method, model: How it speculates, and what drafts; not at all by default.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # not `vllm serve`: the package that brings it is called vllm-cpu, and the command looks for one called vllm
    command = [str(environment / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-num-seqs", str(streams)]
    command += ["--enforce-eager", "--disable-uvicorn-access-log"]
    if method:
        speculative = {"method": method, "model": str(model), "num_speculative_tokens": num_draft_tokens}
        command += ["--speculative-config", json.dumps(speculative)]
    process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, text=True, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process)
        yield url, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for(url: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise RuntimeError(f"vLLM did not start: {process.args}")


class GenerateBatch:
    """transformers' `generate_batch` in a process of its own, on core 0; see generate_batch.py."""

    def __init__(self, target: Path, end_token_ids: Sequence[int]) -> None:
        script = str(Path(__file__).with_name("generate_batch.py"))
        command = ["taskset", "-c", "0", sys.executable, script, str(target)]
        self._ends = list(end_token_ids)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._line()

    def answers(self, prompts: Sequence[Sequence[int]], streams: int, max_tokens: int) -> tuple[list[list[int]], float]:
        """Token ids of the answers, and the seconds of the call."""
        asked = {"prompts": prompts, "streams": streams, "max_tokens": max_tokens, "end_token_ids": self._ends}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._line())
        return told["answers"], told["seconds"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)

    def _line(self) -> str:
        """The next line that is an answer; transformers prints on the same stream."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(("{", "ready")):
                return line
        raise RuntimeError("transformers' process has ended")
