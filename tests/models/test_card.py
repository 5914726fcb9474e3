from __future__ import annotations

from tinygpt2.errors import listed
from tinygpt2.models.card import model_card


def test_values_cannot_break_the_page() -> None:
    figures = {"a|b": "c|d", "source": "<script>x</script>", "lines": "one\ntwo"}
    card = model_card("my\nmodel", "Trained on <b>.txt.", figures, "finetune --data 'a\nb'")
    assert "| a\\|b | c\\|d |\n| source | &lt;script>x&lt;/script> |\n| lines | one two |\n" in card
    assert "\n# my model\n" in card
    assert "Trained on &lt;b>.txt." in card
    assert card.endswith("    tinygpt2 finetune --data 'a\n    b'\n")


def test_long_lists_are_shortened() -> None:
    assert listed(["a", "b"], 5) == "a, b"
    assert listed((f"{index}.txt" for index in range(10_000)), 5) == (
        "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 9,995 more"
    )
