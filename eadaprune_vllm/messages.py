"""The payloads between front ends and engine cores: requests for decisions, and responses. Bytes, by vLLM's own
encoding of tensors and items, as what its utility calls carry is not typed."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import msgspec
import torch
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from eadaprune_vllm.core.prune import PruneDecision

UTILITY = "eadaprune_decide"  # the engine core's utility
REJECTED = b""  # the response while it rejects requests
_SIZE = struct.Struct("<Q")
T = TypeVar("T")


class DecisionRequest(msgspec.Struct):
    """One image or video that the engine is to encode and decide about.

    Attributes:
        modality: vLLM's, mostly ``image`` or ``video``.
        item: as vLLM would send it unpruned.
        options: resolved ``PruneOptions`` as JSON.
        num_placeholders: how many it has unpruned.
        explain: whether to say what the decision rests on, instead of rows.
    """

    modality: str
    item: MultiModalKwargsItem
    options: str
    num_placeholders: int
    explain: bool = False


class Explanation(msgspec.Struct):
    """What a decision rests on.

    Attributes:
        curve: pairs of tokens kept and the share of the energy they hold.
        thresholds: ``[N]`` float64, as in ``Spectrum``.
        grids: as in ``Layout``.
    """

    curve: list[tuple[int, float]]
    thresholds: torch.Tensor
    grids: list[tuple[int, int]]


class DecisionResult(msgspec.Struct, tag=True):
    """What was decided about one image or video.

    Attributes:
        kept: the decision.
        rows: ``[p, W]``, the model's dtype, what its language model is fed with at the placeholders that stay.
        seconds: how long each stage took.
        explanation: if it was requested.
    """

    kept: PruneDecision
    rows: torch.Tensor
    seconds: dict[str, float]
    explanation: Explanation | None = None


class DecisionError(msgspec.Struct, tag=True):
    """Why nothing could be decided about one image or video.

    Attributes:
        error: a sentence.
        reason: whether its features are to blame, or the engine is.
    """

    error: str
    reason: Literal["features", "engine"] = "engine"


DecisionResponse = DecisionResult | DecisionError


def pack(message: Sequence[DecisionRequest] | Sequence[DecisionResponse]) -> bytes:
    frames = [memoryview(frame).cast("B") for frame in MsgpackEncoder().encode(message)]
    return b"".join(part for frame in frames for part in (_SIZE.pack(len(frame)), frame))


def unpack_requests(data: bytes) -> list[DecisionRequest]:
    """What was packed."""
    return _unpack(list[DecisionRequest], data)


def unpack_responses(data: bytes) -> list[DecisionResponse]:
    """What was packed; each has memory of its own, for it may be kept when others are not."""
    return [
        _apart(response) if isinstance(response, DecisionResult) else response
        for response in _unpack(list[DecisionResponse], data)
    ]


def _apart(result: DecisionResult) -> DecisionResult:
    kept = replace(result.kept, indices=result.kept.indices.clone(), placeholders=result.kept.placeholders.clone())
    return msgspec.structs.replace(result, kept=kept, rows=result.rows.clone())


def _unpack(kind: type[T], data: bytes) -> T:
    whole, frames, at = memoryview(bytearray(data)), [], 0  # tensors over read-only memory make torch warn
    while at < len(whole):
        (size,) = _SIZE.unpack_from(whole, at)
        at += _SIZE.size
        frames.append(whole[at : at + size])
        at += size
    decoded: T = MsgpackDecoder(kind).decode(frames)
    return decoded
