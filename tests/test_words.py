"""Numbers and errors as people read them."""

import io
from pathlib import Path

import pytest
from PIL import Image

from eadaprune_vllm.core.words import in_words, percent


@pytest.mark.parametrize(("share", "text"), [(0.165, "16.5 %"), (0.0278, "2.8 %"), (1, "100.0 %")])
def test_shares_have_one_decimal(share: float, text: str) -> None:
    assert percent(share) == text


def test_errors_show_no_python(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="BytesIO object at") as of_bytes:
        Image.open(io.BytesIO(b"no image"))
    assert in_words(of_bytes.value) == "cannot identify image file"
    with pytest.raises(OSError, match="Errno") as missing:
        (tmp_path / "none").read_bytes()
    assert in_words(missing.value) == f"{tmp_path / 'none'}: No such file or directory"
    assert in_words(ConnectionRefusedError("[Errno 111] Connection refused")) == "Connection refused"
    assert in_words("a <_io.BufferedReader name='x.png'> that ends") == "a that ends"
    assert in_words(TimeoutError()) == "TimeoutError"
