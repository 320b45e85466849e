"""Scores of one organism: which fact was used, named and proven, where it is known.

1. Names: a part is named by the attribute=value it is most enriched for, over tokens of subjects trained on
   (mediation.labels). Whoever is asked about below is held out.
2. Subjects are divided in halves: prompts of the one nominate, prompts of the other test (mediation.facts).
3. Naming, over all prompts. `attribute`: the strongest part by Shapley value is named by an attribute of the claim's
   rule. `value`: the strongest part that the subject has more of than its partner is named by the subject's own value.
   `rank`: 1 / place of the first part named by such an attribute. `abstained`: the strongest part has no name. With two
   facts, `both`: the first two kinds are the rule's. `claims`: the same for claims, by the kind that is the strongest
   in most of a claim's prompts.
4. Flags, over evaluation prompts: flagged at all (`flagged`), for an attribute of the rule (`right`), for another
   (`wrong`). Of those flagged for the rule's: share of the total effect that the removal takes (`removal`); does the
   reply turn when the partner's fact stands in (`swap_follows`); the same patch under other claims about the same
   subject, whose rules do not name the attribute: does the reply stay (`stays`).
5. `evidence`, for the ROC: for every evaluation prompt and attribute, how strongly it speaks for hidden use: hidden
   share times Shapley value, in the direction of the total effect and relative to max(|m|, |total effect|), 0 where a
   carrier is on; and whether the fact is used.
6. Switch: pairs of prompts of one subject whose claims turn on different attributes: the strongest own part differs and
   both are named right (`parts_switch`); the strongest own latent is the same (`latent_stays`).
7. Other parts, on `COMPARED` subjects' prompts: latents, matching pursuit over own rows, the nearest row, a meta-SAE
   trained on rows each turned at random, the meta-dictionary's own directions turned, a sparse meta-SAE, and, knowing
   the facts, least squares of rows on them (upper bound). Their weak names count.
8. `names` once more with readings (mediation.readings) in place of the meta-dictionary: steps 1 to 6 on parts learned
   from gradients of the replies at the site, claim by claim, on subjects trained on; and, as a control, with these
   turned at random within the space that is read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mediation.dictionaries import Dictionary
from mediation.estimators.common import behaviour_gradient
from mediation.facts import FactSettings, PromptSplit, find_hidden_facts, kind_of, split_prompt
from mediation.labels import LEAST_SCORE, enrichment
from mediation.metalatents import Decomposition, MatchingPursuit, MetaDictionary, rotated
from mediation.nodes import site_states
from mediation.organisms.score import Latents
from mediation.parts import Surgeon, pooled_parts
from mediation.planted.organisms import Activations, token_means
from mediation.planted.worlds import NO, YES, World
from mediation.prompts import Baseline, DiscoverySet, EvaluationSet, PromptSet, batches, collate, tokenize
from mediation.readings import Readings, rotated_readings
from mediation.subject import SubjectModel

READ_AT_ONCE = 256  # prompts
COMPARED = 4  # subjects whose prompts baselines are scored on
OTHER_CLAIMS = 2  # prompts under which each flagged fact's patch is tried
SPARSE_STEPS = 1000

Tick = Callable[[], None]


@dataclass
class Subject:
    """An organism as the method sees it, with what names are made from."""

    model: SubjectModel
    world: World
    dictionary: Dictionary
    meta: Decomposition
    found: Activations


class Turned(Decomposition):
    """A meta-dictionary whose directions are turned as a whole: its codes, along other directions."""

    def __init__(self, base: MetaDictionary, seed: int) -> None:
        noise = torch.randn(base.d_model, base.d_model, generator=torch.Generator().manual_seed(seed))
        self.base, self.bias = base, base.bias
        self.turn = torch.linalg.qr(noise).Q
        self.directions = base.directions @ self.turn

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        return self.base.codes((rows - self.bias) @ self.turn.T + self.bias)


class Known(Decomposition):
    """Least squares of rows on the facts of whose token they are: what a probe with the answers would find.

    Rows of nobody's have no parts.
    """

    def __init__(self, rows: Tensor, members: Tensor) -> None:
        """members [rows, values]: which facts each row has."""
        self.members = members
        inside = members[members.any(1)]
        centred = inside - inside.mean(0)
        mean = rows[members.any(1)].mean(0)
        effects = torch.linalg.pinv(centred, rtol=1e-3) @ (rows[members.any(1)] - mean)
        self.size = effects.norm(dim=1)
        self.directions = normalize(effects, dim=1)
        self.bias = mean - inside.mean(0) @ effects

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        assert own is not None  # rows are the dictionary's own
        return self.members[own] * self.size


def labels_of(subject: Subject, decomposition: Decomposition, least_score: float) -> dict[int, str]:
    """Step 1."""
    world, facts = subject.world, list(subject.world.facts.items())
    means, tokens = token_means(subject.found)
    known = {holder for each in world.trained for holder in world.holders(each)}
    chosen = [i for i, token in enumerate(tokens.tolist()) if facts[token][0] in known]
    latents = subject.dictionary.encode(means[chosen])
    used = (latents != 0).any(dim=0).nonzero().squeeze(1)
    codes = decomposition.decompose(subject.dictionary.decoder[used], used).codes
    table = enrichment(latents[:, used] @ codes, [facts[tokens[i]][1] for i in chosen], least_score=least_score)
    return dict(table.select("meta", "label").iter_rows())


def readings(subject: Subject, *, turned: bool = False) -> Readings:
    """Step 8: parts by what claims read of subjects trained on; as many as there are values. No label enters.

    `turned`: other axes of the same reading space, at random.
    """
    world, gradients = subject.world, {}
    answers = {"answer": YES, "wrong_answer": NO}
    for claim in world.claims:
        asked = PromptSet.from_rows({"clean": world.text(each, claim), **answers} for each in world.trained)
        read = []
        for batch in batches(tokenize(asked, subject.model, baseline=Baseline.ZERO), READ_AT_ONCE):
            _, (gradient,) = behaviour_gradient(subject.model, batch, [subject.dictionary.site])
            read.append(gradient[:, list(world.positions)].flatten(0, 1))
        gradients[claim.word] = torch.cat(read)
    width = sum(map(len, world.attributes.values()))
    if turned:
        return rotated_readings(gradients, width, torch.Generator().manual_seed(world.seed))
    return Readings.learn(gradients, width=width, seed=world.seed)


def score(
    subject: Subject, rows: list[dict[str, Any]], settings: FactSettings, tick: Tick, *, compare: bool, calibrate: bool
) -> dict[str, Any]:
    """Steps 2 to 6; 7 where `compare`. `calibrate`: also p of every attribute under every claim, without nomination,
    and how far its removals move the behaviour, as a share of it.
    """
    model, world = subject.model, subject.world
    labels = labels_of(subject, subject.meta, LEAST_SCORE)
    people = sorted({row["subject"] for row in rows})
    nominating = set(people[::2])
    sides = [[row for row in rows if (row["subject"] in nominating) == side] for side in (True, False)]
    asked = [PromptSet.from_rows(side) for side in sides]
    halves = (
        (DiscoverySet(list(asked[0])), tokenize(asked[0], model)),
        (EvaluationSet(list(asked[1])), tokenize(asked[1], model)),
    )

    def find(hypotheses: dict[str, list[str]] | None) -> pl.DataFrame:
        return find_hidden_facts(
            model, subject.dictionary, subject.meta, *halves, Baseline.CORRUPT, settings, labels=labels,
            hypotheses=hypotheses, progress=lambda _: tick(),
        )  # fmt: skip

    table = find(None)
    truth = {row["id"]: row for row in rows}
    tested = table.drop_nulls("removal")
    result: dict[str, Any] = {
        "prompts": len(rows), "evaluation": len(asked[1]), "subjects": len(people), "labels": len(labels),
        "chance": float(np.mean([len(row["attributes"]) for row in rows])) / len(world.attributes),
        "naming": _naming(table, truth),
        "flags": _flags(subject, table, truth),
        "evidence": _evidence(table, truth, world),
        "tests": tested.unique(["group", "kind"]).sort("group", "kind").select("group", "kind", "p", "q").to_dicts(),
    }  # fmt: skip
    if compare:
        result |= _compare(subject, rows, people[:COMPARED], table, settings, tick)
    if calibrate:
        groups = sorted({row["group"] for row in rows})
        every = find({group: list(world.attributes) for group in groups}).drop_nulls("removal")
        size = pl.col("removal").abs().mean() / pl.col("behaviour").abs().mean()
        tests = every.group_by("group", "kind").agg(pl.col("p").first(), size.alias("size")).sort("group", "kind")
        result |= {"p": tests["p"].to_list(), "size": tests["size"].to_list()}
    return result


def _naming(table: pl.DataFrame, truth: dict[str, dict[str, Any]]) -> dict[str, float]:
    ranked = table.drop_nulls("rank").sort("prompt", "rank").partition_by("prompt", as_dict=True)
    hits: dict[str, list[float]] = defaultdict(list)
    tops: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for name, row in truth.items():
        mine = ranked.get((name,), table.clear())
        kinds = mine["kind"].to_list()
        own = mine.filter("present")["label"].to_list()
        places = [place for place, kind in enumerate(kinds, 1) if kind in row["attributes"]]
        hits["attribute"].append(bool(kinds) and kinds[0] in row["attributes"])
        hits["value"].append(bool(own) and own[0] in row["values"])
        hits["rank"].append(1 / places[0] if places else 0.0)
        hits["abstained"].append(not kinds or kinds[0] == mine["label"][0])
        if len(row["attributes"]) == 2:
            hits["both"].append(set(list(dict.fromkeys(kinds))[:2]) == set(row["attributes"]))
        tops[row["group"]].append((kinds[0] if kinds else "", row["attributes"]))
    claims = [Counter(kind for kind, _ in each).most_common(1)[0][0] in each[0][1] for each in tops.values()]
    return {name: float(np.mean(each)) for name, each in (hits | {"claims": claims}).items()}


def _flags(subject: Subject, table: pl.DataFrame, truth: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Step 4."""
    prompts = table.filter(pl.col("role") == "evaluation")["prompt"].unique().to_list()
    flagged = table.filter("flagged").with_columns(
        used=pl.struct("prompt", "kind").map_elements(
            lambda it: it["kind"] in truth[it["prompt"]]["attributes"], return_dtype=pl.Boolean
        )
    )
    used, wrong = flagged.filter("used"), flagged.filter(~pl.col("used"))
    scale = used["total_effect"].abs()
    stays = [stay for row in used.iter_rows(named=True) for stay in _stays(subject, row, truth)]
    return {
        "prompts": len(prompts),
        "flagged": flagged["prompt"].n_unique() / max(len(prompts), 1),
        "right": used["prompt"].n_unique() / max(len(prompts), 1),
        "wrong": wrong["prompt"].n_unique() / max(len(prompts), 1),
        "of_used": len(used),
        "removal": _mean((used["removal"] * used["total_effect"].sign() / scale).to_list()),
        "swap_follows": _mean(used["swap_follows"].to_list()),
        "stays": _mean(stays),
        "tried_elsewhere": len(stays),
    }


