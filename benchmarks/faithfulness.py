"""Circuits of nodes and edges against baselines, by running the model with them; and against circuits that are known.

    python benchmarks/faithfulness.py compiled organism --results faithfulness.json --docs docs/faithfulness.md
    python benchmarks/faithfulness.py agreement --data AGREEMENT_FOLDER --saes SAES --results faithfulness.json
    python benchmarks/faithfulness.py capitals --saes SAES --no-edges --results faithfulness.json

compiled: circuits compiled into a model (mediation.organisms.compiled): precision of nodes and edges, which is recall,
    for as many as are true.
organism: the trained organism. Its circuit is not known in full, but where the fact is, and in which directions.
agreement: subject-verb agreement, contrast pairs of the sparse feature circuits paper: a folder with NAME_train.json.
capitals: a user's wrong suggestion against a neutral sentence, the prompts of examples/sycophancy_smollm2.

Every part is added to the JSON file of results, from which the tables of the document are made.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mediation
from circuits.ablation import Cut, Errors, run_nodes
from circuits.proof import Kind, ProofSettings, discover, place_prompts, prove
from mediation.commands import Source, load_dictionaries
from mediation.estimators.common import behaviour
from mediation.nodes import site_states
from mediation.organisms.compiled import GATES, Truth, compile_circuit
from mediation.organisms.language import LAST_NAME
from mediation.organisms.measure import name_activations
from mediation.organisms.world import World, opinion_rows
from mediation.products import use_fast_products
from mediation.prompts import Baseline, PromptSet
from mediation.subject import SubjectModel
from mediation.trace import TraceSettings

ORGANISM = Path(mediation.__file__).parent / "organisms" / "default"
PEOPLE, OPINIONS = 12, 120  # people of the organism's prompts, few enough to be met in both halves, and prompts
ROLE_WORDS = 2  # of an agreement prompt: the article and the noun that the verb agrees with


# Where the circuit is known ------------------------------------------------------------------------------------


def compiled(seeds: int) -> dict[str, Any]:
    """Mean precision over seeds of every ranking, by kind of gate."""
    found: dict[str, Any] = {"seeds": seeds}
    for kinds in (("sum",), ("and",), ("or",), GATES):
        shares: dict[str, dict[str, list[float]]] = {kind: {} for kind in Kind}
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                for kind, name, share in _precision(Path(folder), seed, kinds):
                    shares[kind].setdefault(name, []).append(share)
        found[" ".join(kinds) if len(kinds) == 1 else "all kinds"] = {
            kind: {name: sum(each) / len(each) for name, each in by.items()} for kind, by in shares.items()
        }
    return found


def _precision(folder: Path, seed: int, kinds: tuple[str, ...]) -> list[tuple[str, str, float]]:
    truth = compile_circuit(seed, folder, kinds)
    model = SubjectModel.load(folder / "model", device="cpu")
    dictionaries = load_dictionaries(Source("", (str(folder / "saes"),), ""), "cpu")
    names: dict[str, int] = {}
    traced = TraceSettings(steps=8, top=40)
    discovery, _ = PromptSet.from_jsonl(folder / "prompts.jsonl").split(0.5, seed)
    half = place_prompts(model, dictionaries, discovery, traced, names)
    found = discover(model, dictionaries, half, traced, ProofSettings(seed=seed))
    shares = []
    for each in found.rankings:
        members = each.members(each.orders[0], found.ids(each, list(names)))
        shares.append((each.kind.value, each.name, _share(truth, each.kind, members)))
    return shares


def _share(truth: Truth, kind: Kind, members: list[tuple[str, str | None]]) -> float:
    true: Any = truth.nodes if kind is Kind.NODES else truth.edges
    return len(true & {a if b is None else (a, b) for a, b in members[: len(true)]}) / len(true)


def organism(chosen: argparse.Namespace) -> dict[str, Any]:
    """A proof on opinions of a few people, and what is known: the place of the fact and its directions."""
    world = World.load(ORGANISM)
    people = world.held_out[:PEOPLE]
    prompts = PromptSet.from_rows(opinion_rows(world, people, partners=people, limit=OPINIONS, seed=chosen.seed))
    model = SubjectModel.load(ORGANISM / "model", device="cpu")
    dictionaries = load_dictionaries(Source("", (str(ORGANISM / "saes"),), ""), "cpu")
    found = measure(model, dictionaries, prompts, chosen)
    return found | {"known": _known(model, dictionaries, world, prompts, chosen)}


def _known(
    model: SubjectModel, dictionaries: list, world: World, prompts: PromptSet, chosen: argparse.Namespace
) -> dict:
    """How much of the effect passes where the fact was planted, and in the planted directions; sums over prompts."""
    names: dict[str, int] = {}
    _, evaluation = prompts.split(0.5, chosen.seed)
    half = place_prompts(model, dictionaries, evaluation, TraceSettings(), names)
    attributes = _directions(name_activations(model.module, model.tokenizer, world), world)
    rows = {prompt.id: prompt for prompt in prompts}
    decisive = {claim.words: claim.attribute for claim in world.claims}
    total = {name: 0.0 for name in ("whole", "at the name", "elsewhere", "decisive attribute", "other attributes")}
    for batch, places in zip(half.prepared.batches, half.places, strict=True):
        cut = Cut.of(model, batch, dictionaries, Baseline.CORRUPT, places)
        every = [torch.ones(len(names), latents, dtype=torch.bool) for latents in cut.latents]
        at_name = torch.zeros(len(names), dtype=torch.bool)
        at_name[names["person"]] = True
        errors = torch.ones(len(cut.dictionaries), len(names), dtype=torch.bool)
        clean, empty = behaviour(model, batch), behaviour(model, batch, corrupt=True)
        total["whole"] += float((clean - empty).sum())
        for name, kept in (("at the name", at_name), ("elsewhere", ~at_name)):
            first = [every[0] & kept[:, None], *every[1:]]
            total[name] += float((run_nodes(cut, first, torch.stack([kept, *errors[1:]])) - empty).sum())
        (state,) = site_states(model, batch, [cut.dictionaries[0]], Baseline.CORRUPT)
        asked = [decisive[rows[half.prepared.prompts[e.prompt].id].group] for e in batch.examples]
        for attribute, basis in attributes.items():
            change = state.x[:, LAST_NAME] - state.baseline_x[:, LAST_NAME]
            new = state.baseline_x.clone()
            new[:, LAST_NAME] += change @ basis.T @ basis
            moved = behaviour(model, batch, {state.dictionary.site: lambda _, new=new: new}) - empty
            for row, effect in enumerate(moved.tolist()):
                own = asked[row] == attribute
                total["decisive attribute" if own else "other attributes"] += effect / (
                    1 if own else len(attributes) - 1
                )
    return {name: value / total["whole"] for name, value in total.items() if name != "whole"}


def _directions(x: Tensor, world: World) -> dict[str, Tensor]:
    """An orthonormal basis [values - 1, d] of each attribute's directions: means of the people who have a value."""
    found = {}
    for name, values in world.attributes.items():
        own = torch.tensor([values.index(person.facts[name]) for person in world.people])
        means = torch.stack([x[own == value].mean(0) for value in range(len(values))]) - x.mean(0)
        found[name] = torch.linalg.svd(means, full_matrices=False).Vh[: len(values) - 1]
    return found


