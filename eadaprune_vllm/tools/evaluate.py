"""Measures the accuracy of a running server's answers with several pruning options."""

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai import APIError, AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.words import in_words
from eadaprune_vllm.errors import EAdaPruneError, ServerError
from eadaprune_vllm.tools.examiner import address, api_key, denied, nothing_there
from eadaprune_vllm.tools.images import data_url, is_url
from eadaprune_vllm.tools.questions import Question, normalized

BOOTSTRAP = 2000  # resamples
_INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Setting:
    """Named pruning options.

    Attributes:
        name: in tables.
        kind: ``none``, ``adaptive`` or ``fixed``.
        options: of all images.
        matched: for a fixed budget, the name of the adaptive setting with the same mean.
        by_image: further options of single images.
    """

    name: str
    kind: str
    options: dict[str, Any]
    matched: str | None = None
    by_image: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def selector(self) -> str:
        return str(self.options.get("selector", "server's default"))


UNPRUNED = Setting("no pruning", "none", {"energy": 1.0})


@dataclass
class Results:
    """The results of a question set with each setting, question by question.

    Attributes:
        questions: of the set.
        settings: in the order of tables.
        correct: by setting, ``[questions]`` bool.
        kept: by setting, ``[questions]`` int64, kept tokens of the question's image.
    """

    questions: Sequence[Question]
    settings: list[Setting] = field(default_factory=list)
    correct: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    kept: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def chance(self) -> dict[str, float]:
        """By category, the accuracy of always giving its most frequent answer."""
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for question in self.questions:
            answers[question.category][normalized(question.answers[0])] += 1
        return {category: max(found.values()) / found.total() for category, found in sorted(answers.items())}

    def summary(self) -> list[dict[str, Any]]:
        """For each setting accuracy and mean tokens, overall and by category and group; for fixed budgets also the
        difference of the adaptive setting with the same mean. With 95 % intervals."""
        images = np.unique([question.image for question in self.questions], return_inverse=True)[1]
        members: dict[str, dict[str, NDArray[np.bool_]]] = {}
        for attribute in ("category", "group"):
            values = np.array([getattr(question, attribute) for question in self.questions])
            members[attribute] = {str(value): values == value for value in np.unique(values)}
        rows = []
        for setting in self.settings:
            correct, kept = self.correct[setting.name], self.kept[setting.name]
            row: dict[str, Any] = {
                "setting": setting.name,
                "kind": setting.kind,
                "selector": setting.selector,
                "options": setting.options,
                "mean_tokens": float(kept.mean()),
                "accuracy": float(correct.mean()),
                "interval": interval(correct, images),
            }
            for attribute, masks in members.items():
                row[attribute] = {
                    value: {
                        "questions": int(own.sum()),
                        "accuracy": float(correct[own].mean()),
                        "interval": interval(correct[own], images[own]),
                        "mean_tokens": float(kept[own].mean()),
                    }
                    for value, own in masks.items()
                }
            if setting.matched:
                gain = self.correct[setting.matched].astype(float) - correct
                row["adaptive_minus_fixed"] = {"mean": float(gain.mean()), "interval": interval(gain, images)}
            rows.append(row)
        return rows


def interval(values: NDArray[Any], images: NDArray[Any]) -> tuple[float, float]:
    """The 95 % interval of a mean, by bootstrap over images: questions about one image are not independent.

    Args:
        values: ``[questions]``; differences make the bootstrap a paired one.
        images: ``[questions]``, the image of each question.
    """
    number = np.unique(images, return_inverse=True)[1]
    sums, counts = np.bincount(number, values.astype(float)), np.bincount(number)
    resampled = np.random.default_rng(0).integers(len(sums), size=(BOOTSTRAP, len(sums)))
    low, high = np.percentile(sums[resampled].sum(1) / counts[resampled].sum(1), _INTERVAL)
    return float(low), float(high)


@lru_cache(64)
def _url(image: str) -> str:
    """A URL for the server. The content of a file is sent, because the server may not have access to it."""
    return image if is_url(image) else data_url(Path(image).read_bytes(), image)


def adaptive(energies: Iterable[float], selectors: Sequence[str], targets: Iterable[float] = ()) -> list[Setting]:
    """Settings with thresholds and targets, each with each selector, by default with the server's."""
    named = [(f"energy {energy:g}", {"energy": energy}) for energy in energies]
    named += [(f"target {target:g}", {"target": target}) for target in targets]
    return _settings("adaptive", named, selectors)


def default(selectors: Sequence[str]) -> list[Setting]:
    """The server's default threshold with each selector, by default with the server's."""
    return _settings("adaptive", [("the server's default", {})], selectors)


def fixed(tokens: Iterable[int], selectors: Sequence[str]) -> list[Setting]:
    """Fixed budgets, each with each selector, by default with the server's."""
    return _settings("fixed", [(f"{count} tokens", exactly(count)) for count in tokens], selectors)


