"""Help for a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(word: str, valid: Sequence[str], what: str) -> str:
    """The second half of an error text: the nearest valid names, then all of them."""
    near = difflib.get_close_matches(word, valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}{what}: {', '.join(valid) or 'none'}"
