"""What is built and installed, not editable, is all that a server needs, and no more than it needs."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import Start
from harness import environment
from PIL import Image

ROOT = Path(__file__).parents[2]
# What a server of a model and an API does, as far as imports go.
SERVER = """
import sys
from vllm.engine.arg_utils import EngineArgs
import eadaprune_vllm
import eadaprune_vllm.http.plugin
EngineArgs(sys.argv[1]).create_engine_config()
print(eadaprune_vllm.__file__)
print(*sorted(sys.modules))
"""


def run(folder: Path, *command: object, **env: str) -> str:
    """What it prints there, which is not where the sources are."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as its wheel installs it."""
    folder = tmp_path_factory.mktemp("built")
    run(folder, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("eadaprune_vllm-*.whl")
    run(folder, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel)
    return folder / "site"


def test_wheel_has_all_data_files_and_nothing_else(site: Path) -> None:
    top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top <= {"eadaprune_vllm", "bin"}
    package = ROOT / "eadaprune_vllm"
    tracked = subprocess.check_output(["git", "ls-files"], cwd=package, text=True).split()
    installed = {str(path.relative_to(site / "eadaprune_vllm")) for path in (site / "eadaprune_vllm").rglob("*.*")}
    assert {path for path in installed if "__pycache__" not in path} == {*tracked}
    assert {"py.typed", "http/static/page.js", "demo/trained/model.safetensors"} <= {*tracked}


def test_a_server_imports_neither_demo_nor_tools(site: Path, model: Path) -> None:
    printed = run(site.parent, "-c", SERVER, model, PYTHONPATH=str(site), VLLM_PLUGINS="eadaprune")
    file, modules = printed.splitlines()[-2:]
    assert Path(file).parent == site / "eadaprune_vllm"
    names = modules.split()
    assert "eadaprune_vllm.patches.config" in names
    ours = [name for name in names if name.startswith(("eadaprune_vllm.demo", "eadaprune_vllm.tools"))]
    assert not ours + [name for name in names if name in ("skimage", "matplotlib", "typer")]


def test_wheel_serves(site: Path, start: Start) -> None:
    demo_model = Path(run(site.parent, "-m", "eadaprune_vllm", "demo-model", PYTHONPATH=str(site)).strip())
    assert demo_model.is_relative_to(site)
    server = start("installed", "--plugin", "eadaprune", "--enforce-eager", model=demo_model, PYTHONPATH=str(site))
    report = server.ask(Image.new("RGB", (336, 336), (90, 120, 200))).model_dump()["eadaprune"]
    assert report["kept_tokens"] < report["visual_tokens"]
    page = httpx.get(f"{server.url}/eadaprune", timeout=120)
    assert page.headers["content-type"].startswith("text/html")
    assert httpx.get(f"{server.url}/v1/eadaprune/config", timeout=120).json()["reference"]["kept"]
