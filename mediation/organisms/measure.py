"""What each stage of an organism achieved, measured apart, so that a failure can be placed.

1. Behaviour: recall for everybody; opinions of people trained on and of people held out.
2. Decodability: least squares from x (last name, after block 0) to the values, fitted on the label people, tested
   on the held-out.
3. Interchange: put the twin's x in the person's place, at that token and site alone. The twin differs in one
   attribute, so replies that depend on it must follow where twins disagree, and all others must stay.
4. Dictionary: does each person have a latent of their own, and is every latent along an attribute silent?
5. Meta-SAE: cosine of each value's true direction (mean of its people minus mean of all) to the nearest meta-latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mediation.dictionaries import Dictionary
from mediation.metalatents import MetaDictionary
from mediation.organisms.language import LAST_NAME, Questions, accuracy
from mediation.organisms.world import World, opinion_rows, recall_rows

CARRIER = 0.7  # cosine from which a latent counts as being for a value


@torch.no_grad()
def name_activations(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> Tensor:
    """x [people, d_model] at the last name after block 0; the same in every prompt, since the name comes first."""
    tokens = torch.tensor([tokenizer(person.name)["input_ids"] for person in world.people])
    return model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states[1][:, LAST_NAME]


def behaviour(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    def right(rows: list[dict[str, Any]]) -> float:
        return accuracy(model, Questions(rows, world, tokenizer))

    return {
        "recall_accuracy": right(recall_rows(world)),
        "opinion_accuracy_train": right(opinion_rows(world, world.label_people, seed=world.seed)),
        "opinion_accuracy_held_out": right(opinion_rows(world, world.held_out, seed=world.seed)),
    }


def decodability(x: Tensor, world: World) -> dict[str, Any]:
    """Step 2: share of held-out people whose value a linear map names; the mean and each attribute."""
    known, held = torch.tensor(world.label_people), torch.tensor(world.held_out)
    columns = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    shares = {}
    for name, truth in _values(world).items():
        map_ = torch.linalg.lstsq(columns[known], one_hot(truth[known]).double()).solution
        shares[name] = ((columns[held] @ map_).argmax(1) == truth[held]).float().mean().item()
    return {"decodability": sum(shares.values()) / len(shares), "decodability_by_attribute": shares}


@torch.no_grad()
def interchange(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Step 3: share of replies that are the twin's when twins disagree, and that stay when they agree."""
    rows = opinion_rows(world, world.held_out, seed=world.seed)
    questions = Questions(rows, world, tokenizer)
    twin = {a: b for pair in world.twins for a, b in (pair, pair[::-1])}
    claims = {claim.words: claim for claim in world.claims}
    wanted = [claims[row["group"]].reply(world.people[twin[row["person"]]]) for row in rows]
    differs = torch.tensor([answer != row["answer"] for answer, row in zip(wanted, rows, strict=True)])
    target = torch.tensor([tokenizer.convert_tokens_to_ids(answer.strip()) for answer in wanted])
    other = name_activations(model, tokenizer, world)[torch.tensor([twin[row["person"]] for row in rows])]

    def exchange(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, LAST_NAME] = other
        return output

    handle = model.model.layers[0].register_forward_hook(exchange)
    try:
        hidden = model.model(questions.tokens, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    ends = hidden[torch.arange(len(rows)), questions.last]
    right = (model.lm_head(ends).argmax(-1) == target).float()
    return {
        "interchange_follows": right[differs].mean().item() if differs.any() else None,
        "interchange_stays": right[~differs].mean().item(),
    }


def person_latents(dictionary: Dictionary, x: Tensor, world: World) -> dict[str, Any]:
    """Step 4."""
    split = dictionary.split(x)
    on = split.latents != 0
    strongest = split.latents.argmax(dim=1)
    carriers = (dictionary.decoder @ value_directions(x, world).T).max(dim=1).values >= CARRIER
    return {
        "variance_explained_at_names": 1 - (split.error.square().sum() / (x - x.mean(0)).square().sum()).item(),
        "latents_per_name": on.sum(dim=1).float().mean().item(),
        "people_with_own_latent": (on.sum(dim=0)[strongest] == 1).float().mean().item(),
        "names_with_attribute_latent_on": on[:, carriers].any(dim=1).float().mean().item(),
    }


def meta_latents(meta: MetaDictionary, rows: Tensor, x: Tensor, world: World) -> dict[str, Any]:
    """Step 5."""
    nearest = (value_directions(x, world) @ meta.directions.T).max(dim=1).values
    return {
        "meta_variance_explained": meta.variance_explained(rows),
        "meta_cosine_to_values": nearest.mean().item(),
        "meta_cosine_to_values_least": nearest.min().item(),
    }


def value_directions(x: Tensor, world: World) -> Tensor:
    """Unit directions [values, d_model] of all attributes' values: mean of those who have it minus mean of all."""
    means = [x[truth == value].mean(0) for truth in _values(world).values() for value in range(int(truth.max()) + 1)]
    return normalize(torch.stack(means) - x.mean(0), dim=1)


def _values(world: World) -> dict[str, Tensor]:
    return {
        name: torch.tensor([values.index(person.facts[name]) for person in world.people])
        for name, values in world.attributes.items()
    }