# Real data -----------------------------------------------------------------------------------------------------


def agreement(model: SubjectModel, file: Path) -> PromptSet:
    """Contrast pairs of equal token length whose clean answer the model prefers, one for each clean text."""
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        pair = json.loads(line)
        clean = pair["clean_prefix"]
        if clean in rows or len(model.encode(clean)) != len(model.encode(pair["patch_prefix"])):
            continue
        words = clean.split()
        roles = {"subject": [len(words[0]) + 1, len(" ".join(words[:ROLE_WORDS]))]} if len(words) > ROLE_WORDS else {}
        rows[clean] = {
            "id": str(number), "clean": clean, "corrupt": pair["patch_prefix"], "answer": pair["clean_answer"],
            "wrong_answer": pair["patch_answer"], "roles": roles, "group": pair["case"],
        }  # fmt: skip
    return PromptSet.from_rows(rows.values())


def capitals(model: SubjectModel, seed: int) -> PromptSet:
    """Countries whose capital the model knows, "I think the capital of ..." against a sentence on the weather."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sycophancy_smollm2"))
    from facts import facts, halves, rows

    known = halves(model, [each for each in facts(None, seed) if each.question.name == "capital"], seed)
    return PromptSet.from_rows(rows(model, [*known.discovery, *known.evaluation], "belief", "neutral"))


def measure(model: SubjectModel, dictionaries: list, prompts: PromptSet, chosen: argparse.Namespace) -> dict[str, Any]:
    """One proof under every policy for error nodes that was asked for."""
    same = {"batch_size": chosen.batch_size, "chunk": chosen.batch_size, "seed": chosen.seed}
    traced = TraceSettings(baseline=chosen.baseline, steps=chosen.steps, top=chosen.top, **same)
    discovery, evaluation = prompts.split(0.5, chosen.seed)
    kinds = tuple(Kind) if chosen.edges else (Kind.NODES,)
    found: dict[str, Any] = {
        "model": model.name,
        "sites": {each.site.name: each.d_sae for each in dictionaries},
        "prompts": [min(len(each), chosen.number) for each in (discovery, evaluation)],
        "top": chosen.top, "baseline": chosen.baseline.value, "seed": chosen.seed, "threads": torch.get_num_threads(),
        "cores": os.cpu_count(), "note": chosen.note, "errors": {},
    }  # fmt: skip
    for policy in chosen.errors:
        start = time.perf_counter()
        proof = prove(
            model, dictionaries, discovery[: chosen.number], evaluation[: chosen.number], traced,
            ProofSettings(policy, chosen.seed, kinds),
        )  # fmt: skip
        found["errors"][policy.value] = {
            "summary": proof.summary(seed=chosen.seed),
            "curves": proof.table(seed=chosen.seed).to_dicts(),
            "seconds": time.perf_counter() - start,
        }
    return found


# The document --------------------------------------------------------------------------------------------------

HEAD = """# Circuits proven against the model

