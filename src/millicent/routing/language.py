"""Which language a text seems to be in: by its script, and by the commonest words of seven that share one."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# Enough to tell by, and no more to read than that.
_READ_CHARACTERS = 2000
_SCRIPTS = {
    "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "ru", "ARABIC": "ar", "HEBREW": "he",
    "DEVANAGARI": "hi", "GREEK": "el", "THAI": "th", "CJK": "zh",
}  # fmt: skip
_WORDS = {
    "en": "the of and to in is that it for you what how with are this be have not can do which write on",
    "de": "der die das und ist nicht ein eine zu den mit ich wie was für auf sie wir im von bitte",
    "fr": "le la les des et est une un que pour dans vous pas qui sur avec je quel comment du au",
    "es": "el los las y es una que en por para con cómo qué se del lo como más cuál escribe está",
    "it": "il gli e è una che di per con non come cosa sono della nel questo qual scrivi più mi",
    "pt": "o os as e é uma que em para com não como do da um por você qual se mais são",
    "nl": "de het een en is van niet dat op te zijn met voor wat hoe ik je aan schrijf er",
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _WORDS.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str | None:
    """A two-letter code; None where nothing tells. Kana among Chinese characters make it Japanese."""
    text = text[:_READ_CHARACTERS]
    scripts: Counter[str] = Counter()
    for character in text:
        if character > "\u0370":
            language = _SCRIPTS.get(unicodedata.name(character, "").split(" ")[0].split("-")[0])
            if language is not None:
                scripts[language] += 1
    letters = sum(character.isalpha() for character in text)
    if scripts and 3 * scripts.total() >= letters:
        return "ja" if scripts["ja"] else scripts.most_common(1)[0][0]
    found: Counter[str] = Counter()
    for word in _WORD.findall(text.lower()):
        found.update(_LANGUAGES.get(word, ()))
    ranked = found.most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]
