"""Texts of the page: escaping, numbers, and what fits into a box. Everything shown goes through `escape`."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from circuits.export import xml_text

CHARACTER = 6.4  # width of an average character of the graph's font, px


def escape(value: object) -> str:
    """Text for HTML or XML, in an element or a quoted attribute; forbidden characters are replaced."""
    return html.escape(xml_text(str(value)), quote=True)


def signed(value: float | None) -> str:
    """Three significant digits with a sign; an empty text for None and a dash for NaN."""
    if value is None:
        return ""
    if math.isnan(value):
        return "–"
    text = f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+#.3g}"
    return text.replace("-", "−")


def probability(value: float | None) -> str:
    """A p- or q-value."""
    if value is None or math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def percent(share: float) -> str:
    """A share as whole per cent."""
    return f"{share:.0%}"


def plain(value: Any) -> str:
    """Any value of a flag or a figure as a reader would write it (not escaped)."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(each)}" for key, each in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(plain(each) for each in value)
    return str(value)


def fit(text: str, width: float) -> str:
    """The text on one line, cut with an ellipsis to about `width` px."""
    text = " ".join(text.split())
    room = width / CHARACTER
    if sum(map(_units, text)) <= room:
        return text
    used, kept = 1.0, []
    for character in text:
        used += _units(character)
        if used > room:
            break
        kept.append(character)
    return "".join(kept).rstrip() + "…"


def _units(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    return 1.8 if unicodedata.east_asian_width(character) in "WF" else 1.0


def token_text(token: str) -> str:
    """A token with its line breaks and empty spaces made visible."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    return shown.strip() or "␣" * len(shown)
