"""An evaluation harness of others against a pruning server: what ``benchmarks/REAL_MODELS.md`` tells users to do.

``EADAPRUNE_LMMS_EVAL`` names the Python of an environment with lmms-eval.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Server

from eadaprune_vllm.demo.questions import write_questions

TASK = Path(__file__).parent / "lmms_eval_task"
PYTHON = os.environ.get("EADAPRUNE_LMMS_EVAL")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="EADAPRUNE_LMMS_EVAL names no Python")
def test_the_harness_measures_the_servers_own_defaults(start: Callable[..., Server], tmp_path: Path) -> None:
    assert PYTHON
    shutil.copytree(TASK, tmp_path / "task")
    written = write_questions(tmp_path / "scenes", scenes=4)
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    for line in lines:
        line["image"] = str(written.parent / line["image"])
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    server = start("lmms_eval", "--plugin", "eadaprune", "--eadaprune-energy", "0.9", "--enforce-eager")
    where = f"model={server.NAME},base_url={server.url}/v1,api_key=none,timeout=600,num_concurrent=4"
    command = [PYTHON, "-m", "lmms_eval", "--model", "openai", "--model_args", where, "--batch_size", "1"]
    command += ["--include_path", str(tmp_path / "task"), "--tasks", "eadaprune_scenes"]
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "scores")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = server.metric("eadaprune_images_total")
    assert asked == len(lines), done.stdout + done.stderr  # when it fails its status is 0 all the same
    assert server.metric("eadaprune_visual_tokens_total", stage="kept") < 576 * len(lines)
    (found,) = (tmp_path / "scores").rglob("*results.json")
    assert 0 <= json.loads(found.read_text())["results"]["eadaprune_scenes"]["accuracy,none"] <= 1
