"""The demonstration: the embedded model behind a real server, real questions, tables and pictures."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import skimage.data
from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from eadaprune_vllm.core.draw import data_url, picture
from eadaprune_vllm.core.report import ItemPreview
from eadaprune_vllm.core.words import percent
from eadaprune_vllm.demo.questions import Question, questions
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import DTYPE, Server
from eadaprune_vllm.tools.plots import caption, explanation
from eadaprune_vllm.tools.questions import normalized

# By the name they have in tables. A floor of 16 tokens lets thresholds show how images differ; the default's is higher.
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {"energy": 1.0},
    "default": {},
    "0.99": {"energy": 0.99, "min_tokens": 16},
    "0.95": {"energy": 0.95, "min_tokens": 16},
}
SCENES = {"sparse": 5, "medium": 4, "dense": 15, "crowded": 7}  # seeds of held-out scenes of these densities
SHOWN = "dense"  # of this scene every answer is printed
PHOTOS = ("astronaut", "coffee", "page")
# What a server does while it starts, each by what the log says when it begins.
PHASES = {
    "": "Starting vllm serve with the plugin: loading vLLM",
    "Initializing a V1 LLM engine": "Starting the engine",
    "Starting to load model": "Loading the model",
    "init engine (": "Encoding the reference pictures, to find the energy of the default target",
    "eadaprune: energy": "Opening the HTTP server",
}
FLAGS = ("--plugin", "eadaprune", "--enforce-eager", "--max-model-len", "2048", "--dtype", DTYPE)


@dataclass(frozen=True)
class Picture:
    """Something to ask about; no questions where the model has not learnt to answer any."""

    image: Image.Image
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Answered:
    """What the server said of one picture at one setting.

    Attributes:
        preview: what the preview endpoint says; the answers report as many tokens.
        cache_bytes_saved: of KV cache, per request.
        answers: to each question.
    """

    preview: ItemPreview
    cache_bytes_saved: int
    answers: tuple[str, ...]


def run_demo(model: Path, output: Path, console: Console) -> None:
    """Serve ``model``, print what was saved and what it answers, write pictures to ``output``.

    Raises:
        RuntimeError: if the server does not start, or contradicts itself.
    """
    output.mkdir(parents=True, exist_ok=True)
    pictures = demo_pictures()
    asked = sum(len(shown.questions) or 1 for shown in pictures.values())
    with Progress(SpinnerColumn(), TimeElapsedColumn(), console=console, transient=True) as progress:
        progress.add_task("")

        def say(text: str) -> None:
            console.print(text, highlight=False)

        with Server(output / "server.log", model, *FLAGS, watch=Phases(say)) as server:
            say(f"Asking {asked} questions about {len(pictures)} pictures, at {len(SETTINGS)} settings each")
            found = {
                (name, setting): ask(server, shown, options)
                for name, shown in pictures.items()
                for setting, options in SETTINGS.items()
            }
            say("Stopping the server")
    for name in pictures:
        previews = [found[name, setting].preview for setting in SETTINGS]
        panels = [(caption(preview), picture(preview.overlay or "")) for preview in previews]
        explanation(panels, previews[0].curve, previews[1:]).savefig(output / f"{name}.png")
    console.print(budgets(pictures, found))
    console.print(answers(pictures[SHOWN].questions, [found[SHOWN, setting].answers for setting in SETTINGS]))
    console.print(
        "A model of three million parameters, which has learnt to answer questions about generated scenes and knows "
        "nothing of photographs.\n"
        f"Pictures of the kept patches: {output}/*.png; the server's log: {output}/server.log\n",
        highlight=False,
    )
    console.print(next_steps(), highlight=False, markup=False, soft_wrap=True)


class Phases:
    """Says what a server does while it starts, each phase once.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._left = dict(PHASES)

    def __call__(self, log: str) -> None:
        """Args:
        log: the server's, up to now.
        """
        for marker in [marker for marker in self._left if marker in log]:
            self._say(self._left.pop(marker))


