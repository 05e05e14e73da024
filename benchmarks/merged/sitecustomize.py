"""Python runs this at its start where ``merging.py`` puts the folder on the path: tokens that go join one that stays.

Each joins the one whose features point most nearly where its own do. What the engine is sent of a token that stays is
then, by ``EADAPRUNE_MERGE``, the ``mean`` of itself and all that joined it, or ``half`` itself and half their mean.
"""

import os

import torch
from torch.nn.functional import normalize

from eadaprune_vllm.prune import Encoding, Kept

HALF = {"half": True, "mean": False}[os.environ["EADAPRUNE_MERGE"]]


def rows_of(encoding: Encoding, kept: Kept) -> torch.Tensor:
    """``[k, W]``, of a model without newlines."""
    rows = encoding.tokens.features.float()
    directions = normalize(rows)
    goes = torch.ones(len(rows), dtype=torch.bool)
    goes[kept.indices] = False
    joins = (directions[goes] @ directions[kept.indices].T).argmax(1)
    count = torch.bincount(joins, minlength=len(kept))[:, None]
    joined = torch.zeros(len(kept), rows.shape[1]).index_add(0, joins, rows[goes])
    own = count.clamp(min=1) if HALF else 1
    merged: torch.Tensor = (own * rows[kept.indices] + joined) / (own + count)
    return merged


Encoding.rows_of = rows_of  # type: ignore[assignment, method-assign]
