"""The benchmark's tables on the terminal; all figures and intervals are in --json."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def number(figure: Any) -> str:
    """A share with its interval, or a plain number; nothing where there is none."""
    value = figure["value"] if isinstance(figure, dict) else figure
    if value is None:
        return "-"
    if isinstance(figure, dict) and figure["low"] is not None:
        return f"{value:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"
    return f"{value:.2f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def tables(result: dict[str, Any]) -> list[Table]:
    """One table for each part that was measured."""
    found = []
    if "letters" in result:
        found += _letters(result["letters"]["sites"])
    if "concepts" in result:
        table = _table(
            "Own latents silent while the concept is used", "dictionary", "family", "silent", "used", "own F1"
        )
        for each in [*result["concepts"]["sites"], *result["concepts"]["grid"]]:
            name = f"{each['site']}, {each['width']} latents, L0 {each['on_these_words']['l0']:.0f}"
            for family, figures in each["families"].items():
                whole = figures["all"]
                cells = (number(whole[key]) for key in ("silent", "silent_while_used", "own_f1"))
                table.add_row(name, family, *cells)
        found.append(table)
    if "wordings" in result:
        table = _table(
            "Latents that another wording silences", "site", "place", "B", "stay on", "kept", "by one latent"
        )
        for each in result["wordings"]["sites"]:
            for place in ("country", "last token"):
                for other, figures in each[place].items():
                    if figures["pairs"]:
                        cells = (number(figures[key]) for key in ("sensitivity", "kept", "absorbed_by_one"))
                        table.add_row(each["site"], place, other, *cells)
        found.append(table)
    if "anomalies" in result:
        table = _table("Large latents and shared parts", "site", "place", "kind", "latents", "shared", "explained")
        for each in result["anomalies"]["sites"]:
            for place in ("country", "last token"):
                for kind in ("anomalous", "related"):
                    figures = each[place][kind]
                    counts = [str(figures[key]) for key in ("latents", "shared")]
                    table.add_row(each["site"], place, kind, *counts, number(figures["explained"]))
        found.append(table)
    return found


def _letters(sites: list[dict[str, Any]]) -> list[Table]:
    rates = _table("First letters absorbed", "site", "valid letters", "v1", "v2 full", "v2 fraction", "words")
    flags = _table("The flag against them", "site", "parts", "truth", "AUC", "precision", "recall")
    for site in sites:
        if "reason" in site:
            rates.add_row(site["site"], str(site["valid_letters"]), site["reason"])
            continue
        cells = (number(each) for each in site["absorbed"].values())
        rates.add_row(site["site"], str(site["valid_letters"]), *cells, str(site["judged"]))
        for name, flag in site["flags"].items():
            for rule, judged in flag["rules"].items():
                for truth, scored in judged["against"].items():
                    row = [number(scored[key]) for key in ("auc", "precision", "recall")]
                    flags.add_row(site["site"], f"{name}; {rule}", truth, *row)
    return [rates, flags]
