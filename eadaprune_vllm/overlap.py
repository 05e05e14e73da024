"""Whether the engine goes on while a decision is pending."""

ON_GPU = 6


def batches_in_flight() -> int:
    """How many batches of decision requests an engine may have at a time.

    On a GPU a worker launches the encoder without waiting for it, and decides on a thread while the engine steps: so
    some are encoded while others are decided about. Small ones are decided sooner. On other devices nothing is launched
    without waiting, so there is one, and its decisions are the response to the call that launched it.
    """
    from vllm.platforms import current_platform

    return ON_GPU if current_platform.is_cuda_alike() else 1
