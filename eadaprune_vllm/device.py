"""Where the vision tower runs, and what it takes of the engine's GPU there. It has not been run on a GPU yet.

An engine knows nothing of the memory that its front ends use. What it is told to leave them (vLLM's
``--mm-ipc-gpu-memory-gb``) it takes off the KV cache of each of its GPUs. The leases that vLLM hands out of this are
for decoding on the GPU, which is refused beside this plugin; towers need none, each encodes one image at a time.
"""

import math

import torch

from eadaprune_vllm.errors import StartupError

CPU = torch.device("cpu")
GIB = 2**30
# What a front end takes beside the tower's weights. Estimates: none was measured.
CONTEXT_GIB = 0.5  # CUDA's own
ACTIVATIONS_GIB = 2.0  # of encoding one image or video, up to some 50 000 patches in 16 bit


def resolve(option: str) -> torch.device:
    """The device that an option stands for. Makes no CUDA context: torch counts GPUs by NVML, or asks the driver.

    Raises:
        StartupError: if it is not there.
    """
    from vllm.platforms import current_platform

    if option == "auto":
        option = "cuda" if current_platform.is_cuda() else "cpu"
    device = torch.device(option)
    if device.type == "cpu":
        return device
    flag = f"--eadaprune-device {option}"
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise StartupError(f"{flag}: this PyTorch has no CUDA")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise StartupError(f"{flag}: there is no such GPU; PyTorch finds {count}")
    return torch.device("cuda", index)


def is_engines(device: torch.device) -> bool:
    """Whether the engine may be on this GPU too; which of several GPUs are the engine's is not looked at."""
    from vllm.platforms import current_platform

    return device.type == "cuda" and bool(current_platform.is_cuda_alike())


def room(weights: int, front_ends: int) -> float:
    """GiB that an engine must leave to its front ends. Nothing keeps these from encoding at the same time.

    Args:
        weights: bytes of one tower's.
        front_ends: how many there are.
    """
    return _hundredths(front_ends * (weights / GIB + CONTEXT_GIB + ACTIVATIONS_GIB))


def check_room(given: float, weights: int, front_ends: int) -> None:
    """Raises:
    StartupError: if the towers' weights alone do not fit into what the operator leaves them, in GiB.
    """
    least = _hundredths(front_ends * (weights / GIB + CONTEXT_GIB))
    if given < least:
        raise StartupError(
            f"--mm-ipc-gpu-memory-gb {given:g} is too little for a vision tower on the GPU: {front_ends} front end(s) "
            f"need more than {least:g}; without the flag it would be {room(weights, front_ends):g}"
        )


def limit(given: float, front_ends: int) -> int:
    """Bytes that torch may take in one front end of the GiB that an engine leaves to all of them."""
    return int((given / front_ends - CONTEXT_GIB) * GIB)


def prepare(device: torch.device, gpu_bytes: int | None) -> None:
    """Set torch up for encoding on a GPU. The first CUDA call of a front end.

    Args:
        device: the GPU.
        gpu_bytes: the most that torch may take of it; what needs more fails alone instead of taking what the engine
            may need.
    """
    if gpu_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(gpu_bytes / total, 1.0), device)
    # The same image must always get the same budget, and at float32 the one it gets on a CPU.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def _hundredths(gib: float) -> float:
    return math.ceil(gib * 100) / 100
