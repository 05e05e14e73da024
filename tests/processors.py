"""transformers' processors of small checkpoints, with vLLM's pixels where these are others."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import internvl_chat
import kimi
import llava_onevision2
import mistral_format
from transformers import AutoProcessor

_MADE: dict[str, Callable[[Path], Any]] = {
    "internvl_chat": internvl_chat.processor,
    "kimi_k25": kimi.processor,
    "kimi_vl": kimi.processor,
    "llava_onevision2": llava_onevision2.processor,
    "molmo2": partial(AutoProcessor.from_pretrained, trust_remote_code=True),
    "pixtral": mistral_format.Processor,
}


def processor(folder: Path) -> Any:
    return _MADE.get(folder.name, AutoProcessor.from_pretrained)(folder)
