"""The ``eadaprune`` command."""

import asyncio
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eadaprune_vllm.errors import EAdaPruneError

if TYPE_CHECKING:
    from eadaprune_vllm.options import PruneOptions
    from eadaprune_vllm.tools.offline import OfflineModel

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Per-image visual token budgets on stock vLLM.")

Model = Annotated[str, typer.Option(help="Folder or hub id of a model that vLLM serves with this plugin.")]
Device = Annotated[str, typer.Option(help="Where the vision tower runs: auto, cpu or cuda[:n].")]
Dtype = Annotated[str, typer.Option(help="vLLM's --dtype: budgets may depend on it.")]
Revision = Annotated[str | None, typer.Option(help="Of the hub's model.")]
MinTokens = Annotated[int | None, typer.Option(help="Fewest tokens an image is cut down to.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens an image may keep.")]
Scope = Annotated[str | None, typer.Option(help="What reaches the threshold: tile or image.")]


@contextmanager
def _refused() -> Iterator[None]:
    """While open, what the user got wrong ends the command with one sentence."""
    try:
        yield
    except (ValueError, OSError, EAdaPruneError) as error:
        raise typer.BadParameter(str(error)) from None


def _options(**given: Any) -> "PruneOptions":
    from eadaprune_vllm.options import PruneOptions, overlay

    with _refused():
        return overlay(PruneOptions(), {name: value for name, value in given.items() if value is not None}, "options")