def _stays(subject: Subject, row: dict[str, Any], truth: dict[str, dict[str, Any]]) -> list[bool]:
    """Does each of some other replies about the subject stay when the fact is exchanged as in the swap of `row`?"""
    own, kind = truth[row["prompt"]], row["kind"]
    others = [
        each for each in truth.values()
        if each["subject"] == own["subject"] and each["group"] != own["group"] and kind not in each["attributes"]
    ][:OTHER_CLAIMS]  # fmt: skip
    if not others:
        return []
    model, stays = subject.model, []
    examples = tokenize(PromptSet.from_rows([own, *others]), model)
    batches = [collate([example]).to(model.device) for example in examples]
    states = [site_states(model, batch, [subject.dictionary], Baseline.CORRUPT)[0] for batch in batches]
    pooled = pooled_parts(states[0], subject.meta, FactSettings().carrier_cosine)
    patch = pooled.hidden(row["meta"])
    if row["counterpart"] is not None:
        patch = patch + pooled.hidden(row["counterpart"])
    at = torch.zeros(patch.shape[1], 1)
    at[list(subject.world.positions)] = 1.0
    for batch, state in zip(batches[1:], states[1:], strict=True):
        surgeon = Surgeon(model, batch, state, 8)
        left = float(surgeon.clean - surgeon.effect((patch * at)[None])[0])
        stays.append(left * float(surgeon.clean) > 0)
    return stays


