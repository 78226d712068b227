"""What a sketch keeps of each tile of the vocabulary, for both of its implementations."""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Tiles:
    """What is kept of each tile; each [rows, tiles] in float32 (float64 for float64 logits).

    With m the tile's maximum and t the inverse temperature: ``sums`` is the sum of exp((x - m) t),
    ``moments`` of (x - m) exp((x - m) t), ``raw_sums`` of exp(x - m).
    """

    maxima: torch.Tensor
    sums: torch.Tensor
    moments: torch.Tensor | None
    raw_sums: torch.Tensor | None

    @classmethod
    def empty(
        cls, rows: int, tiles: int, dtype: torch.dtype, device: torch.device, *, entropy: bool, raw: bool
    ) -> "Tiles":
        """Room for the results."""

        def room() -> torch.Tensor:
            return torch.empty(rows, tiles, dtype=dtype, device=device)

        return cls(room(), room(), room() if entropy else None, room() if raw else None)

    def part(self, rows: slice, tiles: slice) -> "Tiles":
        """A view of some rows and tiles."""
        rest = (None if t is None else t[rows, tiles] for t in (self.moments, self.raw_sums))
        return Tiles(self.maxima[rows, tiles], self.sums[rows, tiles], *rest)
