"""Numbers that the front ends of one server share in memory."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def table(length: int, shared: Path | None) -> NDArray[np.float64]:
    """An array of numbers, zero at first.

    Args:
        length: of the array.
        shared: a file that maps it into the memory of several processes; None if there is only one process.
    """
    if shared is None:
        return np.zeros(length)
    with shared.open("ab") as file:
        file.truncate(8 * length)
    return np.memmap(shared, np.float64, "r+")
