"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(model: Path) -> Any:
    """Raises ValueError if the folder's tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as err:
        raise ValueError(
            f"{model} has no tokenizer that transformers can load ({err}); copy tokenizer.json beside the weights"
        ) from err
