"""vLLM's own models, as an engine has them: what they encode and decide is what transformers' say. Random weights."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, OWN_CODE, UNPRUNED, WITHOUT_IMAGE, WITHOUT_VIDEO
from inprocess import SCENES
from processors import processor
from reference import Reference, checked
from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader import utils as loader
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.architectures import ARCHITECTURES, adapter
from eadaprune_vllm.core.options import CHUNK, PruneOptions
from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine.decide import launch
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.messages import DecisionResult, pack, unpack_requests, unpack_responses
from eadaprune_vllm.startup import configuration

# The experts of the others want a group of ranks of their own; their towers are those of dense models.
NAMES = [name for name in FAMILIES if not name.endswith("_moe")]
OF_IMAGES = [name for name in NAMES if name not in WITHOUT_IMAGE]
IMAGES = {name: SCENES[name] for name in ("square", "wide", "tall", "small", "noise")}
CLIP = np.stack([np.asarray(SCENES["large"].crop((40 * n, 0, 40 * n + 160, 120))) for n in range(6)])
OPTIONS: list[dict[str, Any]] = [
    {"energy": 0.9, "min_tokens": 4},
    {"energy": 0.97, "min_tokens": 4, "selector": "attention"},
    {"energy": 0.9, "scope": "image", "selector": "hybrid"},
]


@pytest.fixture(scope="module")
def _engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process is a worker's, in which our models are instead of vLLM's."""
    known = dict(ModelRegistry.models)
    for architecture, path in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, path)
    store = tmp_path_factory.mktemp("ranks") / "store"
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as a worker on a CPU does, and the next
        patch.setattr(torch.accelerator, "get_memory_info", lambda: (2**30, 2**30))
        patch.setattr(loader, "_MODEL_ARCH_BY_HASH", {})  # what tests of stock models found for the same folders
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()
    ModelRegistry.models.clear()
    ModelRegistry.models.update(known)


class Loaded:
    """A small model on both sides.

    Attributes:
        model: vLLM's, ours in its place.
        reference: transformers'.
    """

    def __init__(self, name: str, folder: Path) -> None:
        own_code = name in OWN_CODE
        args = EngineArgs(
            str(folder), max_model_len=4096, dtype="float32", enforce_eager=True, trust_remote_code=own_code
        )
        self.config = args.create_engine_config()
        configuration.configure(self.config, ServerOptions())
        with set_current_vllm_config(self.config):
            self.model = get_model(vllm_config=self.config)
        self.reference = Reference(folder, torch.float32)
        self.images = {} if name in WITHOUT_IMAGE else IMAGES
        self.video = name not in WITHOUT_VIDEO
        self._folder = folder
        self._processor = MULTIMODAL_REGISTRY.create_processor(self.config.model_config)

    def read(self, items: dict[str, Any], **options: Any) -> list[PendingItem]:
        """What a front end makes of images and videos."""
        chosen = PruneOptions.model_validate(options)
        if CHUNK in self._processor.info.allowed_mm_limits:
            items = {CHUNK: [{"type": "image", "image": image} for image in items["image"]]}
        inputs = ProcessorInputs([], self._processor.info.parse_mm_data(items))
        return [
            self._processor.read(inputs, modality, index, chosen)
            for modality, of_each in items.items()
            for index in range(len(of_each))
        ]

    def decided(self, items: dict[str, Any], **options: Any) -> list[DecisionResult]:
        """What an engine answers about them."""
        runner = SimpleNamespace(
            get_model=lambda: self.model,
            vllm_config=self.config,
            device=torch.device("cpu"),
            encoder_cudagraph_manager=None,
        )
        asked = unpack_requests(pack([new.request for new in self.read(items, **options)]))
        found = unpack_responses(pack(launch(runner, asked)()))
        decided = [answer for answer in found if isinstance(answer, DecisionResult)]
        assert len(decided) == len(found)
        return decided

    @property
    def clip(self) -> Any:
        """The clip as transformers' processor has it."""
        return processor(self._folder).video_processor(CLIP, do_sample_frames=False, return_tensors="pt")

    def expected(self, **options: Any) -> list[PruneDecision]:
        """The reference's decisions about all images and the clip, as far as it takes any."""
        found = [self.reference.kept(image, **options) for image in self.images.values()]
        if self.video:
            found.append(checked(self.reference.encode(self.clip), PruneOptions.model_validate(options)))
        return found

    @property
    def items(self) -> dict[str, Any]:
        """All images and the clip, as far as it takes any."""
        metadata = {"fps": 2.0, "frames_indices": [*range(6)], "total_num_frames": 6, "do_sample_frames": False}
        images = {"image": [*self.images.values()]} if self.images else {}
        return images | ({"video": [(CLIP, metadata)]} if self.video else {})


