"""What calls to an endpoint cost: expected before, counted as they come, stopped at the budget."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from candor.errors import UserError
from serve.endpoint import Price

_TOKENS_PER_BYTE = 0.3  # of English text, until answers say how many there were
_OVERHEAD = 10  # tokens of a chat template


class OverBudget(UserError):
    """The next call could cost more than is left."""


@dataclass(slots=True)
class Ledger:
    """What calls have cost so far."""

    price: Price | None = None
    budget: float | None = None  # US dollars; no call starts that could exceed it
    before: float = 0.0  # dollars that other runs have spent of the same budget
    spent: float = 0.0  # dollars of this run
    reserved: float = 0.0  # dollars that calls under way may cost
    calls: int = 0  # tries that were sent
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    measured_bytes: int = 0  # of questions whose length is known
    measured_tokens: int = 0  # and the tokens that they had
    answered: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def expect(self, n_bytes: int, max_tokens: int, *, batch: bool = False) -> tuple[float, float]:
        """Input tokens that a question of so many bytes has, and dollars that it costs at most."""
        per_byte = self.measured_tokens / self.measured_bytes if self.measured_bytes else _TOKENS_PER_BYTE
        tokens = _OVERHEAD + per_byte * n_bytes
        return tokens, self.price.of(tokens, max_tokens, batch=batch) if self.price else 0.0

    def reserve(self, dollars: float) -> None:
        """Set money aside for a call; UserError when the budget does not allow it."""
        if self.budget is not None and self.before + self.spent + self.reserved + dollars > self.budget:
            under_way = f", at most ${self.reserved:.4f} more under way" if self.reserved else ""
            raise OverBudget(
                f"the budget of ${self.budget:.2f} is used up (${self.before + self.spent:.4f} spent{under_way}). What "
                "was answered is stored; raise 'budget' and run again to go on."
            )
        self.reserved += dollars

    def book(self, n_bytes: int, input_tokens: int, output_tokens: int, *, batch: bool = False) -> None:
        """Enter an answered call; ``n_bytes`` of question (0: unknown) had so many tokens."""
        self.answered += 1
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        if n_bytes and input_tokens:
            self.measured_bytes += n_bytes
            self.measured_tokens += input_tokens
        if self.price is not None:
            self.spent += self.price.of(input_tokens, output_tokens, batch=batch)

    def account(self) -> dict[str, Any]:
        """What this run took, for a record; dollars are None where no price is known."""
        return {
            "calls": self.calls,
            "retries": self.retries,
            "tokens": [self.input_tokens, self.output_tokens],
            "dollars": round(self.spent, 6) if self.price else None,
        }
