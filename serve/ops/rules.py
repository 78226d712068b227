"""What happens to logits before the temperature: penalties, allow-masks and padding rows of the vocabulary.

They are part of the core because a fused kernel never shows its logits to anyone who could change
them. The order is that of vLLM and Hugging Face: repetition penalty, presence penalty, mask. Sets of
tokens are bit masks, 19 kB a row at 152k tokens instead of 152.

The penalised logit is by definition the float32 number (float64 for float64 logits); the reference
computes it so too, and ties are ties of that number.
"""

from dataclasses import dataclass

import torch

from serve.ops.checks import check_size, check_tensor, per_row

WORD = 32  # tokens per word of a bit mask


@dataclass(frozen=True, slots=True)
class Rules:
    """Per-row changes to the logits; what is None is left out.

    ``seen`` and ``allow`` are bit masks [rows, ceil(vocab / 32)] int32 (``pack_bits``). Tokens whose
    bit is set in ``seen`` get the repetition penalty (keskar2019ctrl, section 4.1: positive logits are divided
    by it, negative ones multiplied) and lose ``presence``. Tokens whose bit is not set in ``allow``, and
    ids from ``n_valid`` on (the model's matrix may have more rows than the tokenizer has tokens), are
    ruled out.
    """

    seen: torch.Tensor | None = None
    repetition: torch.Tensor | None = None  # [rows] float32, above 0; 1 changes nothing
    presence: torch.Tensor | None = None  # [rows] float32; 0 changes nothing
    allow: torch.Tensor | None = None
    n_valid: int | None = None

    @property
    def empty(self) -> bool:
        """Whether the logits stay as they are."""
        return self.seen is None and self.allow is None and self.n_valid is None

    def check(self, rows: int, vocab: int, device: torch.device) -> None:
        """ValueError when they were made for other logits."""
        words = (vocab + WORD - 1) // WORD
        for name, mask in (("rules.seen", self.seen), ("rules.allow", self.allow)):
            if mask is not None:
                check_tensor(name, mask, shape=(rows, words), dtypes=(torch.int32,), device=device)
        if self.n_valid is not None and not 1 <= check_size("n_valid", self.n_valid, least=0) <= vocab:
            raise ValueError(f"n_valid is {self.n_valid}; it must be from 1 to the vocabulary's {vocab}.")

    def on_columns(self, values: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Values [rows, columns] of a rectangle of the logits, penalised."""
        if self.empty:
            return values
        words = slice(columns.start // WORD, -(-columns.stop // WORD))
        first = columns.start - words.start * WORD

        def bits(mask: torch.Tensor | None) -> torch.Tensor | None:
            return None if mask is None else unpack_bits(mask[rows, words])[:, first : first + values.shape[1]]

        beyond = torch.arange(columns.start, columns.stop, device=values.device)
        return self._apply(values, bits(self.seen), bits(self.allow), beyond, rows)

    def on_tokens(self, values: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Values [n, k] of the tokens ``ids`` [n, k] of the rows ``rows`` [n], penalised."""
        if self.empty:
            return values

        def bits(mask: torch.Tensor | None) -> torch.Tensor | None:
            if mask is None:
                return None
            words = mask[rows[:, None], (ids // WORD).clamp(max=mask.shape[1] - 1)]
            return ((words >> (ids % WORD)) & 1).bool()

        return self._apply(values, bits(self.seen), bits(self.allow), ids, rows)

    def _apply(
        self,
        values: torch.Tensor,
        seen: torch.Tensor | None,
        allowed: torch.Tensor | None,
        ids: torch.Tensor,
        rows: slice | torch.Tensor,
    ) -> torch.Tensor:
        if seen is not None:
            assert self.repetition is not None and self.presence is not None
            penalty, minus = (t[rows, None].to(values.dtype) for t in (self.repetition, self.presence))
            changed = torch.where(values > 0, values / penalty, values * penalty) - minus
            values = torch.where(seen, changed, values)
        if allowed is not None:
            values = values.masked_fill(~allowed, float("-inf"))
        if self.n_valid is not None:
            values = values.masked_fill(ids >= self.n_valid, float("-inf"))
        return values


NO_RULES = Rules()


def make_rules(
    rows: int,
    vocab: int,
    device: torch.device,
    *,
    seen: torch.Tensor | None = None,
    repetition: float | torch.Tensor = 1.0,
    presence: float | torch.Tensor = 0.0,
    allow: torch.Tensor | None = None,
    n_valid: int | None = None,
) -> Rules:
    """Checked rules for logits [rows, vocab]."""
    most = torch.finfo(torch.float32).max
    options = {"high": most, "dtype": torch.float32, "device": device}
    penalty = per_row(
        "repetition",
        repetition,
        rows,
        rule="it must be above 0, and finite",
        low=0.0,
        open_low=True,
        **options,  # type: ignore[arg-type]
    )
    minus = per_row("presence", presence, rows, rule="it must be finite", low=-most, **options)  # type: ignore[arg-type]
    for name, value, neutral in (("repetition", repetition, 1.0), ("presence", presence, 0.0)):
        if seen is None and (isinstance(value, torch.Tensor) or value != neutral):
            raise ValueError(f"{name} is {value!r} but seen is None; it must say which tokens the penalty is for.")
    rules = Rules(allow=allow, n_valid=n_valid) if seen is None else Rules(seen, penalty, minus, allow, n_valid)
    rules.check(rows, vocab, device)
    return rules


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A bit mask [rows, ceil(vocab / 32)] int32 from booleans [rows, vocab]; bit i of word w is token 32 w + i."""
    check_tensor("mask", mask, shape=(None, None), dtypes=(torch.bool,))
    rows, vocab = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -vocab % WORD)).view(rows, -1, WORD)
    return (padded.long() << torch.arange(WORD, device=mask.device)).sum(dim=2).to(torch.int32)


def unpack_bits(words: torch.Tensor) -> torch.Tensor:
    """Booleans [..., 32 words] from a bit mask [..., words]."""
    bits = torch.arange(WORD, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> bits) & 1).bool().flatten(-2)
