"""Names for types that many modules use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    Tokenizer = PreTrainedTokenizerFast

Array = np.ndarray[Any, np.dtype[Any]]
Tokens = np.ndarray[Any, np.dtype[Any]]
"""Token ids, one after another."""
