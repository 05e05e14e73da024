"""What only a GPU can tell, on one GPU:  python benchmarks/gpu/run.py [OUTPUT [PART ...]]

LLaVA-1.5-7B's geometry with random weights. Runs the benchmarks beside this folder, one after the other, and joins
what they find in ``gpu.json``. A part that fails, or takes longer than it may, is there with what it had found, and the
others go on. Called again with the same folder, the parts that were not finished go on where they were.

- ``serving-1``, ``serving-32``: stock vLLM, the plugin at energy 1.0, and pruned, in one run; 1, 16 and 64 requests at
  a time with images of their own, 1 and 32 tokens per answer. Also what the engine spends on each image, by stages.
- ``budget``: eigenvalues and the other ways to a budget on the GPU, in batches, beside the plugin's
- ``capacity``: how many requests fit into the KV cache
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
# Both servers are up at the same time, so each gets less than half of the GPU.
SHARED_GPU = "--dtype bfloat16 --gpu-memory-utilization 0.42 --max-num-seqs 64"
SERVING = ["serving.py", "--language-model", "7b", "--images", "1", "--rounds", "2", "--requests", "16"]
SERVING += ["--concurrency", "1", "--concurrency", "16", "--concurrency", "64", "--flags", SHARED_GPU]
BATCHES = [part for batch in (1, 4, 16, 32) for part in ("--batch", str(batch))]
# Name of the part -> its command, the file it writes, and the seconds it may take.
PARTS = {
    "serving-32": ([*SERVING, "--output-tokens", "32"], "serving.json", 420),
    "serving-1": ([*SERVING, "--output-tokens", "1"], "serving.json", 300),
    "budget": (["budget.py", "--device", "cuda", *BATCHES], "budget-cuda.json", 240),
    "capacity": (["capacity.py"], "capacity.json", 120),
}


def run(name: str, folder: Path) -> dict[str, object]:
    """What a part found, so far as it came, and how it ended."""
    command, file, seconds = PARTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        part = [sys.executable, str(HERE / command[0]), *command[1:], "--output", str(folder)]
        process = subprocess.Popen(part, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that it stops its servers
            process.wait()
    found: dict[str, object] = {"status": process.returncode}
    if process.returncode:
        found["log"] = (folder / "log").read_text()[-3000:]
    if (folder / file).exists():
        found["found"] = json.loads((folder / file).read_text())
    return found


def main(output: Path, names: list[str]) -> None:
    joined = output / "gpu.json"
    found: dict[str, dict[str, object]] = json.loads(joined.read_text()) if joined.exists() else {}
    for name in names or [name for name in PARTS if found.get(name, {}).get("status") != 0]:
        start = time.monotonic()
        found[name] = run(name, output / name)
        print(f"{name}: {time.monotonic() - start:.0f} s, exit status {found[name]['status']}", flush=True)
        joined.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "gpu", sys.argv[2:])
