"""Circuits run in the model, against the model itself, a brute-force run of one node at a time, and closed forms."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits.ablation import EMBEDDING, Cut, Errors, Nodes, error_nodes, run_edges, run_nodes
from circuits.calibration import exact_edges
from circuits.edges import EMBEDDING_SITE, REST, Targets, edges
from mediation.dictionaries import Coordinates, Dictionary
from mediation.estimators.common import behaviour
from mediation.frozen import Frozen
from mediation.heads import Heads
from mediation.nodes import MeanState, mean_state, site_states
from mediation.prompts import Baseline, Batch
from mediation.sites import Site
from mediation.subject import SubjectModel
from tests.setups import batch_of, random_dictionary, tiny

MIX = (
    "blocks.0.hook_attn_out",
    "blocks.0.hook_mlp_out",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_mlp_out",
    "blocks.2.hook_attn_out",
)
TRANSCODED = {MIX[3]: "blocks.1.mlp.hook_in"}
PLACES = 3
D_SAE = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory: pytest.TempPathFactory) -> list[Dictionary]:
    folder = tmp_path_factory.mktemp("dictionaries")
    return [
        random_dictionary(folder / name, name, d_sae=D_SAE, seed=i, reads=TRANSCODED.get(name))
        for i, name in enumerate(MIX)
    ]


def places_of(batch: Batch) -> Tensor:
    """Every third position is one place."""
    return (torch.arange(batch.clean.shape[1]) % PLACES).expand_as(batch.clean).contiguous()


def cut_of(model: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline, batch: Batch | None = None) -> Cut:
    batch = batch or batch_of(3)
    means: dict[str, MeanState] | None = None
    if baseline is Baseline.MEAN:
        means = {each.name: mean_state(model, [batch], each) for each in dictionaries}
    embedding = torch.linspace(-1, 1, model.d_model)
    places = places_of(batch)
    return Cut.of(model, batch, dictionaries, baseline, places, means=means, mean_embedding=embedding)


def every_node(sites: int = len(MIX), d_sae: int = D_SAE) -> Nodes:
    """All places of all latents of all sites, after the embeddings."""
    site, place, latent = torch.meshgrid(*map(torch.arange, (sites, PLACES, d_sae)), indexing="ij")
    embedded = torch.arange(PLACES)
    return Nodes(
        torch.cat([torch.full_like(embedded, EMBEDDING), site.flatten()]),
        torch.cat([embedded, place.flatten()]),
        torch.cat([torch.full_like(embedded, REST), latent.flatten()]),
    )


def some(shape: tuple[int, ...], share: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


# Brute force: one row, one node and one forward at a time ------------------------------------------------------


def value_of(dictionary: Dictionary, index: int, cut: Cut, row: int, position: int, read: Tensor) -> Tensor:
    """Changes [d_sae] of a dictionary's latents where it reads `read` [d]."""
    latents = dictionary.encode(read)
    other = cut.references[index]
    if other is None:
        return latents
    if isinstance(other, MeanState):
        return latents - other.latents
    return latents - dictionary.encode(other.read[row, position])


def held_forward(cut: Cut, row: int, held: dict[Site, Tensor], read: list[Site]) -> dict[Site, Tensor]:
    batch = cut.batch.rows(torch.tensor([row]))
    edits = {site: partial(lambda value, _: value, value[None]) for site, value in held.items()}
    # a site that is read is not edited, and those after it do not run
    edits = {site: edit for site, edit in edits.items() if site not in read}
    return cut.model.forward(batch.clean, batch.mask, read=read, edit=edits, logits=False).sites


