"""What the benchmarks share."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

RESULTS = Path(__file__).parent / "results"


def about() -> dict[str, Any]:
    """The commit, the command and the machine that figures come from."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} cores"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"commit": commit, "command": command, "cpu": cpu.split(": ")[1], "device": device, **versions}


def scene(seed: int) -> Image.Image:
    """An image of its own for each seed: coloured squares under noise, from nearly blank to dense."""
    random = np.random.default_rng(seed)
    blocks = int(2 ** random.uniform(0, 7))
    squares = Image.fromarray(random.integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)).resize((336, 336))
    noise = random.normal(0, 30 * random.random(), (336, 336, 3))
    return Image.fromarray(np.clip(np.array(squares) + noise, 0, 255).astype(np.uint8))