def _quiet() -> None:
    """Before vLLM is imported: what it says of itself is for servers."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def _offline(model: str, device: str, dtype: str, revision: str | None) -> "OfflineModel":
    from eadaprune_vllm.tools.offline import OfflineModel

    with Console(stderr=True).status("Loading the vision tower"):
        return OfflineModel(model, device, dtype, revision)


@app.command("demo-model")
def demo_model() -> None:
    """Print the folder of the embedded model."""
    from eadaprune_vllm.demo import MODEL

    print(MODEL)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the server's log.")] = Path("demo-output"),
) -> None:
    """Serve the embedded model with the plugin, ask it about pictures at several thresholds, show what was saved."""
    from eadaprune_vllm.demo import MODEL
    from eadaprune_vllm.demo.run import run_demo

    run_demo(MODEL, output, Console())


@app.command("demo-questions")
def demo_questions(
    output: Annotated[Path, typer.Argument(help="Folder for images and questions.jsonl.")],
    scenes: Annotated[int, typer.Option(help="How many; about nine questions are asked of each.")] = 300,
) -> None:
    """Write generated scenes that the embedded model has not seen, with questions for `eadaprune evaluate`."""
    from eadaprune_vllm.demo.questions import write_questions

    print(write_questions(output, scenes))


@app.command()
def calibrate(
    images: Annotated[list[str], typer.Argument(help="Images, folders, globs, URLs, or JSONL files of these.")],
    model: Model,
    target_tokens: Annotated[float, typer.Option(help="The mean budget that images should have.")],
    min_tokens: MinTokens = None,
    max_tokens: MaxTokens = None,
    scope: Scope = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    revision: Revision = None,
    store: Annotated[Path, typer.Option(help="File that keeps each image's spectrum.")] = Path("spectra.jsonl"),
    histogram: Annotated[Path, typer.Option(help="Picture of the budgets.")] = Path("budgets.png"),
    table: Annotated[bool, typer.Option("--table", help="Also print mean budgets over thresholds.")] = False,
) -> None:
    """Find the threshold at which your images keep a given number of tokens in the mean.

    Every image is encoded once; go on after an interruption, or ask for another target, with the same --store.
    """
    _quiet()
    from eadaprune_vllm.tools import calibrate as tool

    options = _options(min_tokens=min_tokens, max_tokens=max_tokens, scope=scope)
    with _refused():
        found = tool.find_images(images)
        about = {"model": model, "revision": revision, "dtype": dtype, "device": device, "scope": options.scope}
        curves, skipped = tool.encode(lambda: _offline(model, device, dtype, revision), found, store, about, options)
        for where, reason in skipped.items():
            Console(stderr=True).print(f"[yellow]skipped[/] {where}: {reason}", highlight=False)
        solved = tool.solve(curves, target_tokens, options)
    console = Console()
    budgets = [curve.budget(solved) for curve in curves]
    if table:
        means = Table("threshold", "mean tokens")
        for threshold in (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 1.0):
            at = options.model_copy(update={"energy": threshold})
            means.add_row(f"{threshold:g}", f"{tool.mean(curves, at):.1f}")
        console.print(means)
    quartiles = statistics.quantiles(budgets, n=4, method="inclusive") if len(budgets) > 1 else budgets * 3
    shown = Table(title=f"Tokens of {len(curves)} images at energy {solved.energy:g}")
    row = [min(budgets), *quartiles, max(budgets), statistics.mean(budgets)]
    for heading in ("least", "quarter", "median", "three quarters", "most", "mean"):
        shown.add_column(heading, justify="right")
    shown.add_row(*(f"{value:.0f}" for value in row[:-1]), f"{row[-1]:.1f}")
    console.print(shown)
    tool.histogram(budgets, f"{model}, energy {solved.energy:g}").savefig(histogram, dpi=120)
    console.print(f"Picture: {histogram}; spectra: {store}; skipped: {len(skipped)}", highlight=False)
    flags = {
        "dtype": None if dtype == "auto" else dtype,
        "revision": revision,
        "plugin": "eadaprune",
        "eadaprune-energy": f"{solved.energy:g}",
        "eadaprune-min-tokens": min_tokens,
        "eadaprune-max-tokens": max_tokens,
        "eadaprune-scope": scope,
    }
    given = " ".join(f"--{name} {value}" for name, value in flags.items() if value is not None)
    print(f"vllm serve {model} {given}")


@app.command()
def explain(
    image: Annotated[str, typer.Argument(help="Path or URL.")],
    model: Model,
    energy: Annotated[list[float], typer.Option(help="Threshold; may be given several times.")] = [0.95, 0.99],  # noqa: B006
    selector: Annotated[str | None, typer.Option(help="Which tokens stay.")] = None,
    min_tokens: MinTokens = None,
    max_tokens: MaxTokens = None,
    scope: Scope = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    revision: Revision = None,
    output: Annotated[Path, typer.Option(help="Picture that takes the explanation.")] = Path("explanation.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the decisions as JSON.")] = False,
) -> None:
    """Draw which patches of an image stay at which threshold, and the curve that decides."""
    _quiet()
    from eadaprune_vllm.tools.offline import load_image
    from eadaprune_vllm.tools.plots import caption, explanation

    given = {"selector": selector, "min_tokens": min_tokens, "max_tokens": max_tokens, "scope": scope}
    options = [_options(energy=threshold, **given) for threshold in energy]
    with _refused():
        picture = load_image(image)
        look = _offline(model, device, dtype, revision)
        found = [look.examine(picture, each) for each in options]
    previews = [each.preview() for each in found]
    panels = [("the image", picture)]
    panels += [(caption(report), each.overlay()) for report, each in zip(previews, found, strict=True)]
    explanation(panels, previews[0].curve, previews).savefig(output, dpi=120)
    if as_json:
        print(json.dumps([report.model_dump(exclude={"overlay", "cached"}) for report in previews], indent=1))
    else:
        Console().print(f"Picture: {output}", highlight=False)


@app.command()
def evaluate(
    questions: Annotated[Path, typer.Argument(help="JSONL: image, question, answer (or answers), category, group.")],
    url: Annotated[str, typer.Option(help="Of a server that runs with --plugin eadaprune.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of the served model; by default its first.")] = None,
    energy: Annotated[list[float], typer.Option(help="Threshold; may be given several times.")] = [],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="Fixed budget; may be given several times.")] = [],  # noqa: B006
    selector: Annotated[list[str], typer.Option(help="May be given several times; by default the server's.")] = [],  # noqa: B006
    matched: Annotated[bool, typer.Option(help="Add a fixed budget of the same mean for each threshold.")] = True,
    suffix: Annotated[str, typer.Option(help="Put after each question, such as how to answer.")] = "",
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    output: Annotated[Path, typer.Option(help="Takes the results as JSON, and a plot beside it.")] = Path(
        "quality.json"
    ),
) -> None:
    """Measure how often a server answers right, without pruning and under thresholds, budgets and selectors."""
    from eadaprune_vllm.tools import evaluate as tool
    from eadaprune_vllm.tools.plots import accuracy

    with _refused():
        results = tool.Results(tool.read_questions(questions))
        settings = [tool.UNPRUNED, *tool.adaptive(energy, selector), *tool.fixed(tokens, selector)]
        asyncio.run(
            tool.run(results, url, settings, with_matched=matched, model=model, suffix=suffix, concurrency=concurrency)
        )
    rows = results.summary()
    shown = Table(title=f"{len(results.questions)} questions")
    for heading in ("setting", "mean tokens", "accuracy", "95 %", "adaptive - fixed"):
        shown.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        gain = row.get("adaptive_minus_fixed")
        shown.add_row(
            row["setting"],
            f"{row['mean_tokens']:.1f}",
            f"{row['accuracy']:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]),
            "{:+.3f} ({:+.3f} to {:+.3f})".format(gain["mean"], *gain["interval"]) if gain else "",
        )
    Console().print(shown)
    about = {"questions": str(questions), "count": len(results.questions), "suffix": suffix, "chance": results.chance()}
    output.write_text(json.dumps({"about": about, "settings": rows}, indent=1) + "\n")
    accuracy(rows).savefig(output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    app()
