"""What `test_families` runs in a process of its own: chats with one model, stock or pruning. Prints a JSON object."""

import base64
import io
import json
import sys
from typing import Any

from PIL import Image
from shared import noise, photo, towers
from vllm import LLM, SamplingParams

from eadaprune_vllm.draw import data_url

TEXT = "What is it?"


def clip(frames: int, size: tuple[int, int]) -> str:
    """A video in which the picture moves, as the data URL of JPEG frames that vLLM takes."""
    scene, encoded = photo("astronaut"), []
    for number in range(frames):
        buffer = io.BytesIO()
        scene.crop((20 * number, 0, 20 * number + 300, 300)).resize(size).save(buffer, "JPEG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(encoded)


def pictures() -> dict[str, Image.Image]:
    return {
        "square": photo("astronaut").resize((200, 200)),
        "small": photo("coffee").resize((90, 70)),
        "wide": photo("rocket").resize((420, 130)),
        "tall": photo("chelsea").resize((100, 300)),
        "large": photo("page").resize((640, 480)),
        "flat": Image.new("RGB", (260, 240), (90, 120, 200)),
        "noise": noise(1, 200),
    }


def conversations(video: bool) -> dict[str, list[Any]]:
    """By name, the parts of one message."""
    scenes = pictures()
    chats: dict[str, list[Any]] = {name: [name, TEXT] for name in scenes}
    chats["several"] = ["wide", "and", "square", "flat", "then", "tall", TEXT]
    chats["twice"] = ["square", "or", "square", TEXT]
    if video:
        urls = {"clip": clip(6, (160, 120)), "short": clip(3, (112, 112))}
        chats |= {"clip": ["clip", TEXT], "both": ["small", "before", "clip", "and", "short", "after", "wide", TEXT]}
    else:
        urls = {}

    def part(name: str) -> dict[str, Any]:
        if name in scenes:
            return {"type": "image_url", "image_url": {"url": data_url(scenes[name])}}
        if name in urls:
            return {"type": "video_url", "video_url": {"url": urls[name]}}
        return {"type": "text", "text": name}

    return {name: [part(word) for word in words] for name, words in chats.items()}


def answers(llm: LLM, chats: dict[str, list[Any]], options: dict[str, Any] | None) -> dict[str, Any]:
    """What came of each, all of them at once."""
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=20, ignore_eos=True)
    found = llm.chat(
        [[{"role": "user", "content": parts}] for parts in chats.values()],
        sampling,
        use_tqdm=False,
        mm_processor_kwargs=options and {"eadaprune": options},
    )
    return {
        name: {
            "prompt": len(out.prompt_token_ids or []),
            "tokens": list(out.outputs[0].token_ids),
            "first": {token: top.logprob for token, top in (out.outputs[0].logprobs or [{}])[0].items()},
            "cached": out.num_cached_tokens,
        }
        for name, out in zip(chats, found, strict=True)
    }


if __name__ == "__main__":
    model, video, pruning = sys.argv[1], sys.argv[2] == "video", sys.argv[3:]
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=64,
        block_size=32,
        limit_mm_per_prompt={"image": 5, "video": 2 if video else 0},
    )
    chats = conversations(video)
    result = {options: answers(llm, chats, json.loads(options)) for options in pruning or ["null"]}
    result["towers"] = llm.collective_rpc(towers)
    print("RESULT", json.dumps(result))
