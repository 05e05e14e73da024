"""What ``eadaprune doctor`` finds. It activates the plugin, so that it runs in a process of its own."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import environment
from stub import Stub
from transformers import LlamaConfig
from typer.testing import CliRunner

from eadaprune_vllm import __version__, compat
from eadaprune_vllm.cli import app
from eadaprune_vllm.tools import doctor
from eadaprune_vllm.tools.doctor import Finding

GONE = """
import eadaprune_vllm.compat as compat

def find(path, find=compat.find):
    if path == "{}":
        raise AttributeError
    return find(path)

compat.find = find
"""
# Stand in for other machines, in ``sitecustomize``.
MACHINES = {
    "another release": """
import eadaprune_vllm.compat as compat
from packaging.specifiers import SpecifierSet
compat.SUPPORTED = SpecifierSet(">=0.99")
""",
    "gone": GONE.format("vllm.v1.engine.core:EngineCoreProc._process_engine_step"),
    "optional and gone": GONE.format("vllm.engine.arg_utils:EngineArgs.add_cli_args"),
    "nothing is installed": """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "vllm"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
""",
}
MODELS = """
import sys
from eadaprune_vllm.tools.doctor import examine
for model in sys.argv[1:]:
    print("MODEL", *examine(model), sep="\\n")
