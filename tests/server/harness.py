"""Real ``vllm serve`` processes, and a client that knows the OpenAI SDK."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from openai.types.chat import ChatCompletion
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

VLLM = str(Path(sys.executable).parent / "vllm")
START_SECONDS = 300
BLOCK_SIZE = 32  # the smallest that attention on a CPU takes


def environment(**extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "EADAPRUNE_"))}
    return inherited | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | extra


class Server:
    """One ``vllm serve``, stopped by ``close``. Its output goes to ``log``."""

    def __init__(self, log: Path, model: Path, *flags: str, **env: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        command = [VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        command += ["--max-model-len", "2048", "--block-size", str(BLOCK_SIZE), *flags]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment(**env), start_new_session=True
            )
        self._wait()
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self.close()
        raise RuntimeError(f"vllm serve did not start:\n{self.log.read_text()[-5000:]}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def ask(
        self, *parts: Image.Image | str, options: object = None, max_tokens: int = 4, **extra: Any
    ) -> ChatCompletion:
        """One chat turn; ``options`` go to ``mm_processor_kwargs.eadaprune``, ``extra`` into the body."""
        kwargs = {} if options is None else {"mm_processor_kwargs": {"eadaprune": options}}
        return self.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content(*parts)}],
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True} | kwargs | extra,
        )

    def prompt_tokens(self, *parts: Image.Image | str, **settings: Any) -> int:
        usage = self.ask(*parts, max_tokens=1, **settings).usage
        assert usage is not None
        return usage.prompt_tokens

    def answer(self, *parts: Image.Image | str, **settings: Any) -> str | None:
        return self.ask(*parts, max_tokens=12, **settings).choices[0].message.content

    def post(self, path: str, body: dict[str, Any] | str) -> httpx.Response:
        if isinstance(body, str):
            return httpx.post(f"{self.url}{path}", content=body, headers={"content-type": "application/json"})
        return httpx.post(f"{self.url}{path}", json=body, timeout=60)

    def samples(self) -> list[Sample]:
        """All of ``/metrics`` at one moment."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=30).text)
        return [sample for family in families for sample in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples whose labels include ``labels``."""
        return total(self.samples(), name, **labels)

    def label(self, name: str, label: str) -> str:
        return next(sample.labels[label] for sample in self.samples() if sample.name == name)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting"):
                return
            time.sleep(0.2)
        raise AssertionError("requests are left in the engine")


def total(samples: list[Sample], name: str, **labels: str) -> float:
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def content(*parts: Image.Image | str) -> list[Any]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
