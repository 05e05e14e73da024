"""The CPU image is built from nothing, and serves.

With Docker where its daemon runs. Elsewhere buildah replays the build in a root that holds a minimal Debian with Python
in place of the base image, and runs the result in a chroot.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from shared import photo, program

from eadaprune_vllm.core.draw import data_url

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker/cpu/Dockerfile"
BASE = re.findall(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)[-1]
PORT = 8000  # where the health check looks
SERVE = f'exec vllm serve "$(eadaprune demo-model)" --plugin eadaprune --served-model-name demo --port {PORT} '
SERVE += "--max-model-len 2048"


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout.strip()


def pip_volumes() -> list[str]:
    """So that a build finds packages where this machine finds them: pip's configuration and the folders it names."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config"]
    files = re.findall(r"^\s+(/\S+), exists: True$", run(*pip, "debug"), re.MULTILINE)
    settings = run(*pip, "list")
    # An index in a folder links to packages beside that folder.
    named = [str(Path(path).parent) for path in re.findall(r"file://(/[^\s',]+)", settings)]
    named += re.findall(r"(?<=['\s])/[^\s',]+", settings)
    return [f"--volume={path}:{path}:ro" for path in sorted({*files, *named}) if Path(path).exists()]


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that runs another one in a container of a freshly built image."""
    folder = tmp_path_factory.mktemp("image")
    variables = ["--env=VLLM_CPU_KVCACHE_SPACE=1", "--env=HF_HUB_OFFLINE=1"]
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        run("docker", "build", "--file", DOCKERFILE, "--tag", "eadaprune-vllm:test", ".")
        start = ["docker", "run", "--detach", "--rm", "--network=host", *variables, "--entrypoint=sleep"]
        container = run(*start, "eadaprune-vllm:test", "infinity")
        yield ["docker", "exec", container]
        run("docker", "kill", container)
        return
    storage = [f"--root={folder}/storage", f"--runroot={folder}/run", "--storage-driver=vfs"]
    buildah = [program("buildah"), *storage]
    packages = "ca-certificates,python3,python3-venv,python3-dev"
    run(program("debootstrap"), "--variant=minbase", f"--include={packages}", "bookworm", folder / "base")
    base = run(*buildah, "from", "scratch")
    run(*buildah, "add", "--quiet", base, folder / "base", "/")
    run(*buildah, "commit", "--rm", "--quiet", base, f"docker.io/library/{BASE}")
    shutil.rmtree(folder / "base")
    chroot = ["--isolation=chroot", "--network=host"]
    run(*buildah, "build", *chroot, "--format=docker", *pip_volumes(), "--file", DOCKERFILE, "--tag", "image", ".")
    container = run(*buildah, "from", "--pull-never", "localhost/image")
    yield [*buildah, "run", *chroot, *variables, container, "--"]
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.server
def test_the_image_serves_a_pruning_server_to_anyone(inside: list[str], tmp_path: Path) -> None:
    assert run(*inside, "id", "-u") != "0"
    run(*inside, "touch", "/models/file")
    health = json.loads(re.findall(r"HEALTHCHECK.*?CMD (\[.*?\])$", DOCKERFILE.read_text(), re.S | re.M)[0])
    assert subprocess.run([*inside, *health], capture_output=True).returncode != 0
    log = tmp_path / "log"
    with log.open("w") as output:
        serving = subprocess.Popen([*inside, "sh", "-c", SERVE], stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while subprocess.run([*inside, *health], capture_output=True).returncode != 0:
            assert serving.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(1)
        client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
        part = {"type": "image_url", "image_url": {"url": data_url(photo("astronaut"))}}
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": [part]}],  # type: ignore[list-item, misc]
            max_tokens=1,
            extra_body={"eadaprune": {"energy": 0.9}},
        )
        report = (answer.model_extra or {})["eadaprune"]
        assert report["images"][0]["kept_tokens"] < 576
        assert "eadaprune_images_total" in httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
    finally:
        os.killpg(serving.pid, signal.SIGTERM)
        serving.wait(60)
