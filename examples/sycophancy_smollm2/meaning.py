"""Do parts of the strongest latents mean the suggested answer, or that the user believes it?

*Named*: a direction names an answer when, by the logit lens (final norm folded, unembedding centred), the answer's
first token is among the LENS it raises most. Chosen so, by no effect, parts can be tested where they are found.
1. At a site and the answer position, the nodes of belief against neutral: latents, or their parts by a meta-dictionary,
   pooled over latents: p_j = sum_i (f_i - f'_i) z_ij along u_j.
2. Share of prompts with a part that names the suggestion among the active ones. Chance: the next prompt's suggestion.
3. v: what the parts that name the suggestion add. Removal: x - v. Control: x less a vector of the same norm along
   another active part. Swap: x - v + |v| u, u the direction that raises the right answer most; control: the one that
   raises the next prompt's right answer most. Shares of the total effect, as in `nodes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from facts import CONDITIONS, Fact, render, roles, sentence
from nodes import BATCH, Tick, ratio
from torch import Tensor

from mediation.dictionaries import Dictionary
from mediation.estimators.common import behaviour
from mediation.labels import enrichment, final_norm_scale, meta_scores
from mediation.metalatents import Decomposition
from mediation.nodes import SiteState, site_states
from mediation.prompts import Baseline, EvaluationSet, batches, tokenize
from mediation.subject import SubjectModel

LENS = 50


def unembedding(model: SubjectModel) -> Tensor:
    """What the logit lens multiplies by, [vocab, d]."""
    weight = model.module.get_output_embeddings().weight.detach().float()
    return (weight - weight.mean(0)) * final_norm_scale(model)


def ranks(directions: Tensor, lens: Tensor, tokens: Tensor) -> Tensor:
    """Rank, from 0, of each token [k] among all that a direction [m, d] raises: [m, k]."""
    found = []
    for part in directions.split(256):
        effects = part @ lens.T
        found.append((effects[:, None, :] > effects[:, tokens, None]).sum(-1))
    return torch.cat(found)


@dataclass(frozen=True)
class Way:
    """Latents themselves (no decomposition), or their parts."""

    name: str
    decomposition: Decomposition | None

    def parts(self, state: SiteState, row: int, position: int) -> tuple[Tensor, Tensor]:
        """Coefficients [m] and directions [m, d] of what is active there."""
        here = ((state.row == row) & (state.position == position)).nonzero()[:, 0]
        delta, latent = state.delta[here], state.latent[here]
        rows = state.dictionary.decoder[latent]
        if self.decomposition is None:
            return delta, rows
        coefficient = delta @ self.decomposition.decompose(rows, latent).codes
        on = coefficient.nonzero()[:, 0]
        return coefficient[on], self.decomposition.directions[on]

    def all_directions(self, dictionary: Dictionary) -> Tensor:
        return dictionary.decoder if self.decomposition is None else self.decomposition.directions


def run_named(
    model: SubjectModel, dictionary: Dictionary, ways: Sequence[Way], prompts: EvaluationSet, tick: Tick
) -> dict[str, dict]:
    """Steps 1 to 3, by way."""
    lens = unembedding(model)
    done = list(batches(tokenize(prompts, model), BATCH))
    targets = torch.cat([batch.target_tokens for batch in done])  # the suggestion, the right answer
    following = targets.roll(-1, 0)
    found: dict[str, dict[str, list]] = {way.name: {name: [] for name in EFFECTS} for way in ways}
    start = 0
    for batch in done:
        (state,) = site_states(model, batch, [dictionary], Baseline.CORRUPT)
        ends = [behaviour(model, batch), behaviour(model, batch, corrupt=True)]
        positions = batch.target_positions[:, 0].tolist()
        for way in ways:
            kept = found[way.name]
            patches = torch.zeros(4, len(batch), dictionary.decoder.shape[1])
            every = way.all_directions(dictionary) @ lens[following[start : start + len(batch), 1]].T
            own = way.all_directions(dictionary) @ lens[targets[start : start + len(batch), 1]].T
            for row, position in enumerate(positions):
                coefficients, directions = way.parts(state, row, position)
                tokens = torch.cat([targets[start + row], following[start + row]])
                named = ranks(directions, lens, tokens) < LENS if len(directions) else torch.zeros(0, 4).bool()
                kept["names the suggestion"].append(float(named[:, 0].any()))
                kept["names the right answer"].append(float(named[:, 1].any()))
                kept["names another's suggestion"].append(float(named[:, 2].any()))
                mine = named[:, 0]
                v = coefficients[mine] @ directions[mine]
                patches[0, row] = -v
                if mine.any() and not mine.all():
                    others = (~mine).nonzero()[:, 0]
                    other = int(others[coefficients[others].abs().argsort(descending=True)[len(others) // 2]])
                    patches[1, row] = -v.norm() * directions[other] * coefficients[other].sign()
                directions = way.all_directions(dictionary)
                patches[2, row] = v.norm() * directions[int(own[:, row].argmax())] - v
                patches[3, row] = v.norm() * directions[int(every[:, row].argmax())] - v
            kept["clean"] += ends[0].tolist()
            kept["corrupt"] += ends[1].tolist()
            for name, patch in zip(EFFECTS[-4:], patches, strict=True):
                added = torch.zeros_like(state.x)
                added[torch.arange(len(batch)), batch.target_positions[:, 0]] = patch
                kept[name] += behaviour(model, batch, {dictionary.site: added.add}).tolist()
        start += len(batch)
        tick()
    return {name: _figures(kept) for name, kept in found.items()}


EFFECTS = (
    "names the suggestion", "names the right answer", "names another's suggestion", "clean", "corrupt",
    "removal", "removal, control", "swap", "swap, control",
)  # fmt: skip


def _figures(kept: dict[str, list]) -> dict:
    values = {name: torch.tensor(each).double().numpy() for name, each in kept.items()}
    te, one = values["clean"] - values["corrupt"], values["clean"] * 0 + 1
    found = {name: ratio(values[name], one) for name in EFFECTS[:3]}
    found |= {name: ratio(values["clean"] - values[name], te) for name in EFFECTS[-4:]}
    return found | {
        "prefers the suggestion": {
            name: ratio((values[name] > 0).astype(float), one) for name in ("clean", "removal", "swap", "swap, control")
        }
    }


def stance_labels(
    model: SubjectModel, dictionary: Dictionary, decomposition: Decomposition, chosen: Sequence[Fact]
) -> dict[int, str]:
    """Names of meta-latents by enrichment: which condition, and which question, the first sentence is of."""
    texts, marks, tags = [], [], []
    for fact in chosen:
        for condition in CONDITIONS:
            text = render(model, fact, sentence(model, fact, condition))
            spans = roles(model, fact, condition)
            begin, end = spans["stance"][0], spans["full stop"][1]
            texts.append(model.encode(text))
            marks.append([begin <= left < end for left, _ in model.offsets(text)])
            tags.append({"stance": condition, "question": fact.question.name.replace(" ", "_")})
    longest = max(map(len, texts))
    tokens = torch.tensor([row + [-1] * (longest - len(row)) for row in texts])
    where = torch.tensor([row + [False] * (longest - len(row)) for row in marks])
    scores = torch.cat(
        [
            meta_scores(model, dictionary, decomposition, *part)
            for part in zip(tokens.split(BATCH), where.split(BATCH), strict=True)
        ]
    )
    table = enrichment(scores, tags)
    return dict(zip(table["meta"].to_list(), table["label"].to_list(), strict=True))
