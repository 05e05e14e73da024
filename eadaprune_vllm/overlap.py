"""Whether the engine goes on while a decision is pending."""


def batches_in_flight() -> int:
    """How many batches of decision requests an engine may have at a time.

    On a GPU a worker launches the encoder without waiting for it, and decides on a thread while the engine steps: then
    there are two, one that is encoded and one that is decided about. On other devices nothing is launched without
    waiting, so there is one, and its decisions are the response to the call that launched it.
    """
    from vllm.platforms import current_platform

    return 2 if current_platform.is_cuda_alike() else 1
