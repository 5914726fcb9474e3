"""Detokenizers: what they make, and that it comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt2.evaluation.detokenize import detokenize, detokenize_cbt, detokenize_page, pages, retokenize

WIKITEXT = [
    (" = = Early life = = ", "== Early life =="),
    (" He had a guest @-@ starring role , in 2000 . ", "He had a guest-starring role, in 2000."),
    (" It cost $ 1 @,@ 000 @,@ 000 ( about £ 2 @.@ 5 million ) . ", "It cost $1,000,000 (about £2.5 million)."),
    (" the episode \" Teddy 's Story \" ; he 'd gone ", "the episode \"Teddy's Story\"; he'd gone"),
    (" Mr. Smith of the U.S. lives at No. 5 . ", "Mr. Smith of the U.S. lives at No. 5."),
    (" in class A . Then ", "in class A . Then"),
    (" the boxers ' fists , 5 % of them ", "the boxers' fists, 5% of them"),
    (" from 1990 – 1995 and / or — not ", "from 1990–1995 and/or—not"),  # noqa: RUF001
    (" <unk> @,@ 000 of <unk> 's ", "<unk>,000 of <unk> 's"),
    (" ", ""),
]


@pytest.mark.parametrize(("split", "whole"), WIKITEXT)
def test_wikitext_reads_as_written_and_comes_back(split: str, whole: str) -> None:
    assert detokenize(f"{split}\n", "wikitext") == f"{whole}\n"
    assert retokenize(f"{whole}\n", "wikitext") == f"{split}\n"


def test_other_styles() -> None:
    assert (
        detokenize(" they do n't own abc 's $ N shares ' worth \n", "ptb") == "they don't own abc's $N shares' worth\n"
    )
    news = "It didn 't cost 1,000 pounds , Mr. Low-Key said .\n"
    assert detokenize(news, "news") == "It didn't cost 1,000 pounds, Mr. Low-Key said.\n"
    assert retokenize(detokenize(news, "news"), "news") == news
    split = "`` Do n't -LRB- ever -RRB- , '' said the Queen 's cat . I wo n't !"
    assert detokenize_cbt(split) == "\"Don't (ever),\" said the Queen's cat. I won't!"


TOKENS = st.sampled_from(
    ["the", "Mr.", "Mr", "a", "A", "U.S.", "1", "000", "boxers", "@-@", "@,@", "@.@", ",", ".", ";", '"', "'", "'s", "n't", "(", ")", "$",
     "=", "/", "—", "...", "--", "1,000", "4.5", "-", "<unk>", "%", "'an"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=12), st.sampled_from(["wikitext", "news", "ptb"]))
def test_a_line_comes_back_unless_its_inverse_does_not_know_it_at_all(tokens: list[str], style: str) -> None:
    line = " ".join(tokens)
    made = detokenize(line, style)
    back = retokenize(f"{made}\n", style).strip()
    assert back == line or (made == line and retokenize(f"{line}\n", style).strip() != line)


EXCEPTIONS = {"wikitext-2/wiki.test.raw": 7}  # the lines that docs/perplexity.md lists


@pytest.mark.parametrize(
    ("file", "style"),
    [
        ("wikitext-2/wiki.test.raw", "wikitext"),
        ("wikitext-2/test.txt", "wikitext"),
        ("wikitext-2/valid.txt", "wikitext"),
        ("wikitext-103/wiki.test.tokens", "wikitext"),
        ("wikitext-103/wiki.valid.tokens", "wikitext"),
        ("ptb/valid.txt", "ptb"),
    ],
)
def test_whole_files_come_back(shared_data: Path, file: str, style: str) -> None:
    text = (shared_data / file).read_text(encoding="utf-8")
    made = detokenize(text, style)
    back = retokenize(made, style)
    differing = [pair for pair in zip(text.split("\n"), back.split("\n"), strict=True) if pair[0] != pair[1]]
    assert len(differing) == EXCEPTIONS.get(file, 0)
    assert text.count("\n") == back.count("\n")
    assert len(made) < 0.99 * len(text)


def test_pages_of_the_harness(shared_data: Path) -> None:
    text = (shared_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    divided = pages(text)
    assert len(divided) == 62  # as the harness counts
    assert "\n".join(divided).lstrip() == text.lstrip()
    assert detokenize_page(' = T = \n \n He @-@ man , " I " said ( so ) . ') == ' = T =\n\nHe-man, "I" said (so). '
    assert detokenize_page(" N = = a = = ; boxers ' : , x ' y ' \n") == " 1 == a ==; boxers':, x' y '\n"
