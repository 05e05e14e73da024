"""What it costs to send an image from a front end to the engine: as pixels, and as rows of which a share is kept.

Real parts of the way: vLLM's serialization and a ZeroMQ socket between two processes. One command, one table:

    python benchmarks/boundary.py
"""

import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch
import zmq
from rich import print
from rich.table import Table
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

TOKENS = 1024
REPEATS = 15
SHARES = (1.0, 0.5, 0.22, 0.11)
# Bytes per visual token: of pixels as stock vLLM sends them, and of rows in 16 bit.
MODELS = {
    "LLaVA-1.5-7B": (336 * 336 * 3 * 2 // 576, 1024 * 2),
    "LLaVA-OneVision-7B": (384 * 384 * 3 * 2 // 729, 3584 * 2),
    "Qwen2.5-VL-7B": (4 * 3 * 2 * 14 * 14, 3584 * 2),
    "Qwen3-VL-8B": (4 * 3 * 2 * 16 * 16, 4096 * 4 * 2),
}


def engine(address: str) -> None:
    """Decodes what it is sent and says so."""
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(address)
    decoder = MsgpackDecoder(MultiModalKwargsItem)
    while True:
        frames = socket.recv_multipart(copy=False)
        if len(frames[0].buffer) == 0:
            return
        decoder.decode(frames)
        socket.send(b"")


def milliseconds(socket: Any, size: int) -> float:
    """Median time from tensor to tensor of an item of ``size`` bytes."""
    times = []
    encoder = MsgpackEncoder()
    for _ in range(REPEATS):
        data = torch.randint(0, 255, (size // 64, 64), dtype=torch.uint8)
        item = MultiModalKwargsItem({"rows": MultiModalFieldElem(data, MultiModalBatchedField())})
        start = time.perf_counter()
        socket.send_multipart(encoder.encode(item), copy=False)
        socket.recv()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    address = f"ipc://{tempfile.mkdtemp()}/engine"
    process = multiprocessing.get_context("spawn").Process(target=engine, args=(address,))
    process.start()
    socket = zmq.Context().socket(zmq.REQ)
    socket.connect(address)
    table = Table(title=f"Milliseconds (MB) per image of {TOKENS} tokens, median of {REPEATS}")
    for heading in ("model", "pixels", *(f"rows, {share:.0%} kept" for share in SHARES)):
        table.add_column(heading)
    for model, (pixels, row) in MODELS.items():
        sizes = [pixels * TOKENS, *(row * int(TOKENS * share) for share in SHARES)]
        table.add_row(model, *(f"{milliseconds(socket, size):.1f} ({size / 1e6:.1f})" for size in sizes))
    socket.send(b"")
    process.join()
    print(table)


if __name__ == "__main__":
    main()
