"""Code that comes with a checkpoint of Molmo 2: its configuration and pixels, as vLLM expects them of Ai2's."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import BaseVideoProcessor, BatchFeature, PretrainedConfig, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.video_utils import make_batched_videos
from vllm.model_executor.models.molmo2 import select_tiling


class Molmo2Config(PretrainedConfig):  # type: ignore[misc]
    """Made of parts that have what vLLM's loader reads."""

    model_type = "molmo2"

    def __init__(self, vit_config: Any = None, adapter_config: Any = None, text_config: Any = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.vit_config = PretrainedConfig(**(vit_config or {}))
        self.adapter_config = PretrainedConfig(**(adapter_config or {}))
        self.text_config = PretrainedConfig(**(text_config or {}))


def _patches(image: Image.Image, rows: int, columns: int, patch: int) -> torch.Tensor:
    """``[rows, columns, pixels]`` of an image that is made as large."""
    made = image.convert("RGB").resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(made)) / 127.5 - 1
    return pixels.view(rows, patch, columns, patch, 3).transpose(1, 2).flatten(2)


def _pooled(patches: torch.Tensor, pooling: list[int]) -> torch.Tensor:
    """``[height, width, pooled]`` of the numbers of patches ``[rows, columns]``; -1 for none, around them."""
    (down, across), (rows, columns) = pooling, patches.shape
    below, right = -rows % down, -columns % across
    padded = pad(patches, (right // 2, right - right // 2, below // 2, below - below // 2), value=-1)
    return padded.unfold(0, down, down).unfold(1, across, across).flatten(2)


class Molmo2ImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Sees images whole, and larger in crops that overlap, of whose patches each counts once."""

    def __init__(self, size: Any = None, patch_size: int = 14, max_crops: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.patch_size, self.max_crops = size, patch_size, max_crops
        self.pooling_size, self.overlap_margins = [2, 2], [1, 1]

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        made = [self._seen(image) for image in make_flat_list_of_images(images)]
        crops, pooling, grids = zip(*made, strict=True)
        return BatchFeature(
            {
                "pixel_values": torch.cat(crops),
                "image_token_pooling": torch.cat(pooling),
                "image_grids": torch.tensor(grids),
                "image_num_crops": torch.tensor([len(of_image) for of_image in crops]),
            }
        )

    def _seen(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """Its crops, what patches of these are pooled, and to what grids."""
        patch, side, (margin, other) = self.patch_size, self.size["height"] // self.patch_size, self.overlap_margins
        both = margin + other
        step = side - both
        width, height = (length - both * patch for length in image.size)
        tiling = select_tiling(height=height, width=width, patch_size=step * patch, max_num_patches=self.max_crops)
        down, across = map(int, tiling)
        rows, columns = down * step + both, across * step + both
        fine = _patches(image, rows, columns, patch).unfold(0, side, step).unfold(1, side, step)
        crops = [_patches(image, side, side, patch)[None], fine.permute(0, 1, 3, 4, 2).flatten(0, 1)]
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        crop_row, crop_column = (
            ((place - margin) // step).clamp(0, count - 1) for place, count in ((row, down), (column, across))
        )
        crop = 1 + crop_row * across + crop_column
        numbers = (crop * side + row - crop_row * step) * side + column - crop_column * step
        whole, finer = (
            _pooled(of_grid, self.pooling_size) for of_grid in (torch.arange(side**2).view(side, side), numbers)
        )
        pooling = torch.cat([whole.flatten(0, 1), finer.flatten(0, 1)])
        return torch.cat(crops).flatten(1, 2), pooling, (*whole.shape[:2], *finer.shape[:2])


class Molmo2VideoProcessor(BaseVideoProcessor):  # type: ignore[misc]
    """Sees each frame whole."""

    def __init__(self, size: Any = None, patch_size: int = 14, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.patch_size, self.pooling_size, self.num_frames = size, patch_size, [3, 3], 8

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        side = self.size["height"] // self.patch_size
        crops, pooling, grids = [], [], []
        for frames in make_batched_videos(videos):
            crops += [_patches(Image.fromarray(frame), side, side, self.patch_size).flatten(0, 1) for frame in frames]
            numbers = torch.arange(len(frames) * side**2).view(-1, side, side)
            pooled = torch.stack([_pooled(of_frame, self.pooling_size) for of_frame in numbers])
            pooling.append(pooled.flatten(0, 2))
            grids.append(pooled.shape[:3])
        return BatchFeature(
            {
                "pixel_values_videos": torch.stack(crops),
                "video_token_pooling": torch.cat(pooling),
                "video_grids": torch.tensor(grids),
            }
        )


class Molmo2Processor(ProcessorMixin):  # type: ignore[misc]
    """Writes out what stands for images and videos, after a token that begins the prompt."""

    image_use_col_tokens = use_single_crop_start_token = use_frame_special_tokens = True
    use_single_crop_col_tokens = video_use_col_tokens = False

    def __init__(
        self, image_processor: Any = None, video_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, video_metadata: Any = None, **kwargs: Any
    ) -> BatchFeature:
        made: dict[str, Any] = {}
        if images:
            made |= self.image_processor(images)
            for rows, columns, *finer in made["image_grids"].tolist():
                whole = f"<low_res_im_start>{'<im_patch>' * rows * columns}<im_end>"
                lines = ("<im_patch>" * finer[1] + "<im_col>") * finer[0]
                text = text.replace("<|image|>", f"{whole}<im_start>{lines}<im_end>", 1)
        if videos:
            made |= self.video_processor(videos)
            ((redacted,),) = video_metadata
            for frames, rows, columns in made["video_grids"].tolist():
                seen = f"<frame_start>{'<im_patch>' * rows * columns}<frame_end>"
                times = [index / redacted.fps for index in redacted.frames_indices]
                assert len(times) == frames
                text = text.replace("<|video|>", " ".join(f"{time:.1f} {seen}" for time in times), 1)
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return BatchFeature({"input_ids": pad(ids, (1, 0), value=self.tokenizer.bos_token_id), **made})
