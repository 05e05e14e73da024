"""What ``test_families`` runs in a process of its own: chats with several models, one after the other. The engine is in
that process too. Reads the batches of chats from standard input, prints one JSON object."""

import base64
import functools
import gc
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from families import ALL_FULL, BIDIRECTIONAL, HYBRID, LATENT, ONE_VIDEO, OWN_CODE, WITHOUT_VIDEO
from PIL import Image
from shared import noise, photo
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.triton_utils import dispatcher

from eadaprune_vllm.core.draw import data_url

TEXT = "What is it?"
SCENES = {
    "square": photo("astronaut").resize((200, 200)),
    "small": photo("coffee").resize((90, 70)),
    "wide": photo("rocket").resize((420, 130)),
    "tall": photo("chelsea").resize((100, 300)),
    "large": photo("page").resize((640, 480)),
    "flat": Image.new("RGB", (260, 240), (90, 120, 200)),
    "noise": noise(1, 200),
}


def clip(frames: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG frames of a video in which the picture moves."""
    scene, encoded = photo("astronaut"), []
    for number in range(frames):
        buffer = io.BytesIO()
        scene.crop((20 * number, 0, 20 * number + 300, 300)).resize(size).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    return encoded


CLIPS = {"clip": clip(6, (160, 120)), "short": clip(3, (112, 112))}
# By name, the parts of one message; a word that names a scene or a clip stands for it.
CHATS = {name: [name, TEXT] for name in SCENES} | {
    "several": ["wide", "and", "square", "flat", "then", "tall", TEXT],
    "twice": ["square", "or", "square", TEXT],
}
VIDEO_CHATS = {
    "clip": ["clip", TEXT],
    "between": ["small", "before", "clip", "after", "wide", TEXT],
    "both": ["small", "before", "clip", "and", "short", "after", "wide", TEXT],
}


def video_url(frames: list[bytes]) -> str:
    """As vLLM takes JPEG frames."""
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)


@functools.cache
def scene_url(name: str) -> str:
    return data_url(SCENES[name])


def message(words: list[str], options: dict[str, Any] | None) -> dict[str, Any]:
    """One chat message; every image and video in it has these options."""
    own = {} if options is None else {"eadaprune": options}

    def part(word: str) -> dict[str, Any]:
        if word in SCENES:
            return {"type": "image_url", "image_url": {"url": scene_url(word)}} | own
        if word in CLIPS:
            return {"type": "video_url", "video_url": {"url": video_url(CLIPS[word])}} | own
        return {"type": "text", "text": word}

    return {"role": "user", "content": [part(word) for word in words]}


def answers(llm: LLM, batch: list[tuple[str, dict[str, Any] | None]]) -> list[dict[str, Any]]:
    """What came of each chat under its options, all of them at once."""
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=20, ignore_eos=True)
    chats = CHATS | VIDEO_CHATS
    found = llm.chat([[message(chats[name], options)] for name, options in batch], sampling, use_tqdm=False)
    return [
        {
            "prompt": len(out.prompt_token_ids or []),
            "tokens": list(out.outputs[0].token_ids),
            "first": {token: top.logprob for token, top in (out.outputs[0].logprobs or [{}])[0].items()},
            "cached": out.num_cached_tokens,
        }
        for out in found
    ]


def rebind_kernels(overrides: Any, original: Any = dispatcher._rebind_kernels) -> None:
    """vLLM for CPU looks for its kernels in all modules, and stumbles over those of the compiler of Kimi's pixels."""
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith("llvmlite")]:
            del sys.modules[name]
        original(overrides)


if __name__ == "__main__":
    dispatcher._rebind_kernels = rebind_kernels
    gc.freeze()  # vLLM collects garbage several times for each model, and what is imported is none
    work: dict[str, list[Any]] = json.load(sys.stdin)  # model's folder -> batches
    result: dict[str, Any] = {}
    for folder, batches in work.items():
        name = Path(folder).name
        videos = 0 if name in WITHOUT_VIDEO else 1 if name in ONE_VIDEO else 2
        llm = None
        try:
            llm = LLM(
                folder,
                dtype="bfloat16" if name in ("awq", *HYBRID) else "float32",  # AWQ knows no float32
                enforce_eager=True,
                trust_remote_code=name in OWN_CODE,
                enable_prefix_caching=name not in ALL_FULL,
                max_model_len=4096,
                # Images are cut over several steps, but where vLLM never cuts them, and with latent attention.
                max_num_batched_tokens=4096 if name in LATENT else 512 if name in BIDIRECTIONAL else 64,
                block_size=16 if name in LATENT else 32,
                limit_mm_per_prompt={"image": 5, "video": videos},
            )
            result[folder] = [answers(llm, batch) for batch in batches]
        except Exception:  # of one model; the others go on
            result[folder] = traceback.format_exc()
        if llm:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    print("RESULT", json.dumps(result))
