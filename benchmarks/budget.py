"""How long budget and selection take:  python benchmarks/budget.py [--device cuda]

Each contender computes the budget of the same feature matrices, in turns. The randomized ones find budgets of up to
``K_MAX`` tokens. The plugin's are timed with the selection of tokens: with each selector; with a third of the tokens,
as at the default target; by span, whose budget is another; and above an energy of 0.999, for which the spectrum is in
float64. The plugin cuts large images into windows, which have budgets of their own. The matrices have a dominant
direction, a steep head and a flat tail, as those of vision towers do. Times are also shares of what the tower of such
an image would take, if it ran as fast as a product of large matrices does here. Writes ``budget.json``, ``budget.png``.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import torch
import typer
from common import RESULTS, Output, save, show
from matplotlib import pyplot as plt
from rich.console import Console

from eadaprune_vllm.core.budget import TIE_TOLERANCE
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.core.options import Budget, PruneOptions
from eadaprune_vllm.core.prune import WINDOW, Encoding, compute_spectra, prune
from eadaprune_vllm.core.selectors import VisualTokens

ENERGY = 0.95
K_MAX, OVERSAMPLING = 192, 10


@dataclass(frozen=True)
class Tower:
    """A vision transformer.

    Attributes:
        layers: that are used, of which ``full`` let each patch attend to all others.
        width: of a patch.
        hidden: width within its perceptrons, which have ``matrices``.
        patches: that become a token.
    """

    layers: int
    full: int
    width: int
    hidden: int
    matrices: int = 2
    patches: int = 1

    def operations(self, tokens: int) -> float:
        """Additions and multiplications for an image, without attention within windows and what makes tokens of
        patches."""
        patches = tokens * self.patches
        weights = self.layers * (4 * self.width**2 + self.matrices * self.width * self.hidden)
        return 2.0 * patches * weights + 4.0 * self.full * patches**2 * self.width


QWEN = Tower(32, 4, 1280, 3420, matrices=3, patches=4)
SIZES = {
    "LLaVA-1.5 (576 x 1024)": (576, 1024, Tower(23, 23, 1024, 4096)),
    "SigLIP-384 (729 x 1152)": (729, 1152, Tower(27, 27, 1152, 4304)),
    "Qwen2.5-VL, 1024 tokens (1024 x 3584)": (1024, 3584, QWEN),
    "Qwen2.5-VL, 4096 tokens (4096 x 3584)": (4096, 3584, QWEN),
    "Qwen2.5-VL, 16384 tokens (16384 x 3584)": (16384, 3584, QWEN),
}


def rate(device: str) -> float:
    """Additions and multiplications per second of a product of large matrices, in the type that towers run in there."""
    side = 4096
    one = torch.randn(side, side, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((one @ one)[0, 0])  # waits for it
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def features(count: int, rows: int, columns: int, device: str) -> torch.Tensor:
    """``[count, rows, columns]`` bfloat16."""
    random = torch.Generator().manual_seed(0)
    rank = min(rows, columns)
    sigma = torch.exp(-torch.arange(rank) / 100) + 1.2 * rank**-0.5  # the tail holds the same energy at any size
    sigma[0] *= 8
    made = []
    for _ in range(count):
        left = torch.linalg.qr(torch.randn(rows, rank, generator=random)).Q
        right = torch.linalg.qr(torch.randn(columns, rank, generator=random)).Q
        made.append((left * sigma) @ right.T)
    return torch.stack(made).bfloat16().to(device)


def smallest(energies: torch.Tensor, total: torch.Tensor) -> list[int]:
    """The budget of each image, from squared singular values ``[B, n]``, descending, and ``[B]`` totals; n + 1 where
    these do not reach it."""
    share = energies.double().cumsum(-1) / total.double()[:, None]
    return ((share < ENERGY + TIE_TOLERANCE).sum(-1) + 1).tolist()


def svdvals(batch: torch.Tensor) -> list[int]:
    rows = batch.float()
    return smallest(torch.linalg.svdvals(rows).square(), rows.square().sum((1, 2)))


def svd_lowrank(batch: torch.Tensor) -> list[int]:
    rows = batch.float()
    return smallest(torch.svd_lowrank(rows, K_MAX + OVERSAMPLING, niter=2)[1].square(), rows.square().sum((1, 2)))


def randomized(batch: torch.Tensor) -> list[int]:
    """Halko, Martinsson and Tropp's, with two power iterations."""
    rows = batch.float()
    random = torch.Generator(rows.device).manual_seed(0)
    start = torch.randn(rows.shape[-1], K_MAX + OVERSAMPLING, generator=random, device=rows.device)
    basis = torch.linalg.qr(rows @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(rows @ torch.linalg.qr(rows.mT @ basis).Q).Q
    return smallest(torch.linalg.svdvals(basis.mT @ rows).square(), rows.square().sum((1, 2)))


def ours(
    selector: str, share: float | None = None, budget: Budget = "spectrum", energy: float = ENERGY
) -> Callable[[torch.Tensor], list[int]]:
    """With a budget by energy, or of a share of the tokens."""
    options = PruneOptions(energy=energy, min_tokens=1, selector=selector)

    def decide(batch: torch.Tensor) -> list[int]:
        """All spectra at once and one selection after the other, as the engine does it."""
        num_tokens = batch.shape[1]
        fixed = {"min_tokens": int(share * num_tokens), "max_tokens": int(share * num_tokens)} if share else {}
        own, layout = options.model_copy(update=fixed), Layout.whole(1, num_tokens)
        attention = torch.arange(num_tokens).float()
        encodings = [Encoding(VisualTokens(rows, attention), layout, budget) for rows in batch]
        compute_spectra(encodings, [own] * len(encodings))
        return [len(prune(encoding, own)) for encoding in encodings]

    return decide


def gram(batch: torch.Tensor) -> list[int]:
    """All of a batch at once."""
    rows = batch.float()
    rows = rows if rows.shape[1] <= rows.shape[2] else rows.mT
    product = rows @ rows.mT
    total = product.diagonal(dim1=1, dim2=2).sum(-1)
    return smallest(torch.linalg.eigvalsh(product).flip(-1).clamp(min=0), total)


A_THIRD, BY_SPAN = "eadaprune, span, a third", "eadaprune, budget by span"
FLOAT64 = "eadaprune, span, in float64"
CONTENDERS: dict[str, Callable[[torch.Tensor], list[int]]] = {
    "svdvals": svdvals,
    "svd_lowrank": svd_lowrank,
    "randomized SVD": randomized,
    "Gram + eigvalsh, batched": gram,
    "eadaprune, attention": ours("attention"),
    "eadaprune, span": ours("span"),
    A_THIRD: ours("span", 1 / 3),
    BY_SPAN: ours("span", budget="span"),
    FLOAT64: ours("span", energy=0.9995),
}


def measure(batch: torch.Tensor, seconds: float) -> dict[str, dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    budgets: dict[str, list[int]] = {}
    while pending := [name for name, spent in times.items() if len(spent) < 3 or sum(spent) < seconds]:
        for name in pending:
            start = time.perf_counter()
            budgets[name] = CONTENDERS[name](batch)  # on the CPU at the end, so that a GPU is waited for
            times[name].append(time.perf_counter() - start)
    exact = budgets["svdvals"]
    return {
        name: {
            "milliseconds": 1000 * statistics.median(spent[1:]) / len(batch),
            "least": 1000 * min(spent) / len(batch),
            "runs": len(spent),
            "budgets": budgets[name],
            "deviation": [mine - due for mine, due in zip(budgets[name], exact, strict=True)],
        }
        for name, spent in times.items()
    }


def report(size: str, count: int, windows: bool, found: dict[str, dict[str, Any]]) -> None:
    """Print the times of one size; deviations from ``svdvals`` only of budgets that are meant to be the same."""
    rows = []
    for name, row in found.items():
        other = name in (A_THIRD, BY_SPAN, FLOAT64) or (windows and name.startswith("eadaprune"))
        off_by = "" if other else f"{min(row['deviation'])} to {max(row['deviation'])}"
        ratios = [found[than]["milliseconds"] / row["milliseconds"] for than in ("svdvals", "randomized SVD")]
        rows.append([name, row["milliseconds"], *ratios, 100 * row["share_of_tower"], off_by])
    title = f"{size}, {count} at a time: milliseconds per image; budgets hold {ENERGY} of the energy"
    show(title, ["contender", "ms", "x svdvals", "x randomized", "% of tower", "budget off by"], rows)


def main(
    device: Annotated[str, typer.Option(help="Where features are, and contenders compute.")] = "cpu",
    batch: Annotated[list[int], typer.Option(help="Images at a time.")] = [1, 8, 32],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="For each contender, size and batch; at least three times.")] = 4,
    most_tokens: Annotated[int, typer.Option(help="Of an image; larger ones are left out.")] = 16384,
    output: Output = RESULTS,
) -> None:
    console = Console()
    found: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    best = rate(device)
    for size, (rows, columns, tower) in SIZES.items():
        if rows > most_tokens:
            continue
        found[size] = {}
        encoding = 1000 * tower.operations(rows) / best
        for count in batch if rows <= WINDOW["tile"] else batch[:1]:
            with console.status(f"{size}, {count} at a time"):
                each = measure(features(count, rows, columns, device), seconds)
            for row in each.values():
                row["share_of_tower"] = row["milliseconds"] / encoding
            found[size][count] = each
            report(size, count, rows > WINDOW["tile"], found[size][count])
    name = "budget" if device == "cpu" else f"budget-{device}"
    settings = {"energy": ENERGY, "k_max": K_MAX, "computed_on": device, "operations_per_second": best}
    save(output / f"{name}.json", settings, found=found)
    draw(found, output / f"{name}.png")


def draw(found: dict[str, dict[int, dict[str, dict[str, Any]]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    groups = [(size, count) for size, counts in found.items() for count in counts]
    for number, name in enumerate(CONTENDERS):
        at = [index + (number - len(CONTENDERS) / 2 + 0.5) * 0.12 for index in range(len(groups))]
        axes.bar(at, [found[size][count][name]["milliseconds"] for size, count in groups], 0.12, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds per image")
    named = [size.replace(" (", "\n(").replace(", ", ",\n") for size, _ in groups]
    axes.set_xticks(
        range(len(groups)), [f"{name}\n{n} at a time" for name, (_, n) in zip(named, groups, strict=True)], fontsize=6
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
