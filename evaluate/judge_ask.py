"""What is put to a judge: one request and reply, with the identity under which the answer is kept."""

from dataclasses import dataclass

from candor.hashing import sha256_json
from candor.judging import JudgeTemplate, render
from candor.rows import Option


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a judge."""

    sha: str  # of the judge's identity, the template and what follows
    prompt: str
    reply: str
    options: tuple[Option, ...]  # of the closed question, where the template lists them

    def text(self, template: JudgeTemplate) -> str:
        """The question as the judge gets it."""
        listed = "\n".join(f"{chr(ord('A') + i)}. {o.label}" for i, o in enumerate(self.options))
        return render(template, self.prompt, self.reply, listed)


def make_ask(asking_sha: str, prompt: str, reply: str, options: tuple[Option, ...] = ()) -> Ask:
    """The question about one reply; ``asking_sha`` is the identity of the judge and of how it is asked."""
    labels = [o.label for o in options]
    return Ask(sha256_json([asking_sha, prompt, reply, labels]), prompt, reply, options)
