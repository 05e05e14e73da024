"""Worker extension with which ``merging.py``, ``baselines.py`` and ``windows.py`` start their servers: what becomes of
an image's tokens is, by ``EADAPRUNE_MERGE``, one of ``WAYS``, or they are decided on in windows of at most so many.

Merged: tokens that go join one that stays, the one whose features point most nearly where their own do. What the
projector is fed with of a token that stays is then the ``mean`` of itself and all that joined it, or ``half`` itself
and half their mean.

Of squares: k tokens are the middle ones of k squares of the image's grid, whatever it shows, instead of those that
the selector ``uniform`` takes. These stay as they are (``grid``), or their rows are the means of their squares: of what
the language model is fed with (``pooled``), or of what the projector is (``pooled before``).
"""

import os
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch.nn.functional import normalize

from eadaprune_vllm.core import prune
from eadaprune_vllm.core.selectors import SELECTORS, VisualTokens
from eadaprune_vllm.engine import decide
from eadaprune_vllm.messages import DecisionResult


class Merging:
    """Adds nothing to the worker: importing it is what changes the decision."""


def merged(features: torch.Tensor, indices: torch.Tensor, half: bool) -> torch.Tensor:
    """``[k, D]`` float32.

    Args:
        features: ``[N, D]``, of all tokens.
        indices: ``[k]`` int64, which of them stay.
        half: whether a token that stays weighs as much as all that join it.
    """
    rows = features.float()
    directions = normalize(rows)
    goes = torch.ones(len(rows), dtype=torch.bool)
    goes[indices] = False
    joins = (directions[goes] @ directions[indices].T).argmax(1)
    count = torch.bincount(joins, minlength=len(indices))[:, None]
    joined = torch.zeros(len(indices), rows.shape[1]).index_add(0, joins, rows[goes])
    own = count.clamp(min=1) if half else 1
    found: torch.Tensor = (own * rows[indices] + joined) / (own + count)
    return found


def middles(tokens: VisualTokens, k: int) -> torch.Tensor:
    """A selector: the middle token of each of k squares that a square grid is cut into."""
    side, count = isqrt(tokens.num_tokens), isqrt(k)
    size = side // count
    assert (count * size) ** 2 == tokens.num_tokens, f"{tokens.num_tokens} tokens are not {k} squares"
    line = torch.arange(count) * size + size // 2
    return (line[:, None] * side + line).flatten()


def pooled(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The means of these squares, ``[k, D]``, in the order of their middles.

    Args:
        rows: ``[N, D]``, of all tokens.
        indices: ``[k]`` int64, the middles.
    """
    side, count = isqrt(len(rows)), isqrt(len(indices))
    return rows.view(count, side // count, count, side // count, -1).mean((1, 3)).flatten(0, 1)


def projected(model: Any, features: torch.Tensor) -> torch.Tensor:
    """What the language model of a LLaVA-1.5 is fed with."""
    place = next(model.multi_modal_projector.parameters())
    rows: torch.Tensor = model.multi_modal_projector(features.to(place)).cpu()
    return rows


# From the model, what it makes of an image, and which tokens stay, to the rows in their places.
WAYS: dict[str, Callable[[Any, Any, torch.Tensor], torch.Tensor]] = {
    "mean": lambda model, image, indices: projected(model, merged(image.features.cpu(), indices, half=False)),
    "half": lambda model, image, indices: projected(model, merged(image.features.cpu(), indices, half=True)),
    "grid": lambda model, image, indices: image.rows[indices].cpu(),
    "pooled": lambda model, image, indices: pooled(image.rows, indices).cpu(),
    "pooled before": lambda model, image, indices: projected(model, pooled(image.features, indices)),
}
WAY = os.environ["EADAPRUNE_MERGE"]


def encoding(model: Any, *args: Any, **kwargs: Any) -> prune.Encoding:
    """What the engine decides on; the model is noted."""
    _models[:] = [model]
    return _encoding(model, *args, **kwargs)


def response(request: Any, options: Any, encoding: Any, encoded: Any) -> DecisionResult:
    """What the engine responds, of a LLaVA-1.5."""
    decided = _response(request, options, encoding, encoded)
    decided.rows = WAYS[WAY](_models[-1], encoded, decided.kept.indices)
    return decided


if WAY.isdigit():
    prune.WINDOW["tile"] = int(WAY)
else:
    _models: list[Any] = []
    _encoding, _response = decide._encoding, decide._response
    decide._encoding, decide._response = encoding, response
    if WAY not in ("mean", "half"):
        SELECTORS["uniform"] = middles
