"""Where the tokens of an image or video are: parts, grids and newlines."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Newlines:
    """Where a model puts newlines between the tokens of an image.

    Attributes:
        mask: ``[placeholders]`` bool, which of the unpruned placeholders are newlines.
        line: ``[N]`` int64, for each token the number of the newline that ends its line, or -1. Newlines that end no
            token's line are separators between pictures.
    """

    mask: torch.Tensor
    line: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Where the N tokens of one image or video are. Tokens are in the order of the prompt, without newlines.

    Attributes:
        part: ``[N]`` int64, the tile of the image, or temporal patch of the video, of each token.
        grids: height and width of grids that the tokens fill one after the other. Each grid covers the whole image, or
            one temporal patch.
        newlines: if the model has any.
        mrope_span: upper bound of the M-RoPE positions that the image or video spans; 0 without M-RoPE.
    """

    part: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    newlines: Newlines | None = None
    mrope_span: int = 0

    @classmethod
    def whole(cls, height: int, width: int) -> Self:
        """The layout of an image with one part and no newlines."""
        return cls(torch.zeros(height * width, dtype=torch.int64), ((height, width),))

    @property
    def is_newline(self) -> torch.Tensor:
        """``[placeholders]`` bool, which of the unpruned placeholders are newlines."""
        return self.newlines.mask if self.newlines else torch.zeros(len(self.part), dtype=torch.bool)

    def placeholders(self, indices: torch.Tensor) -> torch.Tensor:
        """The placeholders that are kept: the tokens', the newlines of lines with a kept token, and separators.

        Args:
            indices: ``[k]`` int64, the kept tokens.

        Returns:
            ``[p]`` int64, ascending.
        """
        is_newline = self.is_newline
        is_kept = is_newline.clone()
        is_kept[(~is_newline).nonzero()[:, 0][indices]] = True
        if self.newlines:
            ends, line = torch.arange(int(is_newline.sum())), self.newlines.line
            is_kept[is_newline] = torch.isin(ends, line[indices]) | torch.isin(ends, line, invert=True)
        return is_kept.nonzero()[:, 0]

    def indices(self, placeholders: torch.Tensor) -> torch.Tensor:
        """The tokens whose placeholders are kept: the inverse of ``placeholders``.

        Args:
            placeholders: ``[p]`` int64, ascending.

        Raises:
            ValueError: if no tokens have these placeholders.
        """
        is_token = ~self.is_newline
        if int(placeholders[-1]) < len(is_token):
            number = is_token.cumsum(0) - 1
            indices = number[placeholders[is_token[placeholders]]]
            if torch.equal(self.placeholders(indices), placeholders):
                return indices
        raise ValueError("no tokens have these placeholders")
