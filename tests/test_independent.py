"""The decisions that tests expect are LAPACK's; others are told apart from them."""

from dataclasses import replace

import pytest
import torch
from independent import check
from reference import checked

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.core.options import Budget, PruneOptions
from eadaprune_vllm.core.prune import Encoding, prune
from eadaprune_vllm.core.selectors import VisualTokens


@pytest.mark.parametrize("budget", ["spectrum", "span"])
def test_different_decisions_have_different_identifiers(budget: Budget) -> None:
    features = torch.randn(60, 40) * torch.arange(1, 41) ** -1.0
    encoding = Encoding(VisualTokens(features, None), Layout.whole(6, 10), budget)
    options = PruneOptions(energy=0.9, min_tokens=1)
    kept = checked(encoding, options)
    fewer = prune(encoding, options.model_copy(update={"max_tokens": len(kept) - 1}))
    others = replace(kept, indices=torch.arange(60 - len(kept), 60))
    for wrong in (fewer, others):
        with pytest.raises(AssertionError):
            check(encoding, options, wrong)