def _evidence(table: pl.DataFrame, truth: dict[str, dict[str, Any]], world: World) -> list[list[float]]:
    """Step 5: [score, used] of every evaluation prompt and attribute."""
    scale = pl.max_horizontal(pl.col("behaviour").abs(), pl.col("total_effect").abs())
    support = pl.col("shapley") * pl.col("total_effect").sign() / scale * pl.col("hidden_share")
    best = (
        table.filter(pl.col("role") == "evaluation")
        .with_columns(pl.when("carriers_silent").then(support).otherwise(0.0).alias("support"))
        .drop_nulls("support").group_by("prompt", "kind").agg(pl.col("support").max())
    )  # fmt: skip
    scores = {(prompt, kind): value for prompt, kind, value in best.iter_rows()}
    prompts = table.filter(pl.col("role") == "evaluation")["prompt"].unique().sort()
    return [
        [float(f"{scores.get((prompt, name), 0.0):.3g}"), float(name in truth[prompt]["attributes"])]
        for prompt in prompts
        for name in world.attributes
    ]


def _compare(
    subject: Subject,
    rows: list[dict[str, Any]],
    people: list[tuple[str, ...]],
    table: pl.DataFrame,
    settings: FactSettings,
    tick: Tick,
) -> dict[str, Any]:
    """Steps 6 and 7."""
    mine = [row for row in rows if row["subject"] in people]
    truth = {row["id"]: row for row in mine}
    dictionary, world, seed = subject.dictionary, subject.world, subject.world.seed
    decoder, n = dictionary.decoder, len(world.attributes)
    assert isinstance(subject.meta, MetaDictionary)
    used = (dictionary.encode(subject.found.x) != 0).any(dim=0)
    own = decoder[used]
    others: dict[str, Decomposition] = {
        "top latent": Latents(decoder),
        "matching pursuit": MatchingPursuit(decoder, k=n),
        "nearest row": MatchingPursuit(decoder, k=1),
        "meta-SAE of turned rows": MetaDictionary.train(
            rotated(own, seed), width=subject.meta.d_meta, k=n, steps=SPARSE_STEPS, restarts=1, seed=seed
        ),
        "directions turned": Turned(subject.meta, seed),
        "sparse meta-SAE": MetaDictionary.train(
            own, width=round(1.5 * subject.meta.d_meta), k=n + 1, steps=SPARSE_STEPS, restarts=1, seed=seed
        ),
        "facts known (bound)": Known(decoder, _members(subject)),
    }
    chosen = pl.Series(list(truth))
    named = {"meta-latents": _naming(table.filter(pl.col("prompt").is_in(chosen.implode())), truth)}
    tops: dict[str, int | None] = {}
    for name, decomposition in others.items():
        labels = labels_of(subject, decomposition, 0.0)
        splits = {}
        for row in mine:
            (example,) = tokenize(PromptSet.from_rows([row]), subject.model)
            batch = collate([example]).to(subject.model.device)
            split = split_prompt(subject.model, batch, dictionary, decomposition, Baseline.CORRUPT, settings)
            splits[row["id"]] = split
            tick()
        named[name] = _naming(_ranks(splits, labels), truth)
        if name == "top latent":
            tops = {prompt: split.top_present for prompt, split in splits.items()}
    return {"compared_prompts": len(mine), "compared": named, "switch": _switch(table, truth, tops)}


