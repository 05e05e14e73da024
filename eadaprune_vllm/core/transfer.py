"""The decision about an image or video, as it travels from the instance that prefills to the one that decodes.

Without torch, like ``report.py``.
"""

import base64
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from eadaprune_vllm.core.item_report import ItemReport


def _base64(text: str) -> str:
    base64.b64decode(text, validate=True)
    return text


class TransferredItem(BaseModel):
    """What one instance decided about an image or video, for others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str = Field(description="vLLM's hash of the image or video.")
    kept: Annotated[str, AfterValidator(_base64)] | None = Field(
        description="The kept placeholders: a bitmap of all placeholders in base64, the first in the highest bit; null "
        "if all are kept without a decision."
    )
    report: ItemReport

    @classmethod
    def of(cls, image_hash: str, placeholders: NDArray[np.int64] | None, report: ItemReport) -> Self:
        """A decision of this instance.

        Args:
            image_hash: vLLM's.
            placeholders: ``[p]`` the kept ones; None if there was no decision.
            report: of the item.
        """
        kept = None
        if placeholders is not None:
            bits = np.zeros(report.visual_tokens, np.bool_)
            bits[placeholders] = True
            kept = base64.b64encode(np.packbits(bits).tobytes()).decode()
        return cls(hash=image_hash, kept=kept, report=report.model_copy(update={"cached": None}))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total, kept = self.report.visual_tokens, self.report.kept_tokens
        if self.kept is None:
            if total != kept:
                raise ValueError(f"kept is null, but the report has {kept} of {total} tokens")
            return self
        bits = self._bits()
        if len(bits) != -(-total // 8) * 8 or bits[total:].any():
            raise ValueError(f"kept is not a bitmap of {total} placeholders")
        if not 0 < bits.sum() == kept:
            raise ValueError(f"kept has {bits.sum()} placeholders, and the report {kept}")
        return self

    @property
    def placeholders(self) -> NDArray[np.int64] | None:
        """``[p]``, ascending, the kept placeholders; None if there was no decision."""
        return None if self.kept is None else self._bits().nonzero()[0]

    def _bits(self) -> NDArray[np.uint8]:
        return np.unpackbits(np.frombuffer(base64.b64decode(self.kept or ""), np.uint8))