def brute_edges(cut: Cut, nodes: Nodes, kept: Tensor, errors: Tensor) -> Tensor:
    found = []
    for row in range(len(cut.batch)):
        change = {}  # (node, position) -> vector it adds to its site
        rest: dict[int, Tensor] = {}  # site -> [T, d]
        place = cut.places[row]

        def held_for(wanted: Tensor, until: int, row: int = row, change: dict = change, rest: dict = rest) -> dict:
            """Every site before number `until` at its baseline and the wanted sources on top."""
            held = {}
            for number, sources in enumerate(cut.sources):
                index = number - cut.first
                if index >= until:
                    continue
                value = sources.base[row].clone()
                for (node, position), vector in change.items():
                    if wanted[node] and int(nodes.site[node]) == index:
                        value[position] += vector
                held[sources.site] = value + rest.get(index, 0.0)
            return held

        for node in (nodes.site == EMBEDDING).nonzero()[:, 0].tolist():
            for position in (place == nodes.place[node]).nonzero()[:, 0].tolist():
                change[node, position] = cut.sources[0].rest[row, position]
        for index, dictionary in enumerate(cut.dictionaries):
            read = [dictionary.reads, dictionary.site]
            free = cut.sources[cut.first + index].free[row]
            new = {}
            for node in (nodes.site == index).nonzero()[:, 0].tolist():
                values = held_forward(cut, row, held_for(kept[node], index), read)[dictionary.reads][0]
                for position in ((place == nodes.place[node]) & free).nonzero()[:, 0].tolist():
                    moved = value_of(dictionary, index, cut, row, position, values[position])
                    latent = int(nodes.latent[node])
                    new[node, position] = moved[latent] * dictionary.decoder[latent]
            # the error node reads everything whose change goes anywhere
            wanted = kept.any(dim=0)
            values = held_forward(cut, row, held_for(wanted, index), read)
            rest[index] = torch.zeros_like(values[dictionary.site][0])
            for position in free.nonzero()[:, 0].tolist():
                moved = value_of(dictionary, index, cut, row, position, values[dictionary.reads][0, position])
                whole = values[dictionary.site][0, position] - cut.sources[cut.first + index].base[row, position]
                if errors[index, place[position]]:
                    rest[index][position] = whole - moved @ dictionary.decoder
            change |= new
        batch = cut.batch.rows(torch.tensor([row]))
        last = {site: value[None] for site, value in held_for(kept[-1], len(cut.dictionaries)).items()}
        found.append(behaviour(cut.model, batch, {s: partial(lambda v, _: v, v) for s, v in last.items()}))
    return torch.cat(found)


@pytest.mark.parametrize("baseline", list(Baseline))
def test_edge_circuits_are_those_of_one_node_at_a_time(
    model: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline
) -> None:
    cut = cut_of(model, dictionaries[:4], baseline)
    nodes = every_node(4)
    nodes = nodes.take(some((len(nodes),), 0.4, 1) | (nodes.site == EMBEDDING))
    for seed, errors in ((0, some((4, PLACES), 0.5, 7)), (1, torch.zeros(4, PLACES, dtype=torch.bool))):
        kept = some((len(nodes) + 1, len(nodes)), 0.5, seed)
        expected = brute_edges(cut, nodes, kept, errors)
        assert torch.allclose(run_edges(cut, nodes, kept, errors, chunk=5), expected, atol=2e-4)
        assert (expected - behaviour(model, cut.batch)).abs().min() > 1e-2


# Identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", list(Baseline))
def test_everything_kept_is_the_clean_run(
    model: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline
) -> None:
    cut, nodes = cut_of(model, dictionaries, baseline), every_node()
    clean = behaviour(model, cut.batch)
    masks = nodes.masks(PLACES, [D_SAE] * len(MIX))
    errors = error_nodes(Errors.KEPT, masks)
    assert torch.allclose(run_nodes(cut, masks, errors), clean, atol=2e-4)
    kept = torch.ones(len(nodes) + 1, len(nodes), dtype=torch.bool)
    assert torch.allclose(run_edges(cut, nodes, kept, errors), clean, atol=2e-4)


@pytest.mark.parametrize("baseline", list(Baseline))
def test_nothing_kept_is_the_baseline(model: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline) -> None:
    cut, nodes = cut_of(model, dictionaries, baseline), every_node()
    masks = [torch.zeros(PLACES, D_SAE, dtype=torch.bool) for _ in MIX]
    errors = error_nodes(Errors.REMOVED, masks)
    base = {each.site: partial(lambda value, _: value, each.base) for each in cut.sources}
    expected = behaviour(model, cut.batch, base)
    assert (expected - behaviour(model, cut.batch)).abs().max() > 0.1
    kept = torch.zeros(len(nodes) + 1, len(nodes), dtype=torch.bool)
    assert torch.allclose(run_edges(cut, nodes, kept, errors), expected, atol=1e-5)
    assert torch.allclose(run_nodes(cut, masks, errors), expected, atol=1e-5)  # the residual site hides the embeddings
    if baseline is Baseline.CORRUPT:
        assert torch.allclose(expected, behaviour(model, cut.batch, corrupt=True), atol=1e-5)


@pytest.mark.parametrize("baseline", list(Baseline))
@pytest.mark.parametrize("policy", list(Errors))
def test_all_in_edges_of_kept_nodes_are_the_node_circuit(
    model: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline, policy: Errors
) -> None:
    cut, every = cut_of(model, dictionaries, baseline), every_node()
    nodes = every.take(some((len(every),), 0.5, 3) | (every.site == EMBEDDING))
    masks = nodes.masks(PLACES, [D_SAE] * len(MIX))
    errors = error_nodes(policy, masks)
    expected = run_nodes(cut, masks, errors)
    kept = torch.ones(len(nodes) + 1, len(nodes), dtype=torch.bool)
    assert torch.allclose(run_edges(cut, nodes, kept, errors), expected, atol=2e-4)
    # the same circuit among more candidates whose edges are all cut
    inside = torch.isin(torch.arange(len(every)), _where(every, nodes))
    wide = torch.cat([inside, torch.tensor([True])])[:, None] & inside
    assert torch.allclose(run_edges(cut, every, wide, errors), expected, atol=2e-4)
    assert (expected - behaviour(model, cut.batch)).abs().max() > 1e-2


