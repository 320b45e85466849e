"""The benchmark of absorption from end to end on a small model whose embeddings are planted: letters and concepts have
axes of their own, and of every sixth word one latent has taken over its letter.

SmolLM2 needs minutes; `mediation bench absorption` measures it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mediation import commands
from mediation.absorbed import anomalies, coordination
from mediation.absorbed.bench import SPELLING, AbsorptionSettings, Inputs, run_absorption
from mediation.absorbed.concepts import FAMILIES
from mediation.absorbed.contexts import single_tokens
from mediation.absorbed.coordination import WORDINGS, Worded
from mediation.absorbed.letters import measure_letters, spell
from mediation.absorbed.relatedness import ENOUGH, NEAR, find_text, relations
from mediation.absorbed.tables import tables
from mediation.cli import main
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.metalatents import MetaDictionary
from mediation.realfacts.questions import countries
from mediation.sites import Site
from mediation.subject import SubjectModel
from tests.mediation.test_absorbed import planted
from tests.setups import page_script
from tests.tiny_models import CONFIGS, WORDS, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
SITE = Site.parse("blocks.0.hook_resid_pre")  # x is the embedding there
PER_LETTER, D = 60, 320
SPELT = [f"{letter}{k}" for k in range(PER_LETTER) for letter in ascii_lowercase]
ABSORBED = [word for word in SPELT if int(word[1:]) % 6 == 0]
CLASSES = range(286, 290)
CONCEPTS = range(290, 295)


def vocabulary() -> list[str]:
    entities = countries()
    texts = [w.format("") for each in WORDINGS.values() for w in each]
    texts += [text for f in FAMILIES for c in (*f.discovery, *f.evaluation) for text in (c.before, c.after)]
    texts += [word for f in FAMILIES for c in f.concepts for word in (*c.members, c.answer)]
    texts += [word for f in FAMILIES for word in f.others] + ["In", "has the first letter:"]
    texts += [*entities.names, *(v for values in entities.values.values() for v in values if v)]
    found = {word for text in texts for word in text.split()} | set(SPELT) | set(ascii_uppercase)
    return [*WORDS[:4], *sorted(found - set(WORDS[:4]))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    folder, words = tmp_path_factory.mktemp("planted"), vocabulary()
    config = CONFIGS["llama"]()
    config.vocab_size, config.hidden_size, config.intermediate_size = len(words), D, D
    config.head_dim, config.max_position_embeddings, config.initializer_range = D // 4, 256, 0.05
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    embedding = module.get_input_embeddings().weight.data
    embedding[:, :295] = 0.0
    at = {word: k for k, word in enumerate(words)}
    for k, word in enumerate(SPELT):
        embedding[at[word]] = 0.0
        embedding[at[word], ascii_lowercase.index(word[0])] = 4.0
        own = 26 + ABSORBED.index(word) if word in ABSORBED else CLASSES[k % len(CLASSES)]
        embedding[at[word], own] = 3.0
    for axis, concept in zip(CONCEPTS, FAMILIES[0].concepts, strict=True):
        for word in concept.members:
            embedding[at[word], axis] = 4.0
    module.save_pretrained(folder)
    tiny_tokenizer(words=words).save_pretrained(folder)
    return SubjectModel.load(folder, device="cpu")


def letters_dictionary(folder: Path, absorbed: bool) -> Dictionary:
    """A latent for each letter and each absorbed word; absorbed or not, they say the same of every word."""
    decoder, encoder, bias = torch.eye(D)[:295], torch.eye(D)[:295].clone(), torch.zeros(295)
    for k, word in enumerate(ABSORBED):
        letter = ascii_lowercase.index(word[0])
        if absorbed:
            encoder[letter, 26 + k] = -4 / 3
            decoder[26 + k] = 0.6 * torch.eye(D)[letter] + 0.8 * torch.eye(D)[26 + k]
            encoder[26 + k, letter], encoder[26 + k, 26 + k], bias[26 + k] = 1.0, 4 / 3, -4.0
    return planted(folder, encoder, decoder, bias, SITE)


def nothing(rows: Tensor) -> dict[str, MetaDictionary]:
    return {}


@pytest.mark.parametrize("absorbed", [True, False])
def test_absorbed_letters_are_found_and_no_others(model: SubjectModel, tmp_path: Path, absorbed: bool) -> None:
    dictionary = letters_dictionary(tmp_path / "sae", absorbed)
    spelling = spell(model, [(word, word[0]) for word in SPELT], [SITE], per_letter=PER_LETTER)
    assert not set(spelling.train.words) & set(spelling.test.words)
    found = measure_letters(dictionary, spelling, nothing, judged=10_000)
    assert found["valid_letters"] == 26
    assert found["judged"] == len(spelling.test.words)  # the probe gets all of them right
    truth = sum(word in ABSORBED for word in spelling.test.words) / len(spelling.test.words)
    assert 0.1 < truth < 0.25
    expected = truth if absorbed else 0.0
    assert found["main_silent"]["value"] == pytest.approx(expected)
    assert found["absorbed"]["v2 full"]["value"] == pytest.approx(expected)
    assert found["absorbed"]["v2 fraction"]["value"] == pytest.approx(expected)
    assert found["absorbed"]["v1"]["value"] <= expected  # the model was not trained to spell: few effects are a logit


def test_where_letters_cannot_be_read_there_is_no_figure(model: SubjectModel, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [(word, rng.choice(ascii_lowercase)) for word in SPELT]
    spelling = spell(model, words, [SITE], per_letter=PER_LETTER)
    found = measure_letters(letters_dictionary(tmp_path / "sae", False), spelling, nothing, judged=20)
    assert "20 are needed" in found["reason"]
    assert "absorbed" not in found


def all_right(ask: Callable[..., Worded]) -> Callable[..., Worded]:
    def asked(*args: Any) -> Worded:
        worded = ask(*args)
        worded.right = worded.answers >= 0
        return worded

    return asked


def page(folder: Path, results: list[Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """What docs/make_evidence_absorption.py writes into `folder`."""
    script = page_script("evidence_absorption")
    monkeypatch.setattr(script, "DOCS", folder)
    monkeypatch.setattr(script, "STORE", folder / "evidence" / "absorption.json")
    monkeypatch.setattr("sys.argv", ["make_evidence_absorption.py", *map(str, results)])
    script.main()
    return (folder / "evidence-absorption.md").read_text(encoding="utf-8")


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evidence").mkdir()
    shutil.copy(DOCS / "evidence" / "absorption.json", tmp_path / "evidence")
    assert page(tmp_path, [], monkeypatch) == (DOCS / "evidence-absorption.md").read_text(encoding="utf-8")
    assert all((DOCS / plot.name).exists() for plot in tmp_path.glob("*.svg"))


def test_quick_runs_every_part(
    model: SubjectModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.SubjectModel, "load", classmethod(lambda *_args, **_options: model))
    for module in (coordination, anomalies):
        monkeypatch.setattr(module, "ask_wording", all_right(coordination.ask_wording))
    rng = random.Random(0)
    words = vocabulary()[4:]
    text = tmp_path / "text.txt"
    lines = [" ".join(rng.choices(kind, k=40)) for _ in range(200) for kind in (words, SPELT, SPELT, SPELT)]
    text.write_text("\n".join(lines))
    (tmp_path / "data" / SPELLING.parent).mkdir(parents=True)
    rows = [json.dumps({"word": word, "first": word[0]}) for word in SPELT]
    (tmp_path / "data" / SPELLING).write_text("\n".join(rows))
    dictionary = letters_dictionary(tmp_path / "sae", True)
    meta = MetaDictionary.train(
        dictionary.decoder, width=64, k=2, steps=20, restarts=1, base_hash=dictionary.content_hash
    )
    meta.save(tmp_path / "meta")
    main(
        ["bench", "absorption", "--model", "planted", "--saes", str(tmp_path / "sae"), "--meta", str(tmp_path / "meta"),
         "--data", str(tmp_path / "data"), "--text", str(text), "--quick", "--json"]
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] < 180
    assert [table.title for table in tables(found)]
    (letters,) = found["letters"]["sites"]
    assert set(letters["flags"]) >= {"meta-dictionary of rows in use", "probe directions"}
    (concepts,) = found["concepts"]["sites"]
    kinds = concepts["families"]["kinds, asked for"]
    assert kinds["all"]["present"]["value"] > 0.95  # their axis is in the embedding, and held-out members have it
    assert kinds["all"]["silent"]["value"] == 0  # and the dictionary has a latent for it
    assert [each["width"] for each in found["concepts"]["grid"]] == [512, 512]
    (wordings,) = found["wordings"]["sites"]
    # At the embedding a country reads the same in any wording: there is no pair whose latents could differ.
    assert wordings["country"]["same fact"] == {"pairs": 0}
    assert wordings["country"]["another country"]["pairs"] > 50
    (odd,) = found["anomalies"]["sites"]
    assert odd["country"]["anomalous"]["latents"] + odd["country"]["related"]["latents"] <= odd["country"]["large"]
    (tmp_path / "result.json").write_text(json.dumps(found))
    written = page(tmp_path, [tmp_path / "result.json"], monkeypatch)
    assert f"| block 0 | country | related | {odd['country']['related']['latents']} of " in written
    assert f"| kinds, asked for | {kinds['all']['present']['value']:.2f} (" in written
    with pytest.raises(MediationError, match="need --text"):
        run_absorption(Inputs(model, [dictionary], {}, tmp_path / "data", []), AbsorptionSettings())
    with pytest.raises(MediationError, match="no part 'letter'"):
        AbsorptionSettings(parts=("letter",))


def test_latents_about_a_task_are_told_from_others(model: SubjectModel, tmp_path: Path) -> None:
    """One latent for all countries of the family, one for words with an a, one for France alone, one for a word that
    always stands right before a country, and one for a word that stands anywhere.
    """
    rng = random.Random(0)
    names = list(FAMILIES[0].concepts[0].members)
    plain = [word for word in SPELT if word not in ("a0", "b0")]

    def line(k: int) -> str:
        words = rng.choices(plain, k=100)
        words[rng.randrange(100)] = "b0"
        if k % 2:
            at = rng.randrange(10, 90)
            words[at - 1 : at + 1] = ["a0", "France" if k % 4 == 1 else rng.choice(names)]
        return " ".join(words)

    file = tmp_path / "text.txt"
    file.write_text("\n".join(line(k) for k in range(1200)))
    embedding = model.module.get_input_embeddings().weight.detach()
    words = ("France", "a0", "b0")
    own = torch.cat([embedding[model.encode(word)[-1:]] for word in words])
    encoder = torch.cat([torch.eye(D)[[CONCEPTS[0], 0]], normalize(own, dim=1)])
    bias = torch.tensor([-1.0, -1.0, *(0.505 - own.norm(dim=1)).tolist()])
    dictionary = planted(tmp_path / "sae", encoder, encoder, bias, SITE)
    text = find_text(model, [file], names, 20_000)
    assert text.windows.shape == text.near.shape
    assert 0.4 < text.near.any(1).float().mean() < 0.6
    assert text.near.sum(1).max() <= 5 * (2 * NEAR + 1)
    found = relations(model, [dictionary], text)[SITE]
    assert found.contexts[2] == ENOUGH  # France is met no oftener, and alone of all countries
    assert found.peaks[:ENOUGH, 2].tolist() == model.encode("France")[-1:] * ENOUGH
    assert found.related.tolist() == [True, False, True, True, False]
    assert found.unrelated.tolist() == [False, True, False, False, True]
    assert found.share[[0, 2]].tolist() == [1.0, 1.0]
    with pytest.raises(MediationError, match="names of countries"):
        find_text(model, [file], ["Atlantis"], 20_000)


def test_single_tokens(model: SubjectModel) -> None:
    assert set(single_tokens(model, ["a0", "a0 a1"])) == {"a0"}