def next_steps() -> str:
    """What to type next, with the programs that belong to this interpreter."""
    folder = Path(sys.executable).parent
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return f"""What to type next:

  VLLM_CPU_KVCACHE_SPACE=1 {folder}/vllm serve "$({folder}/eadaprune demo-model)" --plugin eadaprune
      serves this model; drop pictures into the page at http://localhost:8000/eadaprune
  {folder}/eadaprune explain PICTURE.png --url http://localhost:8000
      draws what is kept of a picture of yours, while that server runs
  {folder}/vllm serve MODEL --plugin eadaprune
      serves a model of yours; {folder}/eadaprune doctor --model MODEL says before whether it can be served"""


def demo_pictures() -> dict[str, Picture]:
    """Scenes that the model has not seen, photographs that come with scikit-image, and the two extremes: nothing to
    see, and nothing but noise."""
    found = {"flat": Picture(Image.new("RGB", (400, 300), (90, 120, 200)))}
    for name, seed in SCENES.items():
        scene = make_scene(seed, held_out=True)
        found[name] = Picture(scene.image, tuple(questions(scene, np.random.default_rng(0))))
    for name in PHOTOS:
        found[name] = Picture(Image.fromarray(getattr(skimage.data, name)()).convert("RGB"))
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return found | {"noise": Picture(Image.fromarray(noise))}


def ask(server: Server, shown: Picture, given: dict[str, Any]) -> Answered:
    """Streamed chat requests through the OpenAI SDK, one per question, and a preview of the same picture.

    Raises:
        RuntimeError: if the two do not agree.
    """
    options = {"eadaprune": given}
    image = {"type": "image_url", "image_url": {"url": data_url(shown.image)}}
    reports: list[dict[str, Any]] = []
    said = []
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for text in [question.text for question in shown.questions] or ["What is in this picture?"]:
            messages: list[Any] = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
            stream = client.chat.completions.create(
                model=server.NAME, messages=messages, max_tokens=8, temperature=0, stream=True, extra_body=options
            )
            chunks = iter(stream)
            reports.append((next(chunks).model_extra or {})["eadaprune"])
            said.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).strip())
    body = options | {"messages": messages, "overlay": True}
    (found,) = httpx.post(f"{server.url}/v1/eadaprune/preview", json=body, timeout=60).json()["images"]
    preview = ItemPreview.model_validate(found)
    if {report["kept_tokens"] for report in reports} != {preview.kept_tokens}:
        raise RuntimeError(f"the preview says {preview.kept_tokens} tokens are kept, but answers report {reports}")
    return Answered(preview, reports[0]["kv_cache_bytes_saved"], tuple(said))


def budgets(pictures: dict[str, Picture], found: dict[tuple[str, str], Answered]) -> Table:
    """One line per picture and setting."""
    default = found[next(iter(pictures)), "default"].preview.energy_threshold
    table = Table(title=f"Per-image budgets on stock vLLM; the default is energy {default:g}")
    for column in ("image", "energy", "tokens", "kept", "share", "KV saved", "right"):
        table.add_column(column, justify="left" if column == "image" else "right")
    for name, shown in pictures.items():
        for setting in SETTINGS:
            one = found[name, setting]
            right = sum(map(is_right, shown.questions, one.answers))
            table.add_row(
                name if setting == "all" else "",
                f"{one.preview.energy_threshold:g}",
                str(one.preview.visual_tokens),
                str(one.preview.kept_tokens),
                percent(one.preview.kept_tokens / one.preview.visual_tokens),
                f"{one.cache_bytes_saved / 2**20:.1f} MiB",
                f"{right}/{len(shown.questions)}" if shown.questions else "",
            )
        table.add_section()
    return table


def answers(asked: tuple[Question, ...], by_setting: list[tuple[str, ...]]) -> Table:
    """One line per question, one column per setting."""
    table = Table(title=f"Answers about the {SHOWN} scene ({SHOWN}.png) at each setting")
    table.add_column("question")
    for column in ("right answer", *SETTINGS):
        table.add_column(column, max_width=7)  # of 80 there is a third left for the question
    for question, *given in zip(asked, *by_setting, strict=True):
        colours = ("green" if is_right(question, answer) else "red" for answer in given)
        cells = (f"[{colour}]{escape(answer)}[/]" for colour, answer in zip(colours, given, strict=True))
        table.add_row(question.text, question.answer, *cells)
    return table


def is_right(question: Question, answer: str) -> bool:
    return normalized(answer) == normalized(question.answer)
