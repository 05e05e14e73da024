"""A real Prometheus."""

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from shared import program

DEPLOY = Path(__file__).parents[2] / "deploy"


class Prometheus:
    """A real one, with the project's configuration, that scrapes one server every second."""

    def __init__(self, folder: Path, target: str) -> None:
        shutil.copy(DEPLOY / "prometheus/rules.yml", folder)
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        for shipped, here in (
            ("server:8000", target),
            ("/etc/prometheus/rules.yml", str(folder / "rules.yml")),
            ("scrape_interval: 5s", "scrape_interval: 1s"),
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
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, expr: str, seconds: float) -> list[float]:
        """All values that a query had in the last seconds."""
        now = time.time()
        data = self.get("query_range", query=expr, start=now - seconds, end=now, step=1)
        assert data["resultType"] == "matrix"
        return [float(value) for series in data["result"] for _, value in series["values"]]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
