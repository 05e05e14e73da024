"""Where the tokens of images and videos are, which only takes a configuration and their data."""

import itertools
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES
from reference import tiled
from transformers import LlavaNextModel, LlavaOnevisionModel
from transformers.image_processing_utils import select_best_resolution
from vllm.model_executor.models.molmo2 import build_flat_image_bool_length, build_flat_video_bool_length

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.core.layout import Layout

TILED = {"llava_next": LlavaNextModel, "llava_onevision": LlavaOnevisionModel}
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
OTHER_GRIDS = ["glm4v", "glm4v_moe", "glm_ocr", "paddleocr_vl"]
LENGTHS = (1, 2, 5, 20, 90, 111, 112, 113, 224, 333, 448, 640, 800, 5000)
SIZES = list(itertools.product(LENGTHS, LENGTHS))
NEWLINE = -7.0


@cache
def small(name: str) -> tuple[Any, Any]:
    """Our class and the configuration of the small model of that name."""
    architecture, config, _ = FAMILIES[name]()
    return adapter(architecture.__name__), config


def layout(name: str, num_placeholders: int, modality: str = "image", **data: Any) -> Layout:
    cls, config = small(name)
    found: Layout = cls.eadaprune_layout(config, modality, data, num_placeholders)
    return found


def model(name: str) -> Any:
    """Our class without weights."""
    cls, config = small(name)
    found = object.__new__(cls)
    torch.nn.Module.__init__(found)
    found.config = config
    return found