def _settings(kind: str, named: Sequence[tuple[str, dict[str, Any]]], selectors: Sequence[str]) -> list[Setting]:
    if not selectors:
        return [Setting(name, kind, options) for name, options in named]
    return [
        Setting(f"{name}, {selector}", kind, options | {"selector": selector})
        for selector, (name, options) in itertools.product(selectors, named)
    ]


def matched(results: Results) -> list[Setting]:
    """For each adaptive setting a fixed budget with the same mean and selector."""
    found = []
    for setting in results.settings:
        if setting.kind == "adaptive":
            count = round(float(results.kept[setting.name].mean()))
            name = f"{count} tokens, {setting.selector} (as {setting.name})"
            others = {key: value for key, value in setting.options.items() if key != "target"}  # exactly() sets energy
            found.append(Setting(name, "fixed", others | exactly(count), setting.name))
    return found


def exactly(count: int) -> dict[str, Any]:
    """Options with which every image keeps ``count`` tokens."""
    return {"energy": 0.5, "min_tokens": count, "max_tokens": count}


async def run(
    results: Results,
    url: str,
    settings: Sequence[Setting],
    *,
    with_matched: bool = False,
    model: str | None = None,
    suffix: str = "",
    concurrency: int = 16,
) -> None:
    """Send all questions with every setting, with a progress bar.

    Args:
        results: to fill.
        url: of the server.
        settings: to measure.
        with_matched: whether to measure fixed budgets with the means of the adaptive settings afterwards.
        model: name of the served model; by default the server's first.
        suffix: put after each question.
        concurrency: concurrent requests.

    Raises:
        ServerError: if the server cannot be reached, denies access or does not prune.
        ValueError: if the server rejects a question.
    """
    url = address(url)
    progress = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True))
    try:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key(), timeout=600) as client:
            model = model or (await client.models.list()).data[0].id
            with progress:

                async def measure(name: str, settings: Sequence[Setting]) -> None:
                    task = progress.add_task(name, total=len(settings) * len(results.questions))
                    await _send(client, model, results, settings, concurrency, partial(progress.advance, task), suffix)

                await measure("Questions", settings)
                if with_matched:
                    await measure("Fixed budgets", matched(results))
    except* (APIError, ValueError, OSError, EAdaPruneError) as errors:
        raise _for_user(url, errors.exceptions[0]) from None


def _for_user(url: str, error: Exception) -> Exception:
    if isinstance(error, AuthenticationError):
        return denied(url)
    if isinstance(error, NotFoundError) and not _message(error):
        return nothing_there(url)
    return ServerError(f"{url}: {_message(error) or in_words(error)}") if isinstance(error, APIError) else error


def _message(error: BaseException) -> str | None:
    """The message in a server's response; None if there is none."""
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else None


async def _send(
    client: AsyncOpenAI,
    model: str,
    results: Results,
    settings: Sequence[Setting],
    concurrency: int,
    progress: Callable[[], None],
    suffix: str,
) -> None:
    """Send every question with every setting, with greedy sampling, and add the results.

    Questions are sorted by image, and each question is sent with all settings before the next. So concurrent requests
    have different settings, and the server encodes an image once per setting.

    Args:
        client: of the server.
        model: name of the served model.
        results: gets the settings.
        concurrency: concurrent requests.
        progress: called after each answer.
        suffix: put after each question.

    Raises:
        openai.APIError: if the server cannot be reached, or denies access.
        OSError: if an image cannot be read.
        ServerError: if the server does not prune.
        ValueError: if the server rejects a question.
    """
    count = len(results.questions)
    for setting in settings:
        results.settings.append(setting)
        results.correct[setting.name] = np.zeros(count, np.bool_)
        results.kept[setting.name] = np.zeros(count, np.int64)
    by_image = sorted(range(count), key=lambda number: results.questions[number].image)
    work = (
        (number, setting)
        for _, numbers in itertools.groupby(by_image, key=lambda number: results.questions[number].image)
        for own in [list(numbers)]
        for number in own
        for setting in settings
    )

    async def worker() -> None:
        for number, setting in work:
            question = results.questions[number]
            content: list[Any] = [
                {"type": "image_url", "image_url": {"url": _url(question.image)}},
                {"type": "text", "text": question.question + suffix},
            ]
            try:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=32,
                    temperature=0,
                    extra_body={KEY: setting.options | setting.by_image.get(question.image, {})},
                )
            except BadRequestError as error:
                raise ValueError(f"{question.image}: {_message(error) or error}") from None
            report = (answer.model_extra or {}).get(KEY)
            if not report:
                raise ServerError("the server's responses have no report: is it running with --plugin eadaprune?")
            text = normalized(answer.choices[0].message.content or "")
            results.correct[setting.name][number] = text in map(normalized, question.answers)
            results.kept[setting.name][number] = report["kept_tokens"]
            progress()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(worker())
