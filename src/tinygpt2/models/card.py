"""The model card that is saved with every model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(title: str, how: str, figures: Mapping[str, Any], command: str) -> str:
    """Render a model card: what it is, how it was made, what was measured, how to run it again."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- tinygpt2
---

# {title}

{how} Plain `transformers` opens it: `GPT2LMHeadModel.from_pretrained(...)`, `AutoTokenizer.from_pretrained(...)`.

| | |
|---|---|
{rows}

The command that made it; all its options are in config.yaml, which `tinygpt2 {command.split()[0]} --config` takes:

    tinygpt2 {command}
"""
