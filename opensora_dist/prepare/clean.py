"""Captions made plain: what models and web pages put around a description is taken off; scores are put behind it."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Collection, Mapping

from opensora_dist.config.prepare import CleanConfig

_URL = re.compile(r"(?:https?://|ftp://|www\.)(?:\S*[\w/])?", re.IGNORECASE)
_MAIL = re.compile(r"\b[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]*\w")
_NAME = re.compile(r"(?<!\w)[@#](?!\d)\w+")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")
_TAG = re.compile(r"<(?:/?[a-z!|][^<>]*)>", re.IGNORECASE)
_MARKDOWN = re.compile(r"```\w*|[*_`]{2,}|^\s*(?:#{1,6}|[-*•])\s+", re.MULTILINE)
# Pictographs, and what joins and varies them. Joiners elsewhere are part of how some scripts are written.
_PICTOGRAPHS = "\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u231a\u231b\u23e9-\u23fa"
_EMOJI = re.compile(f"[{_PICTOGRAPHS}][{_PICTOGRAPHS}\u200d\ufe0f\U000e0020-\U000e007f]*|[\u20e3\ufe0e\ufe0f]")
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd\ud800-\udfff]"
)
_EMPTY_BRACKETS = re.compile(r"\(\s*\)|\[\s*\]")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.])(?!\w)")

_PICTURE = r"(?:short\s+)?(?:video\s+clip|video|image|clip|scene|frames?|footage|picture|photo)"
_OPENING = re.compile(
    r"(?:sure|certainly)\b[,!.:]*\s+"
    r"|here(?:'s|\s+is)\s+(?:a|the)\s+(?:[\w-]+\s+){0,3}(?:description|caption)[^.:]{0,60}[:.]\s*"
    r"|(?:caption|description)\s*:\s*"
    rf"|in\s+(?:this|the|these)\s+{_PICTURE}(?:\s*,\s*|\s+|$)(?:(?:we|you)\s+(?:can\s+)?see\s+|there\s+(?:is|are)\s+)?"
    rf"|(?:this|the|these)\s+{_PICTURE}\s+(?:(?:appears?|seems?)\s+to\s+)?(?:(?:begin|start|open)s?\s+with|(?:is|are)\s+(?:about|of)|"
    r"(?:show|depict|feature|capture|present|display|contain|illustrate|showcase|portray)s?)\s+",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?:(?<![.!?…])[.!?…]+[\"'”’)\]]*\s+|[。！？]+[”’」』）]*\s*)(?![a-z])")
_ENDED = re.compile(r"[.!?…。！？][\"'”’)\]」』）]*$")
_ABBREVIATIONS = frozenset({"mr.", "mrs.", "ms.", "dr.", "st.", "prof.", "no.", "vs.", "etc.", "approx.", "e.g.", "i.e.", "cf."})
_REPEATED_WORDS = 8  # the longest phrase that is looked for twice in a row

_LABELS = {"aesthetic": "aesthetic score", "motion": "motion score", "camera": "camera motion"}


def clean_caption(text: str, config: CleanConfig) -> str:
    """The caption without what isn't about the picture; as it is where ``clean.enabled`` is off.

    Taken off: markup and entities, URLs, mail addresses, @names and #tags, emoji, invisible characters, openings such as "The video
    shows", phrases said twice in a row, sentences said before, and a last sentence that was cut off (it has no end mark, and the
    one before it has). Unicode is composed (NFC), spaces are single. Cleaning what is clean changes nothing.
    """
    if not config.enabled:
        return text
    # A pass can uncover work for the next: an entity that spelled a tag, an opening behind an opening. Each shortens the text.
    while (cleaned := _pass(text)) != text:
        text = cleaned
    return text


def storable(text: str) -> str:
    """The text as UTF-8 can hold it: half a surrogate pair, as JSON and tokenizers can spell it, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def append_scores(text: str, scores: Mapping[str, float | str], names: Collection[str]) -> str:
    """The caption with scores behind it, as Open-Sora 1.2 trains on it: ``A cat. motion score: 10, camera motion: pan left.``

    The order is always aesthetic, motion, camera. Numbers have at most one decimal. A score that the clip lacks (an image has no
    motion) or that the caption already names is left out.

    Args:
        scores: What was measured of the clip.
        names: Of ``aesthetic``, ``motion``, ``camera``.
    """
    said = [f"{label}: {_rounded(scores[name])}" for name, label in _LABELS.items() if name in names and _known(scores, name)]
    said = [score for score in said if f"{score.partition(':')[0]}:" not in text]
    return f"{text} {', '.join(said)}.".lstrip() if said else text


def _known(scores: Mapping[str, float | str], name: str) -> bool:
    value = scores.get(name)
    return value is not None and (isinstance(value, str) or math.isfinite(value))


def _rounded(value: float | str) -> str:
    """10.04 as 10, 5.46 as 5.5: from a float's exact value, so the same everywhere; never -0."""
    return value if isinstance(value, str) else f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def _pass(text: str) -> str:
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = _LINK.sub(r"\1", text)
    for pattern in (_URL, _MAIL, _TAG, _MARKDOWN, _NAME, _EMOJI):
        text = pattern.sub(" ", text)
    text = " ".join(_EMPTY_BRACKETS.sub(" ", INVISIBLE.sub("", text)).split())
    text = _SPACE_BEFORE_MARK.sub(r"\1", text)
    if opening := _OPENING.match(text):
        text = text[opening.end() :]
        text = text[:1].upper() + text[1:]
    return _without_repeated_words(_finished(_once(_sentences(text))))


def _sentences(text: str) -> list[str]:
    """With their end marks and the spaces behind them."""
    parts, start = [], 0
    for mark in _SENTENCE_END.finditer(text):
        word = text[start : mark.end()].split()[-1:]
        if word and (word[0].lower() in _ABBREVIATIONS or re.fullmatch(r"[A-Z]\.", word[0])):
            continue
        parts.append(text[start : mark.end()])
        start = mark.end()
    return [part for part in (*parts, text[start:]) if part.strip()]


def _once(sentences: list[str]) -> list[str]:
    """Without those that were said before, in whatever case."""
    first: dict[str, str] = {}
    for sentence in sentences:
        first.setdefault(sentence.strip().casefold(), sentence)
    return list(first.values())


def _finished(sentences: list[str]) -> str:
    """As one text, without a last sentence that a limit on tokens cut off."""
    if len(sentences) > 1 and _ENDED.search(sentences[-2].strip()) and not _ENDED.search(sentences[-1].strip()):
        sentences = sentences[:-1]
    return "".join(sentences).strip()


def _without_repeated_words(text: str) -> str:
    """Without phrases that follow themselves; the last of them ends as it did."""
    words: list[str] = []
    for word in text.split():
        words.append(word)
        for length in range(1, min(_REPEATED_WORDS, len(words) // 2) + 1):
            before, again = words[-2 * length : -length], words[-length:]
            if _spoken(before) == _spoken([*again[:-1], again[-1].rstrip(".!?;:…")]) and any(
                c.isalpha() for c in "".join(before)
            ):
                words[-length:] = []
                words[-1] = words[-1].rstrip(",") + again[-1][len(again[-1].rstrip(",.!?;:…")) :]
                break
    return " ".join(words)


def _spoken(words: list[str]) -> list[str]:
    return [word.rstrip(",").casefold() for word in words]
