"""Requests whose KV cache comes from another instance (``kv_transfer_params``): what it decided about images and videos
holds here, too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from pydantic import TypeAdapter, ValidationError
from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.transfer import TransferredItem

PARAMS = "kv_transfer_params"
TRANSFER = f"{KEY}_transfer"  # our second value among the processor's keyword arguments
_DECISIONS = TypeAdapter(dict[str, list[TransferredItem]])


@dataclass
class Transfer:
    """The decisions of another instance.

    Attributes:
        decisions: about the first images and videos of the request, by the client's modality.
        is_complete: whether the whole prompt was prefilled there.
    """

    decisions: Mapping[str, Sequence[TransferredItem]] = field(default_factory=dict)
    is_complete: bool = True

    @classmethod
    def of(cls, params: object) -> Self | None:
        """What a request's ``kv_transfer_params`` say; None if it has no KV cache of another instance.

        Raises:
            VLLMValidationError: if the decisions are malformed.
        """
        if not isinstance(params, Mapping) or not (params.get("do_remote_prefill") or params.get("remote_block_ids")):
            return None
        try:
            decisions = _DECISIONS.validate_python(params.get(KEY) or {})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, (KEY, *first["loc"])))
            raise refusal(f"{where}: {first['msg']}") from None
        return cls(decisions, bool(params.get("do_remote_prefill")))

    def decision(self, modality: str, number: int, image_hash: str, is_needed: bool) -> TransferredItem | None:
        """What was decided about an image or video; None if nothing was.

        Raises:
            VLLMValidationError: if it was about another, or nothing and ``is_needed``.
        """
        decisions = self.decisions.get(modality, ())
        if number >= len(decisions):
            if is_needed and (self.is_complete or not self.decisions):
                raise refusal(
                    f"{KEY} has no decision about {modality} {number}: the instance that prefills has to run the "
                    "plugin, and the proxy has to pass on its parameters"
                )
            return None
        if decisions[number].hash != image_hash:
            raise refusal(f"{KEY}.{modality}.{number} is about another {modality}")
        return decisions[number]

    def check(self, own: Mapping[str, Sequence[TransferredItem]]) -> None:
        """Compare with what a prompt keeps that is about to be sent to the engine.

        Args:
            own: decisions about its images and videos.

        Raises:
            VLLMValidationError: if the KV cache would be that of other tokens.
        """
        for modality, items in own.items():
            for number, item in enumerate(items):
                theirs = self.decision(modality, number, item.hash, item.kept is not None)
                if theirs and theirs.kept != item.kept:
                    raise refusal(f"{KEY}.{modality}.{number} is not what this prompt keeps of the {modality}")
        for modality, decisions in self.decisions.items():
            number = len(own.get(modality, ()))
            if len(decisions) > number:
                raise refusal(f"{KEY} has {len(decisions)} decisions, and the request {number} {modality}s")


def refusal(reason: str) -> VLLMValidationError:
    """A 400 about the parameters."""
    return VLLMValidationError(f"{PARAMS}.{reason}", parameter=PARAMS)
