"""The memory contract: what is predicted is what a process of its own really holds, and a budget changes no result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaConfig, LlamaForCausalLM

from circuits.memory import ON, _positions_on, _saved, fit, parse_bytes, probe
from mediation.dictionaries import Dictionary
from mediation.errors import MediationError
from mediation.prompts import Baseline, Example, PromptSet, collate
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, by_position

WIDTH, LAYERS, WORDS, LENGTH, PROMPTS, LATENTS = 192, 5, 500, 192, 8, 1024
TOLERANCE = 0.15
EXTRA = (330, 400, 1100)  # MB over what the process holds before the run

CHILD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from circuits.build import build_graph
from circuits.memory import fit, held
from mediation.dictionaries import Dictionary
from mediation.prompts import PromptSet, batches
from mediation.runs import Run, peak_memory_mb
from mediation.subject import SubjectModel
from mediation.trace import Prepared, TraceSettings, trace
from tests.circuits.test_memory import examples, settings

folder, out, extra = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model = SubjectModel.load(folder / "model", device="cpu")
dictionaries = [Dictionary.load(each) for each in sorted((folder / "saes").iterdir())]
made = list(batches(examples(), settings().batch_size))
prompts = PromptSet.from_jsonl(folder / "prompts.jsonl")
prepared = Prepared(prompts, made, None, prompts.halves(0))
budget = held(model.device) + extra * 10**6
prepared, chosen, cost = fit(model, dictionaries, prepared, settings(), budget)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set starts anew
run = Run.create(out, {})
trace(model, dictionaries, prepared, run, chosen)
build_graph(model, dictionaries, prepared, run, chosen)
print(json.dumps({
    "peak": peak_memory_mb() * 2**20, "predicted": cost.peak, "held": cost.held, "budget": budget,
    "batch": chosen.batch_size, "chunk": chosen.chunk, "phases": cost.phases,
}))
"""


def settings() -> TraceSettings:
    return TraceSettings(baseline=Baseline.ZERO, steps=2, batch_size=PROMPTS, sample=4, top=2)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(PROMPTS):
        length = LENGTH - 2 * index
        tokens = torch.randint(3, WORDS, (length,), generator=generator).tolist()
        found.append(Example(index, tokens, None, [(length - 1, 10, 1), (length - 1, 11, -1)], [""] * length))
    return found


def make_model(folder: Path) -> SubjectModel:
    """A random Llama whose graph of all prompts is hundreds of megabytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2 * LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return SubjectModel.load(folder, device="cpu")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a dictionary at three sites, and prompts."""
    folder = tmp_path_factory.mktemp("memory")
    make_model(folder / "model")
    for layer in (1, 2, 4):
        torch.manual_seed(layer)
        hook = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_pre")
        sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=16, metadata=hook))
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
        sae.W_enc.data = sae.W_dec.data.T.contiguous()
        sae.save_model(folder / "saes" / str(layer))
    rows = [{"id": str(i), "clean": "x", "answer": " a", "wrong_answer": " b"} for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the high-water mark from /proc")
def test_the_peak_is_as_predicted_at_three_budgets_and_the_results_are_the_same(setting: Path, tmp_path: Path) -> None:
    measured, tables = [], []
    for extra in EXTRA:
        out = tmp_path / str(extra)
        call = [sys.executable, "-c", CHILD, str(setting), str(out), str(extra)]
        ran = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        measured.append(json.loads(ran.stdout.splitlines()[-1]))
        shards = {kind: pl.read_parquet(out / kind / "*.parquet") for kind in ("nodes", "edges")}
        keys = {"nodes": ["prompt", "site", "position", "latent"], "edges": ["prompt", "source", "target"]}
        tables.append({kind: frame.sort(keys[kind], nulls_last=True) for kind, frame in shards.items()})
    for each in measured:
        assert each["peak"] == pytest.approx(each["predicted"], rel=TOLERANCE)
        assert each["predicted"] <= each["budget"]
    assert len({(each["batch"], each["chunk"]) for each in measured}) == len(EXTRA)
    for other in tables[1:]:
        for kind, frame in other.items():
            assert_frame_equal(frame, tables[0][kind], rel_tol=1e-3, abs_tol=1e-5)


def test_where_nothing_fits_one_sentence_says_what_is_missing(setting: Path) -> None:
    model = SubjectModel.load(setting / "model", device="cpu")
    dictionary = Dictionary.load(next((setting / "saes").iterdir()))
    prompts = PromptSet.from_jsonl(setting / "prompts.jsonl")
    prepared = Prepared(prompts, [collate(examples())], None, prompts.halves(0))
    with pytest.raises(MediationError, match=r"The longest prompt has 192 tokens and needs \d\.\d+ GB alone"):
        fit(model, [dictionary], prepared, settings(), 10**6)
    rebatched, chosen, cost = fit(model, [dictionary], prepared, settings(), None)
    assert [len(batch) for batch in rebatched.batches] == [PROMPTS]
    assert (chosen, cost.held > 0) == (settings(), True)


def test_what_a_graph_saves_grows_as_the_probe_says(setting: Path) -> None:
    """One sequence of any length, counted anew; with plain attention its matrices make it bend."""
    model = SubjectModel.load(setting / "model", device="cpu")
    dictionary = Dictionary.load(next((setting / "saes").iterdir()))
    for kind in ("sdpa", "eager"):
        with model.attention(kind):
            probed = probe(model, [dictionary], examples()[0])
            tokens = torch.tensor([examples()[0].clean] * 2)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[1, -1] = False
            saved = _saved(model, tokens, mask, dictionary.site) / 2
        assert probed.saved(LENGTH) == pytest.approx(saved, rel=0.05)


def test_a_role_of_many_tokens_is_one_node_at_many_positions() -> None:
    """Of 39 tokens without a role and the last one; a prompt alone has a role for each."""
    example = Example(0, list(range(40)), None, [(39, 10, 1)], [""] * 40)
    assert _positions_on(collate([example])) == pytest.approx(ON * 39)
    assert _positions_on(collate([by_position(example)])) == 1.0


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("800 mb", 8 * 10**8), ("1.5GiB", 3 * 2**29), ("4096", 4096), ("3k", 3000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 apples", "-1GB", "1,5GB"])
def test_other_words_are_no_sizes(text: str) -> None:
    with pytest.raises(MediationError, match="--memory is"):
        parse_bytes(text)
