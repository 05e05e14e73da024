"""How much is drawn of what pruning keeps."""

import io

import numpy as np
import pytest
from PIL import Image
from shared import photo

from eadaprune_vllm.core.draw import data_url, dim_pruned, jpeg, picture


@pytest.mark.parametrize("count", [1, 2, 5, 32, 500])
@pytest.mark.parametrize("size", [(2048, 1536), (9000, 4)])
def test_overlays_are_small(size: tuple[int, int], count: int) -> None:
    """Smaller than the file of one large picture, though every frame of a video were one."""
    frame = photo("astronaut").resize(size)
    grids = [(6, 8)] * count
    drawn = dim_pruned(lambda _: frame.copy(), range(24), grids)
    assert drawn.width * drawn.height < 1.6 * 1024**2  # white between the views included
    assert max(drawn.size) <= (1024 if count == 1 else 6400)
    source = io.BytesIO()
    frame.save(source, "JPEG")
    if size[1] > 4:
        assert len(data_url(drawn, "jpeg")) < len(source.getvalue())


def test_picture_shared_by_grids_is_shrunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shrunk = list[tuple[int, int]]()

    def resize(image: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        if image is whole:
            shrunk.append(size)
        return original(image, size, *args, **kwargs)  # type: ignore[arg-type]

    whole, original = Image.new("RGB", (4000, 3000)), Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", resize)
    dim_pruned(lambda _: whole, [], [(4, 4)] * 16)
    assert shrunk == [(256, 192)]


def test_pruned_patches_are_dark_and_grey() -> None:
    red = Image.new("RGB", (64, 32), (200, 40, 40))
    drawn = dim_pruned(lambda _: red, [1], [(1, 2)])
    assert red.getpixel((0, 0)) == (200, 40, 40)
    sent = np.asarray(picture(data_url(drawn, "jpeg"))).astype(int)
    assert np.ptp(sent[:, :32], axis=2).max() <= 2
    assert sent[:, :32].max() < 40
    assert np.abs(sent[:, 32:] - (200, 40, 40)).max() <= 3
    assert len(jpeg(drawn)) < 1500
