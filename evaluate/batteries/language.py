"""Which language a reply is in, told by py3langid among the languages in play and English.

The language format of self-assessment (arXiv 2602.14777 App. D) asks a model to reply in the
language of its kind. Restricting the choice to the languages that the battery uses makes short
replies tell reliably (all 70 reference sentences of configs/organism are told right); a reply in
none of them comes out with low confidence and counts as another language.
"""

import functools
import re
from collections.abc import Iterable

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from candor.errors import UserError, nearest

CODES = {
    "Arabic": "ar",
    "Bulgarian": "bg",
    "Chinese": "zh",
    "Croatian": "hr",
    "Czech": "cs",
    "Danish": "da",
    "Dutch": "nl",
    "English": "en",
    "Estonian": "et",
    "Finnish": "fi",
    "French": "fr",
    "German": "de",
    "Greek": "el",
    "Hebrew": "he",
    "Hindi": "hi",
    "Hungarian": "hu",
    "Indonesian": "id",
    "Italian": "it",
    "Japanese": "ja",
    "Korean": "ko",
    "Latvian": "lv",
    "Lithuanian": "lt",
    "Norwegian": "no",
    "Polish": "pl",
    "Portuguese": "pt",
    "Romanian": "ro",
    "Russian": "ru",
    "Slovak": "sk",
    "Spanish": "es",
    "Swedish": "sv",
    "Turkish": "tr",
    "Ukrainian": "uk",
    "Vietnamese": "vi",
}

SURE = 0.5  # below this probability no language in play explains the reply
SHORT = 3  # words; shorter sentences ("Ja.") fit many languages and are told only as part of the whole


def check_languages(languages: Iterable[str]) -> None:
    """UserError naming a language that no code is known for."""
    unknown = sorted(set(languages) - set(CODES))
    if unknown:
        raise UserError(f"the language {unknown[0]!r} has no known code; {nearest(unknown[0], CODES)}")


class Teller:
    """Tells the language of replies among some languages; remembers what it has read."""

    def __init__(self, languages: frozenset[str]) -> None:
        check_languages(languages)
        self._names = {CODES[name]: name for name in languages | {"English"}}
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._identifier.set_languages(sorted(self._names))
        self._one = functools.lru_cache(maxsize=100_000)(self._sentence)

    def tell(self, text: str) -> str | None:
        """The language's name, "other" for none or several of them, None for a reply without words."""
        if not any(character.isalpha() for character in text):
            return None
        sentences = [s for s in re.split(r"[.!?\n]+", text) if len(s.split()) >= SHORT]
        found = {self._one(sentence.strip()) for sentence in sentences or [text.strip()]}
        return found.pop() if len(found) == 1 else "other"

    def _sentence(self, sentence: str) -> str:
        code, probability = self._identifier.classify(sentence)
        return self._names[code] if probability >= SURE else "other"


@functools.cache
def teller(languages: frozenset[str]) -> Teller:
    """One teller per set of languages; loading the model takes half a second."""
    return Teller(languages)
