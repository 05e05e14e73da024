"""The IPC payloads between front ends and engine cores: decision requests and responses.

They are bytes, because arguments of vLLM's utility calls are not typed; the encoding is vLLM's own.
"""

import struct
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import msgspec
import torch
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from eadaprune_vllm.core.prune import PruneDecision

# Tensors are views of the payload, which nobody writes to.
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
UTILITY = "eadaprune_decide"  # name of the utility call
REJECTED = b""  # the response of an engine core that rejects requests
_SIZE = struct.Struct("<Q")
T = TypeVar("T")


class DecisionRequest(msgspec.Struct):
    """One image or video to encode and decide about.

    Attributes:
        modality: vLLM's, mostly ``image`` or ``video``.
        item: as vLLM would send it without pruning.
        options: effective ``PruneOptions`` as JSON.
        num_placeholders: without pruning.
        explain: whether to respond with an explanation instead of embeddings.
    """

    modality: str
    item: MultiModalKwargsItem
    options: str
    num_placeholders: int
    explain: bool = False


class Explanation(msgspec.Struct):
    """Why a decision is as it is.

    Attributes:
        curve: pairs of kept tokens and the share of the energy they hold.
        thresholds: ``[N]`` float64, as in ``Spectrum``.
        grids: as in ``Layout``.
    """

    curve: list[tuple[int, float]]
    thresholds: torch.Tensor
    grids: list[tuple[int, int]]


class DecisionResult(msgspec.Struct, tag=True):
    """The decision about one image or video.

    Attributes:
        decision: what is kept.
        embeds: ``[p, W]``, the model's dtype, the multimodal embeddings of the kept placeholders.
        seconds: time of each stage.
        explanation: if it was requested.
    """

    decision: PruneDecision
    embeds: torch.Tensor
    seconds: dict[str, float]
    explanation: Explanation | None = None


class DecisionError(msgspec.Struct, tag=True):
    """Why an image or video could not be decided about.

    Attributes:
        error: a sentence for the client.
        reason: ``features`` if they are not finite, ``engine`` for every other error.
    """

    error: str
    reason: Literal["features", "engine"] = "engine"


DecisionResponse = DecisionResult | DecisionError


def pack(message: Sequence[DecisionRequest] | Sequence[DecisionResponse]) -> bytes:
    """Encode a batch."""
    frames = [memoryview(frame).cast("B") for frame in MsgpackEncoder().encode(message)]
    return b"".join(part for frame in frames for part in (_SIZE.pack(len(frame)), frame))


def unpack_requests(data: bytes) -> list[DecisionRequest]:
    """Decode a batch of requests."""
    return _unpack(list[DecisionRequest], data)


def unpack_responses(data: bytes) -> list[DecisionResponse]:
    """Decode a batch of responses. Each gets memory of its own, because caches keep some longer than others."""
    return [
        _copied(response) if isinstance(response, DecisionResult) else response
        for response in _unpack(list[DecisionResponse], data)
    ]


def _copied(result: DecisionResult) -> DecisionResult:
    decision = result.decision
    decision = replace(decision, indices=decision.indices.clone(), placeholders=decision.placeholders.clone())
    return msgspec.structs.replace(result, decision=decision, embeds=result.embeds.clone())


def _unpack(kind: type[T], data: bytes) -> T:
    whole, frames, at = memoryview(data), list[memoryview](), 0
    while at < len(whole):
        (size,) = _SIZE.unpack_from(whole, at)
        at += _SIZE.size
        frames.append(whole[at : at + size])
        at += size
    decoded: T = MsgpackDecoder(kind).decode(frames)
    return decoded
