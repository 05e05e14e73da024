"""What it costs to get an image from a front end into a prompt: as pixels, as stock vLLM does, and pruned.

Of a pruned image pixels go to the engine with the question, the rows of the tokens that stay come back with the answer,
and go there again with the request. Real parts of the way: the plugin's and vLLM's serialization, and a ZeroMQ socket
between two processes. One command, one table:

    python benchmarks/boundary.py
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import zmq
from rich import print
from rich.table import Table
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.messages import DecisionRequest, DecisionResult, pack, unpack_requests, unpack_responses

TOKENS = 1024
REPEATS = 15
SHARES = (0.5, 0.22, 0.11)
# Bytes per visual token: of pixels as stock vLLM sends them, and of rows in 16 bit.
MODELS = {
    "LLaVA-1.5-7B": (336 * 336 * 3 * 2 // 576, 4096 * 2),
    "LLaVA-OneVision-7B": (384 * 384 * 3 * 2 // 729, 3584 * 2),
    "Qwen2.5-VL-7B": (4 * 3 * 2 * 14 * 14, 3584 * 2),
    "Qwen3-VL-8B": (4 * 3 * 2 * 16 * 16, 4096 * 4 * 2),
}


def engine(address: str) -> None:
    """Decodes what it is sent, and says so; answers questions with as many rows as they ask for."""
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(address)
    item, payload = MsgpackDecoder(MultiModalKwargsItem), MsgpackDecoder(bytes)
    while True:
        kind, *frames = socket.recv_multipart(copy=False)
        if kind.bytes == b"item":
            item.decode(frames)
            socket.send(b"")
        elif kind.bytes == b"question":
            (question,) = unpack_requests(payload.decode(frames))
            socket.send_multipart(MsgpackEncoder().encode(pack([answer(question)])), copy=False)
        else:
            return


def answer(question: DecisionRequest) -> DecisionResult:
    """Rows of as many bytes, of as many tokens, as the question says in its options."""
    row, kept = map(int, question.options.split())
    indices = torch.arange(kept)
    decision = PruneDecision(indices, indices, TOKENS, 0, 1.0, 1.0, None, "span")
    return DecisionResult(decision, torch.zeros(kept, row, dtype=torch.uint8), {})


def data(size: int) -> MultiModalKwargsItem:
    """An item of so many bytes."""
    value = torch.randint(0, 255, (size // 64, 64), dtype=torch.uint8)
    return MultiModalKwargsItem({"data": MultiModalFieldElem(value, MultiModalBatchedField())})


def send(socket: Any, item: MultiModalKwargsItem) -> None:
    """With a request."""
    socket.send_multipart([b"item", *MsgpackEncoder().encode(item)], copy=False)
    socket.recv()


def ask(socket: Any, item: MultiModalKwargsItem, row: int, kept: int) -> None:
    """And send the rows of the answer with a request."""
    payload = pack([DecisionRequest("image", item, f"{row} {kept}", TOKENS)])
    socket.send_multipart([b"question", *MsgpackEncoder().encode(payload)], copy=False)
    (decided,) = unpack_responses(MsgpackDecoder(bytes).decode(socket.recv_multipart(copy=False)))
    assert isinstance(decided, DecisionResult)
    send(socket, MultiModalKwargsItem({"rows": MultiModalFieldElem(decided.rows, MultiModalBatchedField())}))


def milliseconds(way: Callable[[MultiModalKwargsItem], None], size: int) -> float:
    """Median time that an item of ``size`` bytes of pixels takes."""
    times = []
    for _ in range(REPEATS):
        item = data(size)
        start = time.perf_counter()
        way(item)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    address = f"ipc://{tempfile.mkdtemp()}/engine"
    process = multiprocessing.get_context("spawn").Process(target=engine, args=(address,))
    process.start()
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(address)
    table = Table(title=f"Milliseconds (MB) per image of {TOKENS} tokens, median of {REPEATS}")
    for heading in ("model", "stock", *(f"pruned, {share:.0%} kept" for share in SHARES)):
        table.add_column(heading)
    for model, (pixels, row) in MODELS.items():
        size = pixels * TOKENS
        cells = [f"{milliseconds(partial(send, socket), size):.1f} ({size / 1e6:.1f})"]
        for share in SHARES:
            kept = int(TOKENS * share)
            spent = milliseconds(partial(ask, socket, row=row, kept=kept), size)
            cells.append(f"{spent:.1f} ({(size + 2 * row * kept) / 1e6:.1f})")
        table.add_row(model, *cells)
    socket.send(b"end")
    process.join()
    print(table)


if __name__ == "__main__":
    main()
