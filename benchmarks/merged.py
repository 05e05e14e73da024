"""Worker extension with which ``merging.py`` starts its server: tokens that go join one that stays.

Each joins the one whose features point most nearly where its own do. What the projector is fed with of a token that
stays is then, by ``EADAPRUNE_MERGE``, the ``mean`` of itself and all that joined it, or ``half`` itself and half their
mean.
"""

import os
from typing import Any

import torch
from torch.nn.functional import normalize

from eadaprune_vllm.engine import decide
from eadaprune_vllm.wire import Decided

HALF = {"half": True, "mean": False}[os.environ["EADAPRUNE_MERGE"]]


class Merging:
    """Adds nothing to the worker: importing it is what changes the decision."""


def merged(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``[k, D]`` float32.

    Args:
        features: ``[N, D]``, of all tokens.
        indices: ``[k]`` int64, which of them stay.
    """
    rows = features.float()
    directions = normalize(rows)
    goes = torch.ones(len(rows), dtype=torch.bool)
    goes[indices] = False
    joins = (directions[goes] @ directions[indices].T).argmax(1)
    count = torch.bincount(joins, minlength=len(indices))[:, None]
    joined = torch.zeros(len(indices), rows.shape[1]).index_add(0, joins, rows[goes])
    own = count.clamp(min=1) if HALF else 1
    found: torch.Tensor = (own * rows[indices] + joined) / (own + count)
    return found


def answer(model: Any, question: Any, options: Any, encoded: Any) -> Decided:
    """What the engine answers, of a LLaVA-1.5, with merged tokens."""
    decided = _plain(model, question, options, encoded)
    features = merged(encoded.features.cpu(), decided.kept.indices)
    place = next(model.multi_modal_projector.parameters())
    decided.rows = model.multi_modal_projector(features.to(place)).cpu()
    return decided


_plain = decide._answer
decide._answer = answer
