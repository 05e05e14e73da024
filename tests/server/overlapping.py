"""A plugin of vLLM for tests (entry point ``vllm.general_plugins``): decisions are made beside the engine's steps, as
on a GPU, and each batch takes ``DECISION_SECONDS`` longer."""

import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerator import announce, overlap_decisions

DECISION_SECONDS = 1.0


def register() -> None:
    """Entry point: vLLM calls it in every process."""
    overlap_decisions()
    worker: Any = import_module("eadaprune_vllm.engine.worker")
    launch = worker.launch

    def slow(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        decide = launch(*args, **kwargs)

        def sleep_and_decide() -> Any:
            time.sleep(DECISION_SECONDS)
            return decide()

        return sleep_and_decide

    worker.launch = slow


def environment(folder: Path) -> dict[str, str]:
    """Of a server with this plugin and ours, which finds the entry point in the folder."""
    announce(folder, "overlapping", "overlapping:register")
    here = Path(__file__).parent
    paths = [folder, here, here.parents[1] / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), "VLLM_PLUGINS": "overlapping,eadaprune"}
