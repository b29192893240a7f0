"""The counted object in an English prompt: `a photo of three red apples on a table` has 3 of `red apple`."""

import re

__all__ = ["counted_object", "singular"]


def _words(text: str) -> list[str]:
    return text.split()


_SMALL = _words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
_NUMBERS = {word: k for k, word in enumerate([*_SMALL, "seventeen", "eighteen", "nineteen", "twenty"])}
_ONE = {"a", "an", "one", "single"}
_PICTURES = {*_words("photo photograph picture image painting drawing sketch illustration rendering view")}
_ENDS = {  # words that end the name of an object
    *_words(
        "on in at of with and or but by under over above below near next behind beside to from into inside between"
    ),
    *_words(
        "against around across through for that which who while is are was were has have arranged the his her their"
    ),
}
_SINGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"}
_SINGULAR |= {"teeth": "tooth", "feet": "foot", "buses": "bus", "shoes": "shoe", "toes": "toe", "canoes": "canoe"}
_SINGULAR |= {f"{word}s": word for word in _words("cookie movie pie tie zombie brownie hoodie smoothie")}
_SINGULAR |= {f"{stem}ves": f"{stem}fe" for stem in _words("kni li wi")}
_SINGULAR |= {f"{stem}ves": f"{stem}f" for stem in _words("wol lea loa shel cal hal scar el hoo thie")}
_SINGULAR |= {word: word for word in _words("sheep fish deer scissors skis pants shorts jeans")}


def counted_object(prompt: str) -> tuple[int, str] | None:
    """Returns the number and the name, in the singular, of the only object that the prompt counts; None if unclear.

    A number is a word from zero to twenty or a figure below 1000. The name ends at the first plural, a preposition, a
    conjunction, a participle in -ing or a mark. Without a number, `a`, `an` or `one` at the beginning counts, after
    `a photo of`. A prompt that counts several objects is unclear, and so is one that counts none.
    """
    words = re.findall(r"[a-z]+(?:[-'][a-z]+)*|\d+|[^\sa-z\d]", prompt.lower())
    many = [
        found
        for k, word in enumerate(words)
        if (number := _number(word)) is not None and number != 1 and (found := _object(number, words[k + 1 :]))
    ]
    if many:
        return many[0] if len(many) == 1 else None
    while words and words[0] in _ONE | {"1"} and (first := _object(1, words[1:])):
        name = first[1].split()
        if name[-1] not in _PICTURES or words[len(name) + 1 : len(name) + 2] != ["of"]:
            return first
        words = words[len(name) + 2 :]
    return None


def _number(word: str) -> int | None:
    return int(word) if word.isdigit() and len(word) < 4 else _NUMBERS.get(word)


def _object(count: int, words: list[str]) -> tuple[int, str] | None:
    """Returns the number with the name, in the singular, at the beginning of these words; None if there is none."""
    name: list[str] = []
    for word in words:
        participle = bool(name) and word.endswith("ing")
        if participle or not word[0].isalpha() or word in _ENDS or word in _ONE or word in _NUMBERS:
            break
        name.append(word)
        if count != 1 and word != "sports" and (word in _SINGULAR or singular(word) != word):
            break
    if count != 1 and name:
        name[-1] = singular(name[-1])
    return (count, " ".join(name)) if name else None


def singular(noun: str) -> str:
    """Returns the singular of an English noun, by its ending and a list of exceptions."""
    if noun in _SINGULAR or len(noun) < 3 or noun.endswith(("ss", "us", "sis", "nis", "ris", "xis")):
        return _SINGULAR.get(noun, noun)
    if noun.endswith("ies") and len(noun) > 4:
        return f"{noun[:-3]}y"
    return noun[:-2] if noun.endswith(("sses", "shes", "ches", "xes", "oes")) else noun.removesuffix("s")
