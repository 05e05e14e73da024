"""transformers' processors of small checkpoints, with vLLM's pixels where these are others."""

from pathlib import Path
from typing import Any

import internvl_chat
import kimi
import llava_onevision2
import mistral_format
from transformers import AutoProcessor


def processor(folder: Path) -> Any:
    if folder.name.startswith("kimi"):
        return kimi.processor(folder)
    if folder.name == "llava_onevision2":
        return llava_onevision2.processor(folder)
    if folder.name == "pixtral":
        return mistral_format.Processor(folder)
    original = internvl_chat.original(folder)
    made = AutoProcessor.from_pretrained(original)
    if original != folder:
        side = made.image_processor.size["height"]
        made.image_processor, made.video_processor = internvl_chat.Images(side), internvl_chat.Videos(side)
    return made
