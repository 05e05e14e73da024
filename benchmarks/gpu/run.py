"""All that concerns speed, on one GPU, within a quarter of an hour:  python benchmarks/gpu/run.py [OUTPUT]

LLaVA-1.5-7B's geometry with random weights. Runs the benchmarks beside this folder, one after the other, and joins what
they find in ``gpu.json``. A part that fails, or takes longer than it may, is named there, and the others go on.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
# Both servers are up at the same time, so each gets less than half of the GPU.
SHARED_GPU = "--gpu-memory-utilization 0.42 --max-num-seqs 64"
SERVING = ["--language-model", "7b", "--rounds", "2", "--output-tokens", "32"]
# Name of the part -> its command, the file it writes, and the seconds it may take.
PARTS = {
    "budget": (["budget.py", "--device", "cuda", "--batch", "1", "--batch", "8"], "budget-cuda.json", 200),
    "encoder": (["encoder.py", "--device", "cuda"], "encoder.json", 120),
    "capacity": (["capacity.py"], "capacity.json", 120),
    "serving, tower on the GPU": (
        ["serving.py", *SERVING, "--device", "cuda", "--flags", SHARED_GPU],
        "serving.json",
        260,
    ),
    "serving, tower on the CPU": (
        ["serving.py", *SERVING, "--images", "1", "--concurrency", "4", "--flags", SHARED_GPU],
        "serving.json",
        200,
    ),
}


def main(output: Path) -> None:
    found: dict[str, object] = {}
    for name, (command, file, seconds) in PARTS.items():
        start, folder = time.monotonic(), output / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log").open("w") as log:
            part = [sys.executable, str(HERE / command[0]), *command[1:], "--output", str(folder)]
            process = subprocess.Popen(part, stdout=log, stderr=subprocess.STDOUT)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # so that it stops its servers
                process.wait()
        if process.returncode == 0:
            found[name] = json.loads((folder / file).read_text())
        else:
            found[name] = {"failed": process.returncode, "log": (folder / "log").read_text()[-3000:]}
        print(f"{name}: {time.monotonic() - start:.0f} s, exit status {process.returncode}")
        (output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "gpu")
