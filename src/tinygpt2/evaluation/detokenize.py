"""Detokenizers: turn text that was split for word-level models into normal text, and back.

GPT-2's paper (Radford et al. 2019, section 3.1) measures such texts with invertible detokenizers. These lose no
information, so the detokenized text has the log-probability of the original. Here `retokenize` undoes `detokenize` line
by line: `detokenize` leaves a line unchanged if `retokenize` would not restore it. The detokenizer of
lm-evaluation-harness (`detokenize_page`) is not invertible.
"""

from __future__ import annotations

import re
from typing import Literal

Style = Literal["wikitext", "news", "ptb"]

_MARKS = {"@-@": "-", "@,@": ",", "@.@": "."}  # WikiText's marks for punctuation inside a word or a number
_LEFT = frozenset(", ; : ! ? ) ] %".split())  # no space before these
_RIGHT = frozenset("( [ $ £ ¥ ₱".split())  # no space after these
_BOTH = frozenset("/ —".split())  # no space on either side
_ABBREVIATIONS = frozenset(
    "Adj Adm Adv Art Asst Bart Bldg Brig Bros Capt Cmdr Co Col Comdr Con Corp Cpl Dr Drs Ens Gen Gov Hon Hosp Hr Inc "
    "Insp Jr Lt Ltd Maj Messrs Mlle Mme Mr Mrs Ms Msgr No Nos Nr Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rt Sen Sens "
    "Sfc Sgt Sr St Supt Surg al p pp rev v var vs".split()
)
_DASH = "\N{EN DASH}"
_DIGIT = r"(?:\d|<unk>)"  # in WikiText a rare number is <unk>


def detokenize(text: str, style: Style) -> str:
    """Turn split words into normal text, line by line.

    Args:
        text: words and punctuation separated by single spaces; the lines are those of the file.
        style: `wikitext`, `news` (One Billion Word: WikiText's rules without its marks inside words) or `ptb`.
    """
    return "\n".join(_detokenized(line.strip(" "), style) for line in text.split("\n"))


def retokenize(text: str, style: Style) -> str:
    """Undo `detokenize`.

    In WikiText and the Penn Treebank every line has a space before and after it, and an empty line is one space.

    Args:
        text: the result of `detokenize` for a whole file that ends with a line end.
    """
    *lines, last = (_split(line, style) for line in text.split("\n"))
    if style != "news":
        lines = [f" {line} " if line else " " for line in lines]
    return "\n".join([*lines, last])


def _detokenized(line: str, style: Style) -> str:
    text = _join_ptb(line) if style == "ptb" else _join(line, style)
    return text if _split(text, style) == line else line


def _split(text: str, style: Style) -> str:
    return _split_ptb(text) if style == "ptb" else _split_moses(text, style)


def _join(line: str, style: Style | Literal["cbt"]) -> str:
    """Join the words that Moses' tokenizer and WikiText's marks have split."""
    tokens = line.split(" ")
    pieces: list[str] = []
    glued, quoted = True, False
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        left, right = token in _LEFT, token in _RIGHT
        if token in _BOTH or (style == "wikitext" and token in _MARKS):
            left = right = True
        elif token == '"':
            left, right, quoted = quoted, not quoted, not quoted
        elif token == ".":
            left = style == "cbt" or not _keeps_period(before, after)
        elif token == "'":
            left = before.endswith("s")
        elif token == "=":
            left = before == "="
        elif token == _DASH:
            left = right = before[-1:].isdigit() and after[:1].isdigit()
        elif token[0:1] == "'" and token[1:2].isalpha():
            left = before[-1:].isalnum()
        word = _MARKS.get(token, token) if style == "wikitext" else token
        pieces += [word] if glued or left else [" ", word]
        glued = right
    return "".join(pieces)


def _split_moses(text: str, style: Style) -> str:
    if style == "wikitext":
        text = re.sub(r"(?<=[^\s@-])-(?=[^\s@-])", " @-@ ", text)
        text = re.sub(rf"(?:(?<=\d)|(?<=<unk>)),(?={_DIGIT})(?!\d+(?:st|nd|rd|th)\b)", " @,@ ", text)
        text = re.sub(rf"(?<![^\s\"(\[$£¥₱—/{_DASH}])(\d+|<unk>)\.(?={_DIGIT})", r"\1 @.@ ", text)
        text = re.sub(r"(?<![\d@]),(?!@)|(?<=\d),(?![\d@])", " , ", text)
    else:
        text = re.sub(r"(?<!\d),|,(?!\d)", " , ", text)
    text = re.sub(r'([;:!?)\]%"(\[$£¥₱/—=])', r" \1 ", text)
    text = re.sub(rf"(?<=\d){_DASH}(?=\d)", f" {_DASH} ", text)
    text = re.sub(r"(?<=\w)'(?=[^\W\d_])", " '", text)
    text = re.sub(r"(?<=s)'(?![^\s.])", " ' ", text)
    words = [word for word in text.split(" ") if word]
    split: list[str] = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        whole = len(word) < 2 or not word.endswith(".") or word.endswith("..") or _keeps_period(word[:-1], after)
        split += [word] if whole else [word[:-1], "."]
    return " ".join(split)


def _keeps_period(word: str, after: str) -> bool:
    """Return whether Moses keeps a period on a word: abbreviations, initials, before a lower-case letter."""
    spelled = "." in word and any(letter.isalpha() for letter in word)
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    return not word or spelled or initial or word in _ABBREVIATIONS or after[:1].islower()


def _join_ptb(line: str) -> str:
    """Join the words that the Penn Treebank splits. Mikolov's version of it has little punctuation."""
    line = re.sub(r"(?<=\w) (n't|'(?:s|re|ve|ll|d|m))(?= |$)", r"\1", line)
    line = re.sub(r"(?<=s) '(?= |$)", "'", line)
    return re.sub(r"(?<=[$#]) (?=\S)", "", line)


def _split_ptb(text: str) -> str:
    text = re.sub(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?= |$)", r" \1", text)
    text = re.sub(r"(?<=s)'(?= |$)", " '", text)
    return re.sub(r"(?<=[$#])(?=\S)", " ", text)


_CBT = {
    "``": '"',
    "''": '"',
    "`": "'",
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
}


def detokenize_cbt(text: str) -> str:
    """Turn sentences of the Children's Book Test, which are split like the Penn Treebank, into normal text."""
    line = _join(" ".join(_CBT.get(word, word) for word in text.split()), "cbt")
    return re.sub(r"(?<=\w) n't(?!\w)", "n't", line)


_HARNESS = [
    (r"s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),  # copied as it is: meant for years such as '90, but never matches one
    (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    *((f" [{mark}] ", f"{mark} ") for mark in ":;.!?,"),  # one by one: adjacent marks share a space
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="),
    (r" ° ", "°"), (r" \n", "\n"), (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s"),
]  # fmt: skip


def detokenize_page(page: str) -> str:
    """Detokenize a page of WikiText like the task `wikitext` of lm-evaluation-harness (preprocess_wikitext.py)."""
    for pattern, replacement in _HARNESS:
        page = re.sub(pattern, replacement, page)
    return page


def pages(text: str) -> list[str]:
    """Divide WikiText into its articles like the dataset `EleutherAI/wikitext_document_level`."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            found.append([])
        found[-1].append(line)
    divided = ["\n".join(lines) for lines in found]
    return [page for page in divided[:-1] if page.strip()] + divided[-1:]
