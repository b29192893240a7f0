"""Words, parts of speech and noun phrases of English sentences, by spaCy."""

from functools import cache
from typing import Any, NamedTuple

from svdd import UserError

__all__ = ["Sentence", "parse"]

_MODEL = "en_core_web_sm"


class Sentence(NamedTuple):
    """A sentence as spaCy reads it.

    Attributes:
        words: Its words and marks.
        tags: The universal part of speech of each: `NOUN`, `PROPN`, `ADJ`, ...
        phrases: Its noun phrases.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    phrases: tuple[str, ...]


def parse(text: str) -> Sentence:
    """Returns a sentence's parts; raises UserError if spaCy or its small English model is missing."""
    document = _language()(text)
    words, tags = zip(*((token.text, token.pos_) for token in document), strict=True) if len(document) else ((), ())
    return Sentence(words, tags, tuple(chunk.text for chunk in document.noun_chunks))


@cache
def _language() -> Any:
    try:
        import spacy

        return spacy.load(_MODEL)
    except (ImportError, OSError) as error:
        advice = f"pip install 'svdd[compbench]' && python -m spacy download {_MODEL}"
        raise UserError(f"T2I-CompBench's sentences are parsed with spaCy's {_MODEL}: {advice}") from error
