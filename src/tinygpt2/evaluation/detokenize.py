"""Text that was split for word-level models, put back as people write it, and split again.

GPT-2's paper (Radford et al. 2019, section 3.1) measures such texts through invertible detokenizers: nothing is lost
by them, so the log-probability of what they make is that of the original. Here `retokenize` undoes `detokenize`, line
by line: a line that would not come back is left as it stands. lm-evaluation-harness has a
detokenizer of its own, for which there is no inverse.
"""

from __future__ import annotations

import re
from typing import Literal

Style = Literal["wikitext", "news", "ptb"]

_MARKS = {"@-@": "-", "@,@": ",", "@.@": "."}  # WikiText's own, for what stood inside a word or a number
_LEFT = frozenset(", ; : ! ? ) ] %".split())  # written without a space before
_RIGHT = frozenset("( [ $ £ ¥ ₱".split())  # without a space after
_BOTH = frozenset("/ —".split())
_ABBREVIATIONS = frozenset(
    "Adj Adm Adv Art Asst Bart Bldg Brig Bros Capt Cmdr Co Col Comdr Con Corp Cpl Dr Drs Ens Gen Gov Hon Hosp Hr Inc "
    "Insp Jr Lt Ltd Maj Messrs Mlle Mme Mr Mrs Ms Msgr No Nos Nr Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rt Sen Sens "
    "Sfc Sgt Sr St Supt Surg al p pp rev v var vs".split()
)
_DASH = "\N{EN DASH}"
_DIGIT = r"(?:\d|<unk>)"  # a number may be one of WikiText's unknown words


def detokenize(text: str, style: Style) -> str:
    """Return a text of split words as people write it, line by line.

    Args:
        text: words and punctuation between single spaces, lines as the file has them.
        style: `wikitext`, `news` (One Billion Word: WikiText's rules without its marks inside words) or `ptb`.
    """
    return "\n".join(_detokenized(line.strip(" "), style) for line in text.split("\n"))


def retokenize(text: str, style: Style) -> str:
    """Undo `detokenize`: in WikiText and the Penn Treebank every line stands between two spaces, an empty one is one.

    Args:
        text: what `detokenize` made of a whole file, which ends with a line end.
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
    """Glue what Moses' tokenizer, and WikiText's marks, have split."""
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
    """Say whether Moses leaves a period at the end of a word: abbreviations, initials, before a small letter."""
    spelled = "." in word and any(letter.isalpha() for letter in word)
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    return not word or spelled or initial or word in _ABBREVIATIONS or after[:1].islower()


def _join_ptb(line: str) -> str:
    """Glue what the Penn Treebank splits, as far as Mikolov's version of it has punctuation at all."""
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
    """Return sentences of the Children's Book Test, which are split as the Penn Treebank is, as people write them."""
    line = _join(" ".join(_CBT.get(word, word) for word in text.split()), "cbt")
    return re.sub(r"(?<=\w) n't(?!\w)", "n't", line)


_HARNESS = [
    (r"s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),  # as it stands there: meant for years such as '90, it never finds one
    (r" @-@ ", "-"), (r" @,@ ", ","), (r" @\.@ ", "."),
    *((f" [{mark}] ", f"{mark} ") for mark in ":;.!?,"),  # one after the other: they share spaces
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="), (r"= = =", "==="), (r"= =", "=="),
    (r" ° ", "°"), (r" \n", "\n"), (r"\n ", "\n"), (r" N ", " 1 "), (r" 's", "'s"),
]  # fmt: skip


def detokenize_page(page: str) -> str:
    """Return a page of WikiText as lm-evaluation-harness' task `wikitext` scores it (preprocess_wikitext.py)."""
    for pattern, replacement in _HARNESS:
        page = re.sub(pattern, replacement, page)
    return page


def pages(text: str) -> list[str]:
    """Divide WikiText into its articles as the data set `EleutherAI/wikitext_document_level` does."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            found.append([])
        found[-1].append(line)
    divided = ["\n".join(lines) for lines in found]
    return [page for page in divided[:-1] if page.strip()] + divided[-1:]
