"""Requests that other instances worked on: what these decided about images and videos holds here, too.

An instance that prefills returns its decisions in ``kv_transfer_params``, in the order of the prompt; one that encodes
returns them in ``ec_transfer_params``, in the entry of each identifier.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError
from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.transfer import TransferredItem

KV_PARAMS = "kv_transfer_params"
EC_PARAMS = "ec_transfer_params"
TRANSFER = f"{KEY}_transfer"  # our second value among the processor's keyword arguments
_BY_MODALITY = TypeAdapter(dict[str, list[TransferredItem]])
_BY_IDENTIFIER = TypeAdapter(dict[str, TransferredItem])


@dataclass
class Transfer:
    """The decisions of other instances.

    Attributes:
        prefilled: about the first images and videos of the request, by the client's modality, of the instance whose KV
            cache it loads; None if it loads none.
        encoded: by vLLM's hash of an image or video, of instances that encode; None if they decided differently about
            two of its occurrences.
        is_complete: whether the whole prompt was prefilled.
        num_tokens: of the prompt that was prefilled; None if not known.
    """

    prefilled: Mapping[str, Sequence[TransferredItem]] | None = None
    encoded: Mapping[str, TransferredItem | None] = field(default_factory=dict)
    is_complete: bool = True
    num_tokens: int | None = None

    @classmethod
    def of(cls, params: object) -> Self | None:
        """What a request's parameters say.

        Args:
            params: with ``kv_transfer_params`` and ``ec_transfer_params``, if it has any: its body, or the
                ``extra_args`` of its sampling parameters.

        Returns:
            None if no other instance worked on it.

        Raises:
            VLLMValidationError: if the decisions are malformed.
        """
        kv, ec = _mapping(_mapping(params).get(KV_PARAMS)), _mapping(_mapping(params).get(EC_PARAMS))
        entries = {identifier: _mapping(entry)[KEY] for identifier, entry in ec.items() if KEY in _mapping(entry)}
        loads = kv.get("do_remote_prefill") or kv.get("remote_block_ids")
        if not loads and not entries:
            return None
        encoded: dict[str, TransferredItem | None] = {}
        for item in _validated(_BY_IDENTIFIER, entries, EC_PARAMS).values():
            encoded[item.hash] = None if item.hash in encoded else item
        if not loads:
            return cls(encoded=encoded)
        prefilled = _validated(_BY_MODALITY, kv.get(KEY) or {}, KV_PARAMS)
        is_complete, num_tokens = bool(kv.get("do_remote_prefill")), kv.get("remote_num_tokens")
        return cls(prefilled, encoded, is_complete, num_tokens if isinstance(num_tokens, int) else None)

    def decision(self, modality: str, number: int, image_hash: str, is_needed: bool) -> TransferredItem | None:
        """What was decided about an image or video; None if nothing was.

        Raises:
            VLLMValidationError: if the request loads KV cache, and the decision is about another, or there is none and
                ``is_needed``.
        """
        if self.prefilled is not None:
            decisions = self.prefilled.get(modality, ())
            if number < len(decisions):
                if decisions[number].hash != image_hash:
                    raise _refusal(f"{KEY}.{modality}.{number} is about another {modality}")
                return decisions[number]
            if is_needed and (self.is_complete or not self.prefilled):
                raise _refusal(
                    f"{KEY} has no decision about {modality} {number}: the instance that prefills has to run the "
                    "plugin, and the proxy has to pass on its parameters"
                )
        return self.encoded.get(image_hash)

    def check(self, own: Mapping[str, Sequence[TransferredItem]], num_tokens: int) -> None:
        """Compare with a prompt that is about to be sent to the engine.

        Args:
            own: decisions about its images and videos.
            num_tokens: of the prompt.

        Raises:
            VLLMValidationError: if the KV cache would be that of other tokens.
        """
        if self.prefilled is None:
            return
        for modality, items in own.items():
            for number, item in enumerate(items):
                theirs = self.decision(modality, number, item.hash, item.kept is not None)
                if theirs and theirs.kept != item.kept:
                    raise _refusal(f"{KEY}.{modality}.{number} is not what this prompt keeps of the {modality}")
        for modality, decisions in self.prefilled.items():
            number = len(own.get(modality, ()))
            if len(decisions) > number:
                raise _refusal(f"{KEY} has {len(decisions)} decisions, and the request {number} {modality}s")
        if self.is_complete and self.num_tokens is not None and self.num_tokens < num_tokens:
            raise _refusal(f"remote_num_tokens={self.num_tokens} is less than the {num_tokens} tokens of this prompt")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _validated(adapter: TypeAdapter[Any], value: object, parameter: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, (KEY, *first["loc"])))
        raise _refusal(f"{where}: {first['msg']}", parameter) from None


def _refusal(reason: str, parameter: str = KV_PARAMS) -> VLLMValidationError:
    return VLLMValidationError(f"{parameter}.{reason}", parameter=parameter)
