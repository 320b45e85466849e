"""What `mediation bench planted` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mediation.report import console

_COLUMNS = {
    "attribute": "naming.attribute", "value": "naming.value", "rank": "naming.rank", "flagged": "flags.flagged",
    "right": "flags.right", "wrong": "flags.wrong", "swap": "flags.swap_follows", "stays": "flags.stays",
    "chance": "chance",
}  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """A row for each family, then the parts that were compared."""
    table = Table(title="Planted facts: mean over seeds [95 % interval over seeds]")
    for name in ("family", "organisms passed", *_COLUMNS):
        table.add_column(name)
    for name, family in result["families"].items():
        figures = family.get("figures", {})
        cells = [_shown(figures.get(key)) for key in _COLUMNS.values()]
        table.add_row(name, f"{family['passed']} of {family['organisms']}", *cells)
    console.print(table)
    ways = Table(title="Attribute named right by other parts")
    ways.add_column("family")
    compared = [
        key.split(".")[1]
        for family in result["families"].values()
        for key in family.get("figures", {})
        if key.startswith("compared.") and key.endswith(".attribute")
    ]
    for way in dict.fromkeys(compared):
        ways.add_column(way)
    for name, family in result["families"].items():
        figures = family.get("figures", {})
        if any(key.startswith("compared.") for key in figures):
            cells = [_shown(figures.get(f"compared.{way}.attribute")) for way in dict.fromkeys(compared)]
            ways.add_row(name, *cells)
    if compared:
        console.print(ways)
    evidence = result["evidence"]
    if evidence["area"] is not None:
        console.print(
            f"Hidden fact used: area under ROC {evidence['area']:.3f}, precision {evidence['precision']:.3f} and "
            f"recall {evidence['recall']:.3f} at 5 % false positives."
        )


def _shown(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    return f"{figure['value']:.2f} \\[{figure['low']:.2f}, {figure['high']:.2f}]"