def _where(every: Nodes, nodes: Nodes) -> Tensor:
    keys = [(each.site * PLACES + each.place) * (D_SAE + 1) + each.latent for each in (every, nodes)]
    return (keys[0][:, None] == keys[1]).any(dim=1).nonzero()[:, 0]


@given(chunk=st.integers(1, 40), seed=st.integers(0, 50))
@settings(max_examples=8, deadline=None)
def test_neither_chunk_nor_the_order_of_prompts_matters(
    model: SubjectModel, dictionaries: list[Dictionary], chunk: int, seed: int
) -> None:
    cut, nodes = cut_of(model, dictionaries, Baseline.CORRUPT), every_node()
    kept = some((len(nodes) + 1, len(nodes)), 0.3, seed)
    masks = nodes.take(kept.any(dim=0)).masks(PLACES, [D_SAE] * len(MIX))
    errors = some((len(MIX), PLACES), 0.5, seed)
    whole = run_edges(cut, nodes, kept, errors, chunk=64)
    assert torch.allclose(run_edges(cut, nodes, kept, errors, chunk=chunk), whole, atol=1e-4)
    order = torch.randperm(len(cut.batch), generator=torch.Generator().manual_seed(seed))
    turned = cut_of(model, dictionaries, Baseline.CORRUPT, cut.batch.rows(order))
    assert torch.allclose(run_edges(turned, nodes, kept, errors), whole[order], atol=1e-4)
    assert torch.allclose(run_nodes(turned, masks, errors), run_nodes(cut, masks, errors)[order], atol=1e-4)


def test_one_edge_cut_is_one_edge_patched(model: SubjectModel, dictionaries: list[Dictionary]) -> None:
    """Without one edge into the behaviour the clean run loses what path patching of that edge measures."""
    batch = batch_of(1)
    cut, nodes = cut_of(model, dictionaries, Baseline.CORRUPT, batch), every_node()
    places = torch.arange(batch.clean.shape[1])[None]  # every position a place of its own
    cut = Cut(**(vars(cut) | {"places": places}))
    per = [(Nodes(nodes.site, torch.full_like(nodes.site, p), nodes.latent)).take(nodes.place == 0) for p in places[0]]
    nodes = Nodes(*(torch.cat([getattr(each, name) for each in per]) for name in ("site", "place", "latent")))
    targets = [Targets.behaviour(batch)]
    found = edges(model, batch, cut.sources, targets)
    chosen = (found.latent != REST).nonzero()[:, 0][::7]
    exact = exact_edges(model, batch, targets, found, chosen)
    assert exact.abs().max() > 1e-2
    errors = torch.ones(len(MIX), places.shape[1], dtype=torch.bool)
    clean = behaviour(model, batch)
    for edge, effect in zip(chosen.tolist(), exact.tolist(), strict=True):
        node = (
            (nodes.site + cut.first == found.source[edge])
            & (nodes.place == found.position[edge])
            & (nodes.latent == found.latent[edge])
        )
        kept = torch.ones(len(nodes) + 1, len(nodes), dtype=torch.bool)
        kept[-1, node] = False
        lost = clean - run_edges(cut, nodes, kept, errors)
        assert float(lost) == pytest.approx(effect, abs=2e-4)


