"""What ``test_any_model`` runs in a process of its own, the engine included: an architecture that is not in our table.
Prints one JSON object."""

import json
import sys
from typing import Any

from inprocess import answers
from vllm import LLM

if __name__ == "__main__":
    folder, what = sys.argv[1:]
    settings: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "dtype": "float32", "block_size": 32}
    if what == "broken":
        from vllm.model_executor.models.idefics3 import Idefics3ForConditionalGeneration as Broken

        whole = Broken.embed_multimodal
        Broken.embed_multimodal = lambda self, **kwargs: [rows[1:] for rows in whole(self, **kwargs)]
    if what != "stock":
        settings["mm_processor_kwargs"] = {"eadaprune": {"any_model": what != "unnamed"}}
    llm = LLM(folder, max_num_batched_tokens=128, **settings)
    options = [None] if what == "stock" else [{"energy": 1.0}, {"energy": 0.9, "min_tokens": 4}]
    names = ("square", "wide", "several", "twice")
    print("RESULT", json.dumps([answers(llm, [(name, each) for name in names]) for each in options]))
