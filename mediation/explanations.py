"""Other people's explanations of latents, as labels.

Neuronpedia: JSON or JSON Lines, gzipped or not, one file or a folder of them, of objects with `index` and
`description` (bulk exports) or `index` and `explanations` (a latent's page). Objects name their source by `modelId`
and `layer`; those of another source than the dictionary's `neuronpedia_id` ("model/source") are left out.

delphi: a results folder whose `explanations/` holds `<hook>_latentN.txt`, each one JSON string. Files of other hooks
than the dictionary's site are left out.

Imported labels have no score: nothing here has tested them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.sites import Site

_DELPHI = re.compile(r"(.+)_latent(\d+)\.txt")
_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def import_explanations(path: str | Path, dictionary: Dictionary) -> pl.DataFrame:
    """The explanations of a dictionary's latents in `path`: index, label, score (null) and source.

    MediationError: none of them is of this dictionary, or a file cannot be read.
    """
    path = Path(path)
    folder = path / "explanations" if (path / "explanations").is_dir() else path
    delphi = sorted(folder.glob("*_latent*.txt")) if folder.is_dir() else []
    source = "delphi" if delphi else "neuronpedia"
    found = _delphi(delphi, dictionary) if delphi else _neuronpedia(path, dictionary)
    inside = {index: text for index, text in found.items() if 0 <= index < dictionary.d_sae and text}
    if not inside:
        raise MediationError(f"{path} explains no latent of '{dictionary.name}'; give explanations of this dictionary.")
    return pl.DataFrame(
        {"index": sorted(inside), "label": [inside[index] for index in sorted(inside)], "score": None},
        schema_overrides={"index": pl.Int64, "score": pl.Float64},
    ).with_columns(source=pl.lit(source))


def _neuronpedia(path: Path, dictionary: Dictionary) -> dict[int, str]:
    wanted, sources = dictionary.sae.cfg.metadata.neuronpedia_id, set()
    found: dict[int, str] = {}
    for entry, file in _entries(path):
        try:
            index = int(entry["index"])
            named = [entry] if "description" in entry else entry["explanations"]
            text = next((str(each["description"]).strip() for each in named), "")
        except (KeyError, TypeError, ValueError):
            raise MediationError(
                f"{file} has an entry without index and description; give Neuronpedia's explanations."
            ) from None
        source = f"{entry['modelId']}/{entry['layer']}" if {"modelId", "layer"} <= entry.keys() else None
        if source is None or wanted in (None, source):
            sources.add(source)
            found.setdefault(index, text)
    if wanted is None and len(sources) > 1:
        raise MediationError(
            f"{path} explains several dictionaries and '{dictionary.name}' has no neuronpedia_id to choose one by; "
            "give the explanations of one dictionary."
        )
    return found


def _entries(path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    files = sorted(file for file in path.iterdir() if file.name.endswith(_JSON)) if path.is_dir() else [path]
    for file in files:
        text = _text(file)
        try:
            try:
                parsed = json.loads(text)
            except json.JSONDecodeError:  # not one document: one a line, then
                parsed = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise MediationError(f"{file} is neither JSON nor JSON Lines ({error}); give another file.") from error
        for entry in parsed if isinstance(parsed, list) else [parsed]:
            yield entry, file


def _delphi(files: list[Path], dictionary: Dictionary) -> dict[int, str]:
    hooks: dict[str, dict[int, str]] = {}
    for file in files:
        if match := _DELPHI.fullmatch(file.name):
            try:
                text = json.loads(_text(file))
            except json.JSONDecodeError as error:
                raise MediationError(f"{file} is not a JSON string ({error}); remove it or write it anew.") from error
            hooks.setdefault(match[1], {})[int(match[2])] = str(text).strip()
    site = dictionary.site.canonical()
    return {index: text for hook, texts in hooks.items() if _site(hook) == site for index, text in texts.items()}


def _site(hook: str) -> Site | None:
    try:
        return Site.parse(hook.strip(".")).canonical()
    except MediationError:
        return None


def _text(file: Path) -> str:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "damaged, or not UTF-8"
        raise MediationError(f"Cannot read the explanations in {file}: {why}.") from error