def test_a_single_path_in_a_linear_model_has_the_product_of_its_edges(model: SubjectModel) -> None:
    """Frozen factors, coordinates as latents: what embedding -> u -> d -> behaviour carries is E E E / (Df_u Df_d)."""
    sites = [Site.parse("blocks.0.hook_mlp_out"), Site.parse("blocks.1.hook_mlp_out")]
    dictionaries: list[Dictionary] = [Coordinates(site, model.d_model) for site in sites]
    batch = batch_of(1)
    last = batch.clean.shape[1] - 1
    places = torch.arange(last + 1)[None]
    frozen = Frozen(model)
    with frozen.record():
        model.forward(batch.clean, batch.mask)
    with frozen.replay():
        cut = Cut(**(vars(cut_of(model, dictionaries, Baseline.CORRUPT, batch)) | {"places": places}))
        states = site_states(model, batch, dictionaries, Baseline.CORRUPT)
        targets = [Targets.latents(each, torch.zeros_like(each.x), torch.arange(len(each.row))) for each in states]
        found = edges(model, batch, cut.sources, [*targets, Targets.behaviour(batch)], chunk=1)
        table = found.table()
        weight = dict(zip(zip(table["source"], table["target"], strict=True), table["weight"], strict=True))
        names = [f"{each.site.name}/{p}/{i}" for each, p in zip(dictionaries, (1, last), strict=True) for i in (2, 5)]
        none = torch.zeros(2, last + 1, dtype=torch.bool)
        carried = []
        for u in (0, 1):
            for d in (2, 3):
                i, j = int(names[u].split("/")[-1]), int(names[d].split("/")[-1])
                nodes = Nodes(torch.tensor([EMBEDDING, 0, 1]), torch.tensor([1, 1, last]), torch.tensor([REST, i, j]))
                kept = torch.zeros(4, 3, dtype=torch.bool)
                empty = run_edges(cut, nodes, kept, none, chunk=1)
                kept[[1, 2, 3], [0, 1, 2]] = True
                moved = run_edges(cut, nodes, kept, none, chunk=1) - empty
                product = weight["embed/1", names[u]] * weight[names[u], names[d]] * weight[names[d], "target"]
                for state, position, latent in ((states[0], 1, i), (states[1], last, j)):
                    at = (state.position == position) & (state.latent == latent)
                    product /= float(state.delta[at])
                assert float(moved) == pytest.approx(product, rel=1e-2, abs=1e-5)
                carried.append(abs(product))
                for missing in range(3):  # a path with a hole carries nothing
                    holed = kept.clone()
                    holed[missing + 1] = False
                    assert float(run_edges(cut, nodes, holed, none, chunk=1) - empty) == pytest.approx(0, abs=1e-5)
    assert max(carried) > 1e-3


@pytest.mark.parametrize("baseline", list(Baseline))
def test_heads_are_kept_and_cut_whole(model: SubjectModel, dictionaries: list[Dictionary], baseline: Baseline) -> None:
    """A circuit without one head at one place is the model with that segment of z at its baseline there."""
    cut = cut_of(model, [Heads(model, 1), dictionaries[4]], baseline)
    n_heads = 4
    masks = [torch.ones(PLACES, n_heads, dtype=torch.bool), torch.ones(PLACES, D_SAE, dtype=torch.bool)]
    errors = error_nodes(Errors.KEPT, masks)
    assert torch.allclose(run_nodes(cut, masks, errors), behaviour(model, cut.batch), atol=2e-4)
    masks[0][1, 2] = False
    z = cut.sources[cut.first]
    segment = torch.zeros(z.x.shape[-1], dtype=torch.bool)
    segment[2 * len(segment) // n_heads : 3 * len(segment) // n_heads] = True
    there = (cut.places == 1)[..., None] & segment & z.free[..., None]
    expected = behaviour(model, cut.batch, {z.site: lambda x: torch.where(there, z.base, x)})
    assert (expected - behaviour(model, cut.batch)).abs().max() > 1e-3
    assert torch.allclose(run_nodes(cut, masks, errors), expected, atol=2e-4)
    site, place, latent = torch.meshgrid(torch.arange(2), torch.arange(PLACES), torch.arange(D_SAE), indexing="ij")
    latents = Nodes(site.flatten(), place.flatten(), latent.flatten())
    latents = latents.take((latents.site == 1) | (latents.latent < n_heads))
    embedded = Nodes(torch.full((PLACES,), EMBEDDING), torch.arange(PLACES), torch.full((PLACES,), REST))
    both = (embedded, latents)
    nodes = Nodes(*(torch.cat([getattr(each, name) for each in both]) for name in ("site", "place", "latent")))
    kept = torch.ones(len(nodes) + 1, len(nodes), dtype=torch.bool)
    kept[:, (nodes.site == 0) & (nodes.place == 1) & (nodes.latent == 2)] = False
    assert torch.allclose(run_edges(cut, nodes, kept, errors), expected, atol=2e-4)


def test_error_policies() -> None:
    kept = [torch.tensor([[True, False], [False, False]]), torch.zeros(2, 2, dtype=torch.bool)]
    assert error_nodes(Errors.KEPT, kept).all()
    assert not error_nodes(Errors.REMOVED, kept).any()
    assert error_nodes(Errors.WITH_LATENTS, kept).tolist() == [[True, False], [False, False]]


def test_embeddings_are_left_out_where_a_dictionary_reads_them(model: SubjectModel, tmp_path: Path) -> None:
    found = random_dictionary(tmp_path / "first", EMBEDDING_SITE.name, d_sae=D_SAE)
    cut = cut_of(model, [found], Baseline.CORRUPT)
    assert cut.first == 0
    nodes = every_node(1).take(slice(PLACES, None))  # type: ignore[arg-type]
    kept = torch.ones(len(nodes) + 1, len(nodes), dtype=torch.bool)
    whole = run_edges(cut, nodes, kept, torch.ones(1, PLACES, dtype=torch.bool))
    assert torch.allclose(whole, behaviour(model, cut.batch), atol=2e-4)
