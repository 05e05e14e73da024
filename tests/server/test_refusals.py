"""What cannot be served does not start: status 1 or 2, one sentence, no traceback.

A case for each way to find out; all that is refused is in ``test_startup``.
"""

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from harness import VLLM, Server, environment
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

PRUNING = ["--plugin", "eadaprune"]


def llama(_: Path, folder: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def other_version(model: Path, folder: Path) -> None:
    """``sitecustomize`` stands in for another release of vLLM."""
    shutil.copytree(model, folder)
    (folder / "sitecustomize.py").write_text(
        "import eadaprune_vllm.compat as compat\n"
        "from packaging.specifiers import SpecifierSet\n"
        "compat.SUPPORTED = SpecifierSet('>=0.99')\n"
    )


@dataclass(frozen=True)
class Case:
    sentence: str
    flags: list[str] = field(default_factory=lambda: PRUNING)
    env: dict[str, str] = field(default_factory=dict)
    change: Callable[[Path, Path], None] | None = None  # makes another model of the embedded one


CASES = [
    Case("eadaprune: --eadaprune-energy does nothing without --plugin eadaprune", ["--eadaprune-energy", "0.9"]),
    Case(
        "eadaprune: --eadaprune-energy 1.9 is not allowed; it must be a number", [*PRUNING, "--eadaprune-energy", "1.9"]
    ),
    Case(
        "argument --eadaprune-detail-low: 'low' is not a JSON object of options, such as",
        [*PRUNING, "--eadaprune-detail-low", "low"],
    ),
    Case("unrecognized arguments: --eadaprune-enregy", [*PRUNING, "--eadaprune-enregy", "0.9"]),
    Case("eadaprune: x is not an option", [*PRUNING, "--mm-processor-kwargs", '{"eadaprune": {"x": 1}}']),
    Case(
        "needs vLLM's statistics, which --disable-log-stats switches off",
        [*PRUNING, "--eadaprune-load-aware", "--disable-log-stats"],
    ),
    Case("so there is nothing to prune", ["--language-model-only"], {"VLLM_PLUGINS": "eadaprune"}),
    Case(
        "the Rust front end (VLLM_USE_RUST_FRONTEND) is not supported",
        env={"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": VLLM},  # any path; it is never run
    ),
    Case(
        "supported is >=0.99 (set EADAPRUNE_SKIP_VERSION_CHECK=1 to try it anyway)",
        env={"PYTHONPATH": "."},
        change=other_version,
    ),
    Case(
        "eadaprune: LlamaForCausalLM is a model without images and videos, so there is nothing to prune",
        [*PRUNING, "--load-format", "dummy", "--skip-tokenizer-init"],
        change=llama,
    ),
]


@pytest.fixture(scope="module")
def attempts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list["Future[subprocess.CompletedProcess[str]]"]:
    """All at once, two at a time: most of it is waiting for imports."""
    folder = tmp_path_factory.mktemp("refusals")

    def serve(number: int, case: Case) -> "subprocess.CompletedProcess[str]":
        served = model
        if case.change:
            served = folder / str(number)
            case.change(model, served)
        return subprocess.run(
            [VLLM, "serve", str(served), "--port", "1", "--max-model-len", "1024", *case.flags],
            env=environment(**case.env),
            cwd=served,
            capture_output=True,
            text=True,
            timeout=240,
        )

    pool = ThreadPoolExecutor(2)
    return [pool.submit(serve, number, case) for number, case in enumerate(CASES)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.sentence for case in CASES])
def test_refused_in_one_sentence(attempts: list["Future[subprocess.CompletedProcess[str]]"], number: int) -> None:
    found = attempts[number].result()
    assert found.returncode in (1, 2), found.stderr[-2000:]
    assert "Traceback" not in found.stderr
    assert CASES[number].sentence in found.stderr.strip().splitlines()[-1]


def overflowing(model: Path, folder: Path, weight: float) -> Path:
    """The model with patch weights that large."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[next(name for name in weights if name.endswith("patch_embedding.weight"))][:] = weight
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_tower_whose_features_are_never_finite_is_refused(
    start: Callable[..., Server], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="cannot be pruned: the vision tower produced NaN or infinite features"):
        start("never-finite", *PRUNING, "--enforce-eager", model=overflowing(model, tmp_path / "model", 3e38))


def test_features_that_are_not_finite_fail_their_request_only(
    start: Callable[..., Server], model: Path, tmp_path: Path
) -> None:
    """A white image overflows, and a grey one does not; these are the reference pictures."""
    (tmp_path / "sitecustomize.py").write_text(
        "import eadaprune_vllm.reference as reference\n"
        "from PIL import Image\n"
        "colours = ['white', (122, 116, 104)]\n"
        "reference.pictures = lambda: (('surface', Image.new('RGB', (336, 336), colour)) for colour in colours)\n"
    )
    served = overflowing(model, tmp_path / "model", 6e16)  # whose squares are too large, but for grey
    server = start("not-finite", *PRUNING, "--enforce-eager", model=served, PYTHONPATH=str(tmp_path))
    white = Image.new("RGB", (336, 336), "white")
    for options in (None, {"energy": 0.5}):
        with pytest.raises(openai.InternalServerError, match="NaN or infinite features for this image"):
            server.ask(white, options=options)
    assert server.metric("eadaprune_rejected_requests_total", reason="features") == 2
    assert server.prompt_tokens("Are you still there?") > 0