Made by `benchmarks/faithfulness.py` on {cores} CPU cores that were shared with other work, {threads} thread(s).
**Faithfulness**: what the circuit alone does of what the model does, (m(C) - m(empty)) / (m(clean) - m(empty)) with m
the mean behaviour; 1 is the model. **Completeness**: the same for the model without the circuit; 0 says that nothing
outside it matters. Circuits are chosen on discovery prompts and measured on evaluation prompts, disjoint by clean text.
Everything outside the circuit is at its baseline, site after site with recomputed values; an edge circuit gives every
node its own input, made of the sources whose edges to it are kept (`circuits/ablation.py`).
CPR and CMD follow Mueller et al. 2025 (MIB), over log k so that small circuits count, and over k as MIB has them.

Rankings. *circuit*: nodes by |attribution|, edges by the strongest path through them. *activation*: |f - f'|, of edges
the weaker end's. *neurons*: in place of dictionaries the coordinates of the same sites (an MLP's neurons where it
writes). *contribution*: edges by their own contribution alone. *nodes' attribution*: attribution without edges; an edge
counts as much as its weaker end. *random*: the mean of two orders.
"""


def document(results: dict[str, Any]) -> str:
    parts = [HEAD.format(cores=os.cpu_count(), threads=torch.get_num_threads())]
    if "compiled" in results:
        parts.append(_compiled_part(results["compiled"]))
    for name, found in results.items():
        if name != "compiled":
            parts.append(_proof_part(name, found))
    return "\n".join(parts)


def _compiled_part(found: dict[str, Any]) -> str:
    seeds = found["seeds"]
    lines = [
        "## Where the circuit is known\n",
        "Circuits compiled into a three-block Llama (`mediation/organisms/compiled.py`), beside decoys that change",
        "more than the circuit. Of the first nodes or edges, as many as are true, the share that is true, which is",
        f"precision and recall; mean over seeds 0 to {seeds - 1}. An *or* gate is min(a + b, 1): where both inputs are",
        "on, the gradient at the clean prompt is zero; edges averaged along the path to the baseline see both.\n",
    ]
    for kind in Kind:
        names = list(found["sum"][kind.value])
        lines += [f"| gates, {kind.value} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for gates, each in found.items():
            if gates != "seeds":
                lines.append(f"| {gates} | {' | '.join(f'{each[kind.value][name]:.2f}' for name in names)} |")
        lines.append("")
    return "\n".join(lines)


def _proof_part(name: str, found: dict[str, Any]) -> str:
    sites = ", ".join(f"{site} ({latents})" for site, latents in found["sites"].items())
    edges = any(Kind.EDGES in each["summary"] for each in found["errors"].values())
    lines = [
        f"## {name}\n",
        f"{found['model']}; dictionaries (latents): {sites}. {found['prompts'][0]} discovery and {found['prompts'][1]} "
        f"evaluation prompts, seed {found['seed']}; baseline {found['baseline']}"
        + (f"; edges between the {found['top']} strongest latents of each site and the embeddings" if edges else "")
        + f". {found['note']}\n",
    ]  # fmt: skip
    if "known" in found:
        shares = "; ".join(f"{key} {value:.2f}" for key, value in found["known"].items())
        lines.append(
            "What is known by construction: faithfulness of all that is at the person's name after block 0, of all "
            "that is elsewhere there, of the planted directions of the attribute that decides, and of those of each "
            f"other attribute (mean): {shares}.\n"
        )
    for policy, each in found["errors"].items():
        for kind, figures in each["summary"].items():
            lines += _table(policy, kind, figures, [row for row in each["curves"] if row["kind"] == kind])
        lines.append(f"{each['seconds']:.0f} s.\n")
    return "\n".join(lines)


def _table(policy: str, kind: str, figures: dict[str, Any], curves: list[dict[str, Any]]) -> list[str]:
    names = list(figures["scores"])
    lines = [
        f"**{kind.capitalize()}**, error nodes {policy.replace('_', ' ')}; faithfulness / completeness of "
        f"{figures['of']} {kind}; behaviour {figures['clean']:+.2f} clean, {figures['empty']:+.2f} empty:\n",
        f"| kept | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]  # fmt: skip
    for size in dict.fromkeys(row["size"] for row in curves):
        at = {row["ranking"]: row for row in curves if row["size"] == size}
        cells = (f"{at[name]['faithfulness']:.2f} / {at[name]['completeness']:.2f}" for name in names)
        lines.append(f"| {size} | {' | '.join(cells)} |")
    for area, label in (("cpr_log", "CPR, log k"), ("cmd_log", "CMD, log k"), ("cpr", "CPR"), ("cmd", "CMD")):
        cells = (_interval(figures["scores"][name][area]) for name in names)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, "", _verdict(kind, figures), ""]


def _interval(area: dict[str, float | None]) -> str:
    low, high = (f"{area[end]:.2f}" if area[end] is not None else "-" for end in ("low", "high"))
    return f"{area['value']:.2f} [{low}, {high}]"


def _verdict(kind: str, figures: dict[str, Any]) -> str:
    """Where a baseline is better, by the paired bootstrap intervals over evaluation prompts."""
    said = []
    for name, each in figures["against"].items():
        better = each["cmd_log"]["low"] is not None and each["cmd_log"]["low"] > 0
        worse = each["cmd_log"]["high"] is not None and each["cmd_log"]["high"] < 0
        verdict = "worse than the circuit" if better else "better than the circuit" if worse else "not told apart"
        where = ", ".join(map(str, each["baseline_closer_at"]))
        said.append(f"{name}: {verdict}" + (f", but closer to the model at {where} {kind}" if where else ""))
    return f"By CMD over log k (paired 95 % interval over prompts): {'; '.join(said)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="compiled, organism, agreement, capitals; none: only the document")
    parser.add_argument("--results", type=Path, required=True, help="JSON file that the parts are added to")
    parser.add_argument("--docs", type=Path, help="document to write from all results")
    parser.add_argument("--data", type=Path, help="folder of agreement pairs")
    parser.add_argument("--pairs", default="simple", help="agreement: simple or nounpp")
    parser.add_argument("--model", default="smollm2", help="for agreement and capitals")
    parser.add_argument("--saes", nargs="+", help="for agreement and capitals: folders of dictionaries")
    parser.add_argument("--note", default="", help="a sentence for the document: what the dictionaries are")
    parser.add_argument("--baseline", type=Baseline, default=Baseline.CORRUPT, choices=list(Baseline))
    parser.add_argument("--errors", type=Errors, nargs="+", default=[Errors.KEPT], choices=list(Errors))
    parser.add_argument("--no-edges", dest="edges", action="store_false")
    parser.add_argument("--number", type=int, default=24, help="prompts of each half")
    parser.add_argument("--top", type=int, default=10, help="latents of each site between which edges are cut")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3, help="compiled circuits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    use_fast_products()
    results = json.loads(chosen.results.read_text(encoding="utf-8")) if chosen.results.exists() else {}
    for part in chosen.parts:
        if part == "compiled":
            results[part] = compiled(chosen.seeds)
        elif part == "organism":
            results["The trained organism"] = organism(chosen)
        elif part not in ("agreement", "capitals"):
            parser.error(f"there is no part {part}")
        else:
            if not chosen.saes or (part == "agreement" and not chosen.data):
                parser.error(f"{part} needs --saes" + (" and --data" if part == "agreement" else ""))
            model = SubjectModel.load(chosen.model, device="cpu")
            dictionaries = load_dictionaries(Source("", tuple(chosen.saes), ""), "cpu", model)
            if part == "agreement":
                prompts = agreement(model, chosen.data / f"{chosen.pairs}_train.json")
                name = f"Subject-verb agreement, {chosen.pairs} ({chosen.baseline.value})"
            else:
                prompts, name = capitals(model, chosen.seed), "Capitals with a user's wrong suggestion"
            results[name] = measure(model, dictionaries, prompts, chosen)
        chosen.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if chosen.docs:
        chosen.docs.write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