def side(name: str) -> int:
    vision = small(name)[1].vision_config
    return int(vision.image_size // vision.patch_size)


def tiles(name: str, size: tuple[int, int]) -> int:
    """How many there are of an image of that height and width, the whole one included."""
    _, config = small(name)
    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    return 1 + int(height * width // config.vision_config.image_size**2)


def merged(name: str, of_tiles: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The placeholders ``[p, C]`` that vLLM's own model makes of the tiles ``[T, N, C]``."""
    cls, config = small(name)
    newline = torch.full((of_tiles.shape[-1],), NEWLINE)
    more = {"image_newline": newline} if name == "llava_onevision" else {}
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("vllm."))
    found: torch.Tensor = stock._merge_image_patch_embeddings(
        SimpleNamespace(config=config, image_newline=newline),
        torch.tensor(size),
        of_tiles,
        strategy="spatial_unpad",
        **more,
    )
    return found


def of_image(name: str, size: tuple[int, int], num_tiles: int) -> tuple[Layout, torch.Tensor]:
    """Its layout, and which of the placeholders that vLLM's own model makes of it are newlines."""
    is_newline = merged(name, torch.zeros(num_tiles, side(name) ** 2, 1), size)[:, 0] == NEWLINE
    pixels = torch.zeros(num_tiles, 3, 1, 1)
    found = layout(name, len(is_newline), pixel_values=pixels, image_sizes=torch.tensor(size))
    return found, is_newline


def same_parts(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tokens are divided alike, whatever the parts are called."""
    return torch.equal(*(torch.unique(part, return_inverse=True)[1] for part in (one, other)))


@pytest.mark.parametrize("name", TILED)
def test_newlines_are_where_vllm_has_them(name: str) -> None:
    for size in SIZES:
        found, is_newline = of_image(name, size, tiles(name, size))
        assert torch.equal(found.is_newline, is_newline), size


@pytest.mark.parametrize("name", TILED)
def test_parts_lines_and_grids_are_those_of_transformers(name: str) -> None:
    """Also of an image of which nothing but padding, or nothing but newlines, is left."""
    _, config = small(name)
    theirs: Any = SimpleNamespace(config=config)
    theirs.pack_image_features = partial(TILED[name].pack_image_features, theirs)
    for size in SIZES:
        found, _ = of_image(name, size, tiles(name, size))
        expected = tiled(theirs, tiles(name, size), torch.tensor([size]))
        assert same_parts(found.part, expected.part), size
        assert found.newlines
        assert expected.newlines
        assert torch.equal(found.newlines.line, expected.newlines.line), size
        assert found.grids == expected.grids, size
        assert sum(height * width for height, width in found.grids) == len(found.part), size


def test_tokens_come_from_the_tiles_that_vllm_takes_them_from() -> None:
    """Of a model that does not interpolate, every token can be followed."""
    for size in SIZES:
        count = tiles("llava_next", size)
        numbers = torch.arange(count).float()[:, None, None].expand(-1, side("llava_next") ** 2, 1)
        placeholders = merged("llava_next", numbers, size)[:, 0]
        found, is_newline = of_image("llava_next", size, count)
        assert same_parts(found.part, placeholders[~is_newline].long()), size


@pytest.mark.parametrize("name", TILED)
def test_a_batch_may_be_padded_with_tiles(name: str) -> None:
    size = (200, 400)
    (found, _), (padded, _) = (of_image(name, size, tiles(name, size) + more) for more in (0, 2))
    assert torch.equal(found.part, padded.part)
    assert torch.equal(found.is_newline, padded.is_newline)
    assert found.grids == padded.grids


@pytest.mark.parametrize("name", TILED)
def test_image_without_tiles_has_one_newline(name: str) -> None:
    found, is_newline = of_image(name, (300, 500), num_tiles=1)
    assert is_newline.nonzero().tolist() == [[64]]
    assert torch.equal(found.is_newline, is_newline)
    assert torch.unique(found.part).numel() == 1
    assert found.grids == ((8, 8),)
    assert found.placeholders(torch.tensor([5])).tolist() == [5, 64]


def test_frames_are_the_parts_of_a_video() -> None:
    found = layout("llava_onevision", 3 * 16 + 1, "video", pixel_values_videos=torch.zeros(3, 3, 1, 1))
    assert found.part.bincount().tolist() == [16, 16, 16]
    assert found.grids == ((4, 4),) * 3
    assert found.is_newline.nonzero().tolist() == [[48]]
    assert found.placeholders(torch.tensor([20])).tolist() == [20, 48]


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_tiles_of_a_page_are_one_picture_before_the_whole_and_a_separator(columns: int, rows: int) -> None:
    """As vLLM's own model arranges them, whose towers are left out: features say where tokens come from."""
    cls = adapter("DeepseekOCRForCausalLM")
    tiles = columns * rows if columns * rows > 1 else 0
    pixels, crops = torch.zeros(1, 3, 1024, 1024), torch.ones(tiles, 3, 640, 640)
    crop = torch.tensor([columns, rows])

    def towers(seen: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        """The number of each tile, and of the token in it, for all their tokens, after a CLS token's."""
        count, length = len(seen), (seen.shape[-1] // 64) ** 2
        numbers = torch.stack([torch.arange(count)[:, None].expand(-1, length), torch.arange(length).expand(count, -1)])
        return torch.nn.functional.pad(numbers.permute(1, 2, 0).float(), (0, 0, 1, 0))

    stock = object.__new__(cls)
    torch.nn.Module.__init__(stock)
    vars(stock).update(
        sam_model=lambda seen: torch.zeros(len(seen), 0, (seen.shape[-1] // 64) ** 2, 1),
        vision_model=towers,
        projector=lambda features: features,
        image_newline=torch.full((2,), NEWLINE),
        view_seperator=torch.full((2,), NEWLINE - 1),
    )
    (placeholders,) = stock._pixel_values_to_embedding(pixels, crops, crop[None])
    data = {"pixel_values": pixels[0], "images_crop": crops, "images_spatial_crop": crop}
    found = cls.eadaprune_layout(None, "image", data, len(placeholders))

    assert torch.equal(found.is_newline, placeholders[:, 0] <= NEWLINE)
    of_tiles, of_whole = (placeholders[~found.is_newline][found.part == part] for part in (0, 1))
    assert found.grids == ((10 * rows, 10 * columns),) * bool(tiles) + ((16, 16),)
    whole = of_whole if tiles else of_tiles
    assert torch.equal(whole[:, 1], torch.arange(256.0))
    if tiles:
        lines = of_tiles[:, 0].view(10 * rows, 10 * columns)
        assert lines.unique().numel() == tiles
        assert lines[-1, -1] == tiles - 1
    one = found.placeholders(torch.tensor([0]))
    width = 10 * columns if tiles else 16
    assert one.tolist() == [0, width, len(placeholders) - 1]


@pytest.mark.parametrize("columns", [False, True])
def test_molmo_line_ends_follow_their_tokens_and_picture_ends_are_kept(columns: bool) -> None:
    """As vLLM's own functions arrange them; the lines of the whole image may have no end."""
    config = small("molmo2")[1]
    patch, column, end = config.image_patch_id, config.image_col_id, config.image_end_token_id
    ids, _ = build_flat_image_bool_length(torch.tensor([[2, 2, 3, 4]]), config, use_single_crop_col_tokens=columns)
    found = layout("molmo2", len(ids), image_tokens=ids)
    assert found.part.tolist() == [0] * 4 + [1] * 12
    assert found.grids == ((2, 2), (3, 4))
    whole = [config.low_res_image_start_token_id, patch, *[column] * columns, end]
    finer = [config.image_start_token_id, patch, patch, column, patch, column, end]
    assert ids[found.placeholders(torch.tensor([2, 4, 6, 15]))].tolist() == whole + finer

    ids, _ = build_flat_video_bool_length(torch.tensor([[3, 2, 2]]), config)
    found = layout("molmo2", len(ids), "video", video_tokens=ids)
    assert found.part.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.grids == ((2, 2),) * 3
    frame = [config.frame_start_token_id, config.frame_end_token_id]
    assert ids[found.placeholders(torch.tensor([5]))].tolist() == [*frame, frame[0], patch, frame[1], *frame]


@pytest.mark.parametrize("name", ["llava", "llava_siglip"])
def test_client_embeddings_have_no_grid(name: str) -> None:
    assert layout(name, 64, pixel_values=torch.zeros(3, 112, 112)).grids == ((8, 8),)
    assert layout(name, 64, image_embeds=torch.zeros(64, 4)).grids == ((1, 64),)
    assert layout(name, 7, image_embeds=torch.zeros(7, 4)).grids == ((1, 7),)


@pytest.mark.parametrize("name", QWEN + OTHER_GRIDS)
@pytest.mark.parametrize("modality", ["image", "video"])
def test_temporal_patches_are_the_parts_of_a_grid(name: str, modality: str) -> None:
    found = layout(name, 3 * 24, modality, **{f"{modality}_grid_thw": torch.tensor([3, 8, 12])})
    assert found.part.tolist() == [0] * 24 + [1] * 24 + [2] * 24
    assert found.grids == ((4, 6),) * 3
    assert not found.is_newline.any()


def test_separately_encoded_frames_are_parts() -> None:
    found = layout("llava_onevision2", 3 * 24, "video", video_grid_thw=torch.tensor([[1, 8, 12]] * 3))
    assert found.part.tolist() == [0] * 24 + [1] * 24 + [2] * 24
    assert found.grids == ((4, 6),) * 3
    assert layout("llava_onevision2", 24, image_grid_thw=torch.tensor([1, 8, 12])).grids == ((4, 6),)


@pytest.mark.parametrize("name", [*QWEN, "llava_onevision2"])
@pytest.mark.parametrize(
    ("grid", "rows", "more"),
    [
        ((1, 8, 12), 23, 0),
        ((1, 8, 12), 25, 0),
        ((1, 8, 12), 24, 1),
        ((2, 8, 12), 48, 0),
        ((0, 8, 12), 0, 0),
        ((1, 0, 12), 0, 0),
        ((-1, -8, 12), 24, 0),
    ],
)
def test_client_embeddings_that_do_not_fit_their_grid_are_rejected(
    name: str, grid: tuple[int, int, int], rows: int, more: int
) -> None:
    width = 128 * 3 if name.startswith("qwen3_vl") else 128  # with what two DeepStack levels add
    fits = layout(name, 24, image_embeds=torch.zeros(24, width), image_grid_thw=torch.tensor([1, 8, 12]))
    assert fits.grids == ((4, 6),)
    embeds = torch.zeros(rows, width + more)
    words = rf"shape \({rows}, {width + more}\) do not fit a grid of {grid[0]} x {grid[1]} x {grid[2]}"
    with pytest.raises(ValueError, match=words):
        layout(name, rows, image_embeds=embeds, image_grid_thw=torch.tensor(grid))


@pytest.mark.parametrize("name", QWEN)
def test_embeddings_of_a_video_may_have_several_temporal_patches(name: str) -> None:
    width = 128 * 3 if name.startswith("qwen3_vl") else 128
    grid = torch.tensor([2, 8, 12])
    assert len(layout(name, 48, "video", video_embeds=torch.zeros(48, width), video_grid_thw=grid).grids) == 2


def test_a_cls_token_is_not_among_the_tokens_that_attention_is_given_to() -> None:
    assert model("llava").eadaprune_has_cls
    assert not model("llava_siglip").eadaprune_has_cls
    drawn = torch.arange(65.0)
    assert torch.equal(model("llava").eadaprune_token_scores("image", {}, drawn), drawn[1:])
    assert torch.equal(model("llava_siglip").eadaprune_token_scores("image", {}, drawn[:64]), drawn[:64])


@pytest.mark.parametrize("name", TILED)
def test_attention_is_arranged_like_features(name: str) -> None:
    for size in ((300, 500), (90, 70), (130, 2000), (800, 5)):
        count, cls = tiles(name, size), int(model(name).eadaprune_has_cls)
        drawn = torch.rand(count, side(name) ** 2 + cls)
        placeholders = merged(name, drawn[:, cls:, None], size)[:, 0]
        data = {"pixel_values": torch.zeros(count, 3, 1, 1), "image_sizes": torch.tensor(size)}
        found = model(name).eadaprune_token_scores("image", data, drawn.flatten())
        assert torch.equal(found, placeholders[placeholders != NEWLINE])


def test_attention_of_frames_is_pooled() -> None:
    """Four patches are a token."""
    drawn = torch.rand(3, 8, 8)
    data = {"pixel_values_videos": torch.zeros(3, 3, 1, 1)}
    found = model("llava_onevision").eadaprune_token_scores("video", data, drawn.flatten())
    torch.testing.assert_close(found, torch.nn.functional.avg_pool2d(drawn, 2).flatten())


@pytest.mark.parametrize("name", QWEN + OTHER_GRIDS[:-1])
def test_attention_of_merged_patches_is_their_mean_in_the_order_of_the_prompt(name: str) -> None:
    """Towers with windows see one window after the other, here of two by two tokens."""
    frames, height, width = 2, 4, 5
    tokens = torch.arange(frames * height * width).view(frames, height, width)
    seen = tokens.flatten()
    if name == "qwen2_5_vl":
        windows = [
            frame[top : top + 2, left : left + 2].flatten()
            for frame in tokens
            for top in range(0, height, 2)
            for left in range(0, width, 2)
        ]
        seen = torch.cat(windows)
    patches = seen[:, None] + torch.tensor([0.1, 0.2, 0.3, 0.4])
    data = {"video_grid_thw": torch.tensor([frames, 2 * height, 2 * width])}
    found = model(name).eadaprune_token_scores("video", data, patches.flatten())
    torch.testing.assert_close(found, tokens.flatten() + 0.25)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("paddleocr_vl", {"image_grid_thw": torch.tensor([1, 8, 10])}),
        ("mistral3", {"pixel_values": torch.empty(3, 8 * 14, 10 * 14)}),
    ],
)
def test_attention_of_patches_in_whole_lines_is_the_mean_of_squares(name: str, data: dict[str, torch.Tensor]) -> None:
    tokens = torch.arange(20).view(4, 5)
    patches = tokens.repeat_interleave(2, 0).repeat_interleave(2, 1) + torch.tensor([[0.1, 0.2], [0.3, 0.4]]).repeat(
        4, 5
    )
    found = model(name).eadaprune_token_scores("image", data, patches.flatten())
    torch.testing.assert_close(found, tokens.flatten() + 0.25)