@pytest.fixture(scope="module")
def load(_engine: None, family: Callable[[str], Path]) -> Callable[[str], Loaded]:
    return cache(lambda name: Loaded(name, family(name)))


@pytest.mark.parametrize("name", NAMES)
def test_decisions_are_those_of_the_reference(load: Callable[[str], Loaded], name: str) -> None:
    """Of several tiles, windows, frames and selectors, in batches."""
    found = load(name)
    for options in OPTIONS:
        for decided, kept in zip(found.decided(found.items, **options), found.expected(**options), strict=True):
            assert decided.decision.unpruned == kept.unpruned
            assert decided.decision.placeholders.tolist() == kept.placeholders.tolist()
            selector = options.get("selector", "span") if found.model.eadaprune_captures_attention else "span"
            assert decided.decision.selector == kept.selector == selector


@pytest.mark.parametrize("name", OF_IMAGES)
def test_embeddings_equal_those_of_transformers(load: Callable[[str], Loaded], name: str) -> None:
    """In the order of its prompt, newlines included, and with what DeepStack levels add."""
    found = load(name)
    for image, decided in zip(IMAGES.values(), found.decided({"image": [*IMAGES.values()]}, energy=1.0), strict=True):
        with torch.inference_mode():
            made = found.reference.model.get_image_features(**found.reference.inputs(image))
        levels = [torch.cat(tuple(level)) for level in (made.pooler_output, *(made.get("deepstack_features") or ()))]
        torch.testing.assert_close(decided.embeds, torch.cat(levels, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_decisions_do_not_depend_on_the_batch(load: Callable[[str], Loaded], name: str) -> None:
    found = load(name)
    together = found.decided(found.items, **OPTIONS[0])
    alone = [
        found.decided({modality: [each]}, **OPTIONS[0])[0] for modality, items in found.items.items() for each in items
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.decision.placeholders.tolist() == other.decision.placeholders.tolist()
        torch.testing.assert_close(one.embeds, other.embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name in UNPRUNED])
def test_tables_of_rotary_embeddings_reach_as_far_as_positions_may(load: Callable[[str], Loaded], name: str) -> None:
    """As far as the processor lets them."""
    layers = load(name).model.modules()
    tables = [layer.cos_sin_cache for layer in layers if isinstance(layer, MRotaryEmbedding)]
    assert {len(table) for table in tables} == {4 * 4096}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_classes_have_the_names_of_vllms(name: str) -> None:
    """By which drafters of speculative decoding know them."""
    _, stock = _MULTIMODAL_MODELS[name]
    assert adapter(name).__name__ == stock


def test_model_embeds_pruned_items_as_they_are(load: Callable[[str], Loaded]) -> None:
    """And pixels as vLLM does."""
    found = load("llava")
    given = [torch.randn(3, 128), torch.randn(5, 128)]
    embedded = found.model.embed_multimodal(image_mm_embeds=given, image_kept=[torch.arange(3), torch.arange(5)])
    assert all(torch.equal(*pair) for pair in zip(embedded, given, strict=True))
    (new,) = found.read({"image": [SCENES["square"]]}, energy=1.0)
    (decided,) = found.decided({"image": [SCENES["square"]]}, energy=1.0)
    pixels = new.request.item.get_data()["pixel_values"][None]
    torch.testing.assert_close(found.model.embed_multimodal(pixel_values=pixels)[0], decided.embeds)