"""


def run(*command: object, **env: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment(**env), timeout=300
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def lines(screen: str) -> dict[str, str]:
    """What is said, by what it is about."""
    assert "\x1b" not in screen
    return {line[:14].strip(): line[15:] for line in screen.splitlines()}


@pytest.mark.server
def test_all_checks_pass(stub: Stub, model: Path) -> None:
    done = run("-m", "eadaprune_vllm", "doctor", "--model", model, "--dtype", "float32", "--url", stub.url)
    found = lines(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["eadaprune"] == __version__
    assert found["vLLM"] == f"ok: {compat.version()}, supported is {compat.SUPPORTED}"
    assert found["plugin"] == "ok: installed; --plugin eadaprune activates it"
    assert found["patches"] == "ok: all applied"
    assert found["model"] == "ok: LlavaForConditionalGeneration in float32, prompts of up to 4096 tokens"
    assert found["KV cache"] == "1024 bytes per token"  # key and value x layers x KV heads x head size x bytes
    assert found["largest image"] == "576 tokens, 0.6 MiB of KV cache; by default at least 64 are kept"
    assert found["default"] == "target 0.33; the server computes its energy when it starts"
    assert found["server"] == "ok: eadaprune 1 on vLLM 1"
    assert found["serves"] == "served: A in float32"
    assert found["effective"].startswith("target 0.33: energy 0.3")
    assert found["effective"].endswith(" of the tokens of reference pictures: pages 33.0 %")
    assert found["endpoints"] == "0"
    assert not stub.asked


@pytest.mark.server
@pytest.mark.parametrize(
    ("machine", "status", "about", "says"),
    [
        ("another release", 1, "vLLM", "warning: {}, supported is >=0.99"),
        ("another release", 1, "patches", "failed: vLLM {} is not supported; supported is >=0.99 "),
        ("another release", 1, "model", "failed: not checked, because the patches failed"),
        (
            "gone",
            1,
            "patches",
            "failed: vLLM {} has no vllm.v1.engine.core:EngineCoreProc._process_engine_step with the signature",
        ),
        (
            "optional and gone",
            0,
            "patches",
            "warning: vLLM {} has no vllm.engine.arg_utils:EngineArgs.add_cli_args with the signature ",
        ),
        ("optional and gone", 0, "model", "ok: LlavaForConditionalGeneration in bfloat16"),
        ("nothing is installed", 1, "vLLM", "failed: ModuleNotFoundError: No module named 'vllm'"),
        ("nothing is installed", 1, "torch", "failed: ModuleNotFoundError: No module named 'torch'"),
        ("nothing is installed", 1, "patches", "failed: ModuleNotFoundError: No module named 'vllm'"),
        ("nothing is installed", 1, "eadaprune", __version__),
    ],
)
def test_patches_that_do_not_fit_are_findings(
    screens: Callable[[str], "subprocess.CompletedProcess[str]"], machine: str, status: int, about: str, says: str
) -> None:
    done = screens(machine)
    assert done.returncode == status
    assert lines(done.stdout)[about].startswith(says.format(compat.version()))


@pytest.fixture(scope="module")
def screens(
    tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Callable[[str], "subprocess.CompletedProcess[str]"]:
    """What is found on a machine; each is looked at once."""

    @functools.cache
    def screen(machine: str) -> "subprocess.CompletedProcess[str]":
        folder = tmp_path_factory.mktemp("machine")
        (folder / "sitecustomize.py").write_text(MACHINES[machine])
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        return run("-m", "eadaprune_vllm", "doctor", "--model", model, PYTHONPATH=path)

    return screen


@pytest.mark.server
def test_model_check_reports_support_and_cost(family: Callable[[str], Path], tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    models = [*map(family, ("qwen2_5_vl", "llava_next_video", "glm_ocr")), tmp_path / "llama", tmp_path / "nowhere"]
    done = run("-c", MODELS, *models, VLLM_LOGGING_LEVEL="CRITICAL")
    _, *screens = done.stdout.split("MODEL\n")
    qwen, video, pages, llama, nowhere = map(lines, screens)
    assert qwen["model"].startswith("ok: Qwen2_5_VLForConditionalGeneration in bfloat16")
    assert qwen["KV cache"] == "768 bytes per token"
    assert qwen["largest image"] == "144 tokens, 0.1 MiB of KV cache; by default at least 16 are kept"
    assert "largest image" not in video
    assert "largest video" in video
    assert pages["default"] == "energy 1, which keeps every token"
    assert llama["model"].startswith(
        "failed: LlamaForCausalLM is a model without images and videos, so there is nothing to prune"
    )
    assert nowhere["model"].startswith("failed: ")
    assert "nowhere" in nowhere["model"]


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (
            401,
            '{"error": "Unauthorized"}',
            "{}: Unauthorized; the server does not accept the API key in OPENAI_API_KEY",
        ),
        (404, "", "{0}: no vLLM server at this address, as there is no {0}/v1/models (404); an address is like "),
        (503, "", "{}: 503 Service Unavailable"),
        (200, "{}", "{} runs an incompatible version of the plugin"),
        (200, "<html>", "{} runs something else than vLLM"),
    ],
)
def test_server_errors_are_findings(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, status: int, body: str, says: str
) -> None:
    monkeypatch.setattr(doctor, "check_patches", lambda: iter([Finding("patches", "all applied", "ok")]))
    stub.failing = status, body
    *_, last = doctor.examine(url=stub.url)
    assert (last.about, last.state) == ("server", "failed")
    assert last.text.startswith(says.format(stub.url))


def test_a_missing_key_and_a_wrong_address_are_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_patches", lambda: iter([]))
    *_, last = doctor.examine(url=f"{stub.url}/v1/")  # the base URL of OpenAI's clients
    assert last.about == "endpoints"
    *_, last = doctor.examine(url=f"{stub.url}/v1/v1")
    assert last.text.startswith(f"{stub.url}/v1: no vLLM server at this address")
    stub.prunes = False
    *_, last = doctor.examine(url=stub.url)
    assert last.text == f"{stub.url} does not prune: is it running with --plugin eadaprune?"
    monkeypatch.delenv("OPENAI_API_KEY")
    *_, last = doctor.examine(url=stub.url)
    assert last.text == f"{stub.url}: Unauthorized; the server needs an API key, which OPENAI_API_KEY has to hold"


def test_unreachable_server_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_patches", lambda: iter([]))
    *_, last = doctor.examine(url="http://127.0.0.1:9")
    assert last == Finding("server", "http://127.0.0.1:9: Connection refused", "failed")


def test_plugin_check_reports_installation_and_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,eadaprune")
    assert doctor.check_plugin() == Finding("plugin", "installed, and activated by VLLM_PLUGINS", "ok")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert str(doctor.check_plugin()).startswith("plugin         failed: VLLM_PLUGINS does not list eadaprune")
    monkeypatch.setattr(doctor, "GROUPS", (*doctor.GROUPS, "vllm.others"))
    assert "not installed: there is no entry point eadaprune in vllm.others" in doctor.check_plugin().text


@pytest.mark.parametrize("flag", ["--dtype", "--revision"])
def test_model_flags_need_a_model(flag: str) -> None:
    done = CliRunner().invoke(app, ["doctor", flag, "x"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert "--dtype and --revision need --model" in done.stderr
