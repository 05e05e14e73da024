"""A real Prometheus."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from shared import program

DEPLOY = Path(__file__).parents[2] / "deploy"


class Prometheus:
    """A real one, with the project's configuration, that scrapes one server every other second."""

    def __init__(self, folder: Path, target: str) -> None:
        shutil.copy(DEPLOY / "prometheus/rules.yml", folder)
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        for shipped, here in (
            ("server:8000", target),
            ("/etc/prometheus/rules.yml", str(folder / "rules.yml")),
            ("scrape_interval: 5s", "scrape_interval: 2s"),
            ("evaluation_interval: 15s", "evaluation_interval: 1s"),
        ):
            assert shipped in config
            config = config.replace(shipped, here)
        (folder / "prometheus.yml").write_text(config)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [program("prometheus"), *flags, f"--web.listen-address={address}"], stdout=log, stderr=log
            )

    def get(self, path: str, **params: Any) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        response.raise_for_status()
        return response.json()["data"]

    def waits_for(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Whether the condition holds before so many seconds are over; servers may be slow to answer scrapes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):  # it is about to start
                if condition():
                    return True
            time.sleep(0.5)
        return False

    def values(self, expr: str, seconds: float = 25) -> list[float]:
        """All values that a query had in the last seconds."""
        now = time.time()
        data = self.get("query_range", query=expr, start=now - seconds, end=now, step=1)
        assert data["resultType"] == "matrix"
        return [float(value) for series in data["result"] for _, value in series["values"]]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
