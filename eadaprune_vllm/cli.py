"""The ``eadaprune`` command."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from eadaprune_vllm.tools.console import check_outputs, flags, refused, warn, warn_of_skipped

if TYPE_CHECKING:
    from eadaprune_vllm.tools.examiner import Examiner

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Per-image visual token budgets on stock vLLM.")

Url = Annotated[
    str | None, typer.Option(help="URL of a server that runs with --plugin eadaprune. OPENAI_API_KEY has its API key.")
]
Model = Annotated[
    str | None, typer.Option(help="Instead of --url: folder or hub id of a model; an engine is started with it.")
]
Dtype = Annotated[str | None, typer.Option(help="vLLM's --dtype for --model. Budgets may depend on it.")]
Revision = Annotated[str | None, typer.Option(help="Revision of --model on the hub.")]
MinTokens = Annotated[int | None, typer.Option(help="Minimum number of tokens of an image.")]
MaxTokens = Annotated[int | None, typer.Option(help="Maximum number of tokens of an image.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite output files that exist.")]
Scope = Annotated[str | None, typer.Option(help="What has to reach the threshold: tile or image.")]


@contextmanager
def _examiner(url: str | None, model: str | None, dtype: str | None, revision: str | None) -> "Iterator[Examiner]":
    """Context manager: the source of decisions; errors of the user end the command with one sentence."""
    if (url is None) == (model is None):
        raise typer.BadParameter("give either --url of a server, or --model to start an engine")
    if url is not None and (dtype or revision):
        raise typer.BadParameter("--dtype and --revision need --model: a server has its own")
    with refused(), closing(_served(url) if url is not None else _offline(str(model), dtype, revision)) as examiner:
        yield examiner


def _served(url: str) -> "Examiner":
    from eadaprune_vllm.tools.examiner import ServedModel

    return ServedModel(url)


def _offline(model: str, dtype: str | None, revision: str | None) -> "Examiner":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM's log is of no use in a command
    from eadaprune_vllm.tools.offline import OfflineModel

    return OfflineModel(model, dtype or "auto", revision)


def _given(**options: Any) -> dict[str, Any]:
    """The options that are given.

    Raises:
        InvalidOptionsError: naming option, value and allowed range.
    """
    from eadaprune_vllm.core.options import PruneOptions, overlay

    given = {name: value for name, value in options.items() if value is not None}
    overlay(PruneOptions(), given, "options")
    return given


@app.command("demo-model")
def demo_model() -> None:
    """Print the folder of the embedded model."""
    from eadaprune_vllm.demo import MODEL

    print(MODEL)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the server's log.")] = Path("demo-output"),
) -> None:
    """Serve the embedded model with the plugin, send questions at several thresholds, and show what was saved."""
    from eadaprune_vllm.demo import MODEL
    from eadaprune_vllm.demo.run import run_demo

    run_demo(MODEL, output, Console())


@app.command("demo-questions")
def demo_questions(
    output: Annotated[Path, typer.Argument(help="Folder for images and questions.jsonl.")],
    scenes: Annotated[int, typer.Option(help="Number of scenes, with about nine questions each.")] = 300,
    force: Force = False,
) -> None:
    """Write generated scenes that the embedded model was not trained on, with questions for `eadaprune evaluate`."""
    from eadaprune_vllm.demo.questions import QUESTIONS, write_questions

    check_outputs(force, output / QUESTIONS)
    print(write_questions(output, scenes))


@app.command()
def calibrate(
    images: Annotated[list[str], typer.Argument(help="Images, folders, glob patterns, URLs, or JSONL files of these.")],
    target: Annotated[float, typer.Option(help="Share of their tokens that images should keep on average.")] = 0.33,
    url: Url = None,
    model: Model = None,
    min_tokens: MinTokens = None,
    max_tokens: MaxTokens = None,
    scope: Scope = None,
    dtype: Dtype = None,
    revision: Revision = None,
    store: Annotated[Path, typer.Option(help="File with the spectrum of each image.")] = Path("spectra.jsonl"),
    histogram: Annotated[Path, typer.Option(help="Output file: histogram of the budgets.")] = Path("budgets.png"),
    table: Annotated[bool, typer.Option("--table", help="Also print mean budgets over thresholds.")] = False,
    force: Force = False,
) -> None:
    """Find the threshold at which your images keep a given share of their tokens on average.

    Every image is encoded once, by a server (--url) or by an engine that this command starts (--model). With the same
    --store, an interrupted run is continued, and another --target needs no encoding. Options that are not given are the
    server's.
    """
    from eadaprune_vllm.core.budget import Targets
    from eadaprune_vllm.core.options import overlay
    from eadaprune_vllm.tools import calibrate as tool
    from eadaprune_vllm.tools import plots, tables

    check_outputs(force, histogram)
    with _examiner(url, model, dtype, revision) as examiner:
        _given(target=target)
        given = _given(min_tokens=min_tokens, max_tokens=max_tokens, scope=scope)
        found = tool.find_images(images)
        options = overlay(examiner.defaults, {"enabled": True} | given, "options")
        curves, skipped = tool.encode(examiner, found, store, options.scope)
        warn_of_skipped(skipped)
        if not curves:
            raise ValueError(f"none of {len(skipped)} images could be encoded")
        name, budget = examiner.name, examiner.about["budget"]
    targets = Targets(curves, options)
    nearest = targets.nearest(target)
    if nearest != target:
        warn(
            f"target {target:g} is not reachable",
            f"thresholds keep {targets.min_target:.3f} to {targets.max_target:.3f} of the tokens of these images on "
            f"average; {nearest:.3f} is used"
            + (", where budgets still differ between images" if nearest < target else ""),
        )
    solved = options.model_copy(update={"target": nearest, "energy": targets.energy(nearest)})
    budgets = [curve.budget(solved) for curve in curves]
    console = Console()
    if table:
        console.print(tables.means(curves, options))
    console.print(tables.budgets(budgets, solved.energy))
    plots.histogram(budgets, f"{name}, energy {solved.energy:g}").savefig(histogram, dpi=120)
    console.print(f"Picture: {histogram}; spectra: {store}; skipped: {len(skipped)}", highlight=False)
    values = {"energy": f"{solved.energy:g}", "budget": None if budget == "spectrum" else budget} | given
    ours = flags(**{f"eadaprune_{option}": value for option, value in values.items()})
    if model:
        print(f"vllm serve {model} {flags(dtype=dtype, revision=revision, plugin='eadaprune')} {ours}")
    else:
        console.print(f"Flags of the server of {name}:", highlight=False)
        print(ours)


@app.command()
def explain(
    image: Annotated[str, typer.Argument(help="Path or URL.")],
    url: Url = None,
    model: Model = None,
    energy: Annotated[list[float], typer.Option(help="Threshold; may be repeated.")] = [],  # noqa: B006
    target: Annotated[list[float], typer.Option(help="Mean share of tokens; may be repeated.")] = [],  # noqa: B006
    selector: Annotated[str | None, typer.Option(help="Which tokens are kept: span, diversity, ...")] = None,
    min_tokens: MinTokens = None,
    max_tokens: MaxTokens = None,
    scope: Scope = None,
    dtype: Dtype = None,
    revision: Revision = None,
    output: Annotated[Path, typer.Option(help="Output file: the picture.")] = Path("explanation.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the decisions as JSON.")] = False,
    force: Force = False,
) -> None:
    """Draw which patches of an image are kept at which threshold, and the curve of its energy.

    Decisions come from a server (--url), or from an engine that this command starts (--model). Options that are not
    given are the server's, and so is the threshold.
    """
    from eadaprune_vllm.core.draw import picture
    from eadaprune_vllm.tools import images
    from eadaprune_vllm.tools.plots import caption, explanation

    chosen = {"selector": selector, "min_tokens": min_tokens, "max_tokens": max_tokens, "scope": scope}
    check_outputs(force, output)
    with _examiner(url, model, dtype, revision) as examiner:
        thresholds = [{"energy": each} for each in energy] + [{"target": each} for each in target]
        given = [_given(**each, **chosen) for each in thresholds or [{}]]
        file = images.read(image)
        panels = [("the image", images.picture(file, image))]
        previews = [examiner.examine(file, options, overlay=True) for options in given]
    panels += [(caption(report), picture(report.overlay or "")) for report in previews]
    explanation(panels, previews[0].curve, previews).savefig(output, dpi=120)
    if as_json:
        redacted = [report.model_dump(exclude={"overlay", "spectrum", "cached"}) for report in previews]
        print(json.dumps(redacted, indent=1))
    else:
        Console().print(f"Picture: {output}", highlight=False)


@app.command()
def evaluate(
    questions: Annotated[Path, typer.Argument(help="JSONL: image, question, answer (or answers), category, group.")],
    url: Annotated[
        str, typer.Option(help="URL of a server that runs with --plugin eadaprune.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Name of the served model; by default the server's first.")] = None,
    energy: Annotated[list[float], typer.Option(help="Threshold; may be repeated.")] = [],  # noqa: B006
    target: Annotated[list[float], typer.Option(help="Mean share of tokens; may be repeated.")] = [],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="Fixed budget; may be repeated.")] = [],  # noqa: B006
    selector: Annotated[list[str], typer.Option(help="May be repeated; by default the server's.")] = [],  # noqa: B006
    matched: Annotated[bool, typer.Option(help="Add a fixed budget with the same mean for each threshold.")] = True,
    suffix: Annotated[str, typer.Option(help="Text after each question, such as how to answer.")] = "",
    concurrency: Annotated[int, typer.Option(help="Concurrent requests.")] = 16,
    output: Annotated[Path, typer.Option(help="Output file: results as JSON; a plot is written beside it.")] = Path(
        "quality.json"
    ),
    force: Force = False,
) -> None:
    """Measure the accuracy of a server's answers: without pruning, by default, and with other options."""
    from eadaprune_vllm.tools import evaluate as tool
    from eadaprune_vllm.tools import tables
    from eadaprune_vllm.tools.plots import accuracy
    from eadaprune_vllm.tools.questions import read_questions

    plot = output.with_suffix(".png")
    check_outputs(force, output, plot)
    with refused():
        results = tool.Results(read_questions(questions))
        pruned = [*tool.default(selector), *tool.adaptive(energy, selector, target), *tool.fixed(tokens, selector)]
        settings = [tool.UNPRUNED, *pruned]
        asyncio.run(
            tool.run(results, url, settings, with_matched=matched, model=model, suffix=suffix, concurrency=concurrency)
        )
    rows = results.summary()
    Console().print(tables.accuracy(rows, len(results.questions)))
    about = {"questions": str(questions), "count": len(results.questions), "suffix": suffix, "chance": results.chance()}
    output.write_text(json.dumps({"about": about, "settings": rows}, indent=1) + "\n")
    accuracy(rows).savefig(plot, dpi=120)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a model to check.")] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    url: Url = None,
) -> None:
    """Print what is installed here, and whether the plugin works with it: for a bug report.

    With --model also whether this model can be served, and what an image costs; with --url the configuration of a
    running server. It starts no engine and loads no weights. The exit status is 1 if a check fails.
    """
    if model is None and (dtype or revision):
        raise typer.BadParameter("--dtype and --revision need --model")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # errors are findings
    from eadaprune_vllm.tools.doctor import examine

    colours, failed = {"failed": "red", "warning": "yellow"}, False
    for finding in examine(model, dtype, revision, url):
        typer.secho(finding, fg=colours.get(finding.state or ""))  # in colours on a terminal only
        failed |= finding.state == "failed"
    raise typer.Exit(int(failed))
