"""What README and docs tell to type works as it stands there."""

import re
from pathlib import Path

import pytest
from harness import Server
from PIL import Image
from shared import photo

from eadaprune_vllm.core.draw import data_url

ROOT = Path(__file__).parent.parent.parent
BLOCKS = [
    (f"{path.relative_to(ROOT)}:{number}", block)
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class")  # of LiteLLM
@pytest.mark.parametrize(("where", "block"), BLOCKS, ids=[where for where, _ in BLOCKS])
def test_requests(pruning: Server, where: str, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "import litellm" in block:  # which brings 200 MB
        pytest.importorskip("litellm")
    page, wall = photo("page"), Image.new("RGB", (400, 300), (90, 120, 200))
    known = {"client": pruning.client, "model": "demo", "page": data_url(page), "wall": data_url(wall)}
    block = block.replace("http://localhost:8000", pruning.url)
    exec(compile(block, where, "exec"), known)
    saved, prompt = map(int, capsys.readouterr().out.split())
    assert saved > 576
    assert prompt < 2 * 576


@pytest.mark.parametrize("document", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))])
def test_links(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w-]", "", each.lower().replace(" ", "-")) for each in headings}
