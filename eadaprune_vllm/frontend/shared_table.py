"""Numbers that the front ends of one server share."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def table(length: int, shared: Path | None) -> NDArray[np.float64]:
    """Numbers, all zero, or as other processes left them in the file ``shared``; None if there is only one process."""
    if shared is None:
        return np.zeros(length)
    with shared.open("ab") as file:
        file.truncate(8 * length)
    return np.memmap(shared, np.float64, "r+")