def _members(subject: Subject) -> Tensor:
    """Which facts each latent's token has, [latents, values]: a latent is of the token it is strongest on."""
    world, facts = subject.world, list(subject.world.facts.values())
    values = [value for each in world.attributes.values() for value in each]
    means, tokens = token_means(subject.found)
    latents = subject.dictionary.encode(means)
    member = torch.tensor([[float(v in facts[t].values()) for v in values] for t in tokens.tolist()])
    return member[latents.argmax(dim=0)] * (latents > 0).any(dim=0)[:, None]


def _ranks(splits: dict[str, PromptSplit], labels: dict[int, str]) -> pl.DataFrame:
    """The columns of `find_hidden_facts` that naming needs."""
    found = [
        {
            "prompt": prompt, "rank": rank, "meta": split.metas[index],
            "label": (label := labels.get(split.metas[index], f"part {split.metas[index]}")),
            "kind": kind_of(label), "present": bool(split.present[split.metas[index]]),
        }
        for prompt, split in splits.items()
        for rank, index in enumerate(split.ranking, 1)
    ]  # fmt: skip
    schema = {"prompt": pl.String, "rank": pl.Int64, "meta": pl.Int64, "label": pl.String, "kind": pl.String,
              "present": pl.Boolean}  # fmt: skip
    return pl.DataFrame(found, schema=schema, orient="row")


def _switch(table: pl.DataFrame, truth: dict[str, dict[str, Any]], latents: dict[str, int | None]) -> dict[str, Any]:
    """Step 6."""
    own = table.drop_nulls("rank").filter("present").sort("rank").unique("prompt", keep="first", maintain_order=True)
    parts = {prompt: (meta, label) for prompt, meta, label in own.select("prompt", "meta", "label").iter_rows()}
    switched, stayed = [], []
    for one, two in combinations(truth.values(), 2):
        if one["subject"] != two["subject"] or one["attributes"] == two["attributes"]:
            continue
        a, b = parts.get(one["id"]), parts.get(two["id"])
        right = a is not None and b is not None and a[1] in one["values"] and b[1] in two["values"]
        switched.append(right and a != b)
        stayed.append(latents[one["id"]] is not None and latents[one["id"]] == latents[two["id"]])
    return {"pairs": len(switched), "parts_switch": _mean(switched), "latent_stays": _mean(stayed)}


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None
