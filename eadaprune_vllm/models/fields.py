"""What travels to the engine of one item, each name after its modality."""

import torch

FEATURES = "_features"  # [p, D], the model's dtype, for the projector
ROWS = "_rows"  # [p, W], the model's dtype, past the projector
NEWLINES = "_newlines"  # [p] bool, which of these are newlines
KEPT = "_kept"  # [p] int64, on the CPU, which of the unpruned placeholders these are


def fields_of(
    modality: str, rows: torch.Tensor, projected: bool, newlines: torch.Tensor, kept: torch.Tensor
) -> dict[str, list[torch.Tensor]]:
    """The fields of one item, as a batch of one; the same ones for every item of a model, or vLLM cannot batch them.

    Args:
        modality: of the item.
        rows: for ``ROWS`` if ``projected``, else for ``FEATURES``.
        projected: whether they are past the projector.
        newlines: for ``NEWLINES``.
        kept: for ``KEPT``.
    """
    name = ROWS if projected else FEATURES
    return {modality + name: [rows], modality + NEWLINES: [newlines], modality + KEPT: [kept]}
