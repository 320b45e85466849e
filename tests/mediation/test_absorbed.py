"""Absorption measured: planted dictionaries where a child has absorbed its parent, and controls where none has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.nn.functional import normalize

from mediation.absorbed.anomalies import strongest_part
from mediation.absorbed.beyond import Case, Words, figures, judge, moved
from mediation.absorbed.concepts import FAMILIES, Concept, Family
from mediation.absorbed.contexts import END, Context, InContext
from mediation.absorbed.coordination import missing_latents
from mediation.absorbed.letters import absorbed_full, absorbed_v1, carriers, pooled_effects
from mediation.absorbed.relatedness import CONTEXTS, LEAST, Peaks, Text, relation
from mediation.absorbed.scores import auc, precision_recall, share
from mediation.dictionaries import Dictionary
from mediation.sites import Site
from tests.setups import tiny

SITE = Site.parse("blocks.1.hook_resid_pre")


def planted(
    folder: Path, encoder: Tensor, decoder: Tensor, bias: Tensor | None = None, site: Site = SITE
) -> Dictionary:
    """A dictionary of these rows, [d_sae, d] each, that fires where the encoder's product plus bias is over .5."""
    d_sae, d = decoder.shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=d_sae, metadata=SAEMetadata(hook_name=site.name)))
    sae.W_enc.data, sae.W_dec.data = encoder.T.contiguous(), normalize(decoder, dim=1)
    sae.b_enc.data = torch.zeros(d_sae) if bias is None else bias
    sae.b_dec.data.fill_(0.0)
    sae.threshold.data.fill_(0.5)
    sae.save_model(folder)
    return Dictionary.load(folder)


class TestScores:
    def test_an_area_is_the_share_of_ordered_pairs(self) -> None:
        rng = np.random.default_rng(0)
        score, truth = rng.integers(0, 4, 60).astype(float), rng.random(60) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in score[truth] for b in score[~truth]]
        found = auc(score, truth)
        assert found["value"] == pytest.approx(np.mean(pairs))
        assert found["low"] < found["value"] < found["high"]

    def test_too_few_positives_give_no_area(self) -> None:
        assert auc([1, 2, 3, 4, 5, 6], [True, False, False, False, False, False])["value"] is None

    def test_a_share_is_a_ratio_of_sums_and_its_interval_respects_groups(self) -> None:
        alone = share([1, 0] * 50)
        assert alone["value"] == 0.5
        assert alone["high"] - alone["low"] < 0.25
        tied = share([1, 0] * 50, groups=[0, 1] * 50)  # two independent values, not a hundred
        assert (tied["low"], tied["high"]) == (0, 1)
        assert share([3, 1], [6, 2])["value"] == 0.5
        assert share([0, 0], [0, 0])["value"] is None

    def test_precision_and_recall(self) -> None:
        found = precision_recall([1, 1, 1, 0], [1, 1, 0, 1])
        assert found["precision"]["value"] == found["recall"]["value"] == pytest.approx(2 / 3)
        assert precision_recall([0, 0], [1, 0])["precision"]["value"] is None


class TestInContext:
    @pytest.mark.parametrize("position", [0, END])
    def test_surgery_is_that_of_the_whole_text(self, tmp_path: Path, position: int) -> None:
        model = tiny(tmp_path)
        words = torch.tensor([5, 9, 13])
        context = InContext(model, Context("a b c", "d e"), words)
        before = torch.tensor(model.encode("a b c")).expand(3, -1)
        whole = torch.cat([before, context.tokens], 1)
        plain = model.forward(whole, read=[SITE])
        assert plain.logits is not None
        at = before.shape[1] if position == 0 else whole.shape[1] - 1
        x = plain.sites[SITE][:, at]
        assert torch.allclose(context.x([SITE], position)[SITE], x, atol=1e-5)
        assert torch.allclose(context.asked(), plain.logits[:, -1], atol=1e-5)
        new = x + 1.0
        changed = plain.sites[SITE].clone()
        changed[:, at] = new
        expected = model.forward(whole, edit={SITE: lambda _: changed}).logits
        assert expected is not None
        every, tokens = torch.arange(3), torch.tensor([4, 7])
        found = context.logits(SITE, every, new, tokens, position)
        assert torch.allclose(found, expected[:, -1, tokens], atol=1e-5)
        assert not torch.allclose(found, plain.logits[:, -1, tokens], atol=1e-3)
        weights = torch.tensor([1.0, -1.0]).expand(3, 2)
        gradient = context.gradient(SITE, every, x, weights, tokens, position)
        step = 1e-2 * gradient
        up, down = (context.logits(SITE, every, x + s * step, tokens, position) @ weights[0] for s in (1, -1))
        assert torch.allclose((up - down) / 2, 1e-2 * gradient.square().sum(1), rtol=0.02, atol=1e-5)


class TestPublishedDefinitions:
    """Parent p = axis 0, child c = axis 1. The child's row has taken the parent's part: w_c = c + .8 p."""

    decoder = normalize(torch.tensor([[1.0, 0, 0, 0], [0.8, 1.0, 0, 0], [0, 0, 1.0, 0]]), dim=1)
    probe = torch.tensor([2.0, 0, 0, 0])
    x = torch.tensor([[0.8, 1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    latents = torch.tensor([[0, 1.2806, 0], [1.0, 0, 0], [0, 0, 1.0]])  # child alone; parent alone; neither

    def test_full(self) -> None:
        found = absorbed_full(self.latents, self.x, self.decoder, self.probe, [0])
        assert found.tolist() == [True, False, False]

    def test_full_needs_the_share_and_silent_main_latents(self) -> None:
        small = self.latents * 0.3
        assert not absorbed_full(small, self.x, self.decoder, self.probe, [0]).any()
        both = self.latents + torch.tensor([[0.1, 0, 0]])
        assert not absorbed_full(both, self.x, self.decoder, self.probe, [0]).any()

    @pytest.mark.parametrize(
        ("attribution", "absorbed"),
        [
            ([0.0, 2.0, 0.5], True),
            ([0.0, 1.4, 0.5], False),  # not far enough ahead of the second
            ([0.0, -2.0, -3.5], False),  # the largest does not support the letter
            ([0.0, 0.5, 2.0], False),  # the third latent is not aligned with the probe
        ],
    )
    def test_v1(self, attribution: list[float], absorbed: bool) -> None:
        cosines = self.decoder @ normalize(self.probe, dim=0)
        found = absorbed_v1(self.latents[:1], torch.tensor([attribution]), cosines, [0])
        assert found.tolist() == [absorbed]
        on = self.latents[:1] + torch.tensor([[0.1, 0, 0]])
        assert absorbed_v1(on, torch.tensor([attribution]), cosines, [0]).tolist() == [False]


class TestFlag:
    """Meta-latent u = axis 0, carried by row 0, hidden in row 1; the behaviour's gradient is along u."""

    rows = normalize(torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1.0]]), dim=1)
    directions = torch.eye(3)[:1]
    gradients = torch.tensor([[2.0, 0, 0]] * 3)

    def flags(self, latents: Tensor, sign: float = 1.0) -> tuple[list[float], list[bool]]:
        codes, gradients = self.rows @ self.directions.T, sign * self.gradients
        carrier = carriers(self.rows, self.directions)["cosine .7"]
        pooled = pooled_effects(latents, gradients, codes, self.directions, carrier)
        return pooled.share().tolist(), pooled.flagged(latents * (gradients @ self.rows.T)).tolist()

    def test_hidden_and_open(self) -> None:
        shares, flagged = self.flags(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0, 1.0], [0, 0, 1.0]]))
        assert shares == [1.0, 0.0, 0.0]
        assert flagged == [True, False, False]

    def test_both_at_once_is_shared_out_and_not_flagged(self) -> None:
        shares, flagged = self.flags(torch.tensor([[1.0, 1.0, 0.0]] * 3))
        assert shares == pytest.approx([0.6 / 1.6] * 3)
        assert not any(flagged)

    def test_an_effect_against_the_answer_is_not_flagged(self) -> None:
        shares, flagged = self.flags(torch.tensor([[0.0, 1.0, 0.0]] * 3), sign=-1.0)
        assert shares == [0.0] * 3
        assert not any(flagged)

    def test_rules_for_carriers(self) -> None:
        rows = normalize(torch.tensor([[0.6, 0.8, 0], [0.45, 0.9, 0], [0.3, 0.95, 0.0]]), dim=1)
        found = {rule: mask.tolist() for rule, mask in carriers(rows, self.directions).items()}
        assert found == {"cosine .7": [False] * 3, "cosine .5": [True, False, False], "nearest": [True, True, False]}
        assert not any(mask.any() for mask in carriers(rows, rows[:0]).values())


def concept_words(absorbed: bool, folder: Path) -> tuple[Words, list[Case], Dictionary]:
    """128 members of a concept and as many other words; x = concept (axis 0) + an axis of its own. In the absorbed
    dictionary each odd member has a latent with the concept in it and the concept's latent does not fire for it.
    """
    n, d = 256, 257
    family = Family("planted", (Concept("it", "", ()),), (), (), (), asks=False)
    concept = torch.tensor([0] * 128 + [-1] * 128)
    x = torch.zeros(n, d)
    x[torch.arange(n), torch.arange(n) + 1] = 1.0
    x[:128, 0] = 1.0
    odd = torch.arange(128)[1::2]
    decoder, encoder = torch.eye(d), torch.eye(d)
    if absorbed:
        decoder[odd + 1, 0] = 1.0
        encoder[0, odd + 1] = -1.0  # the parent's encoder looks away, as in Chanin et al. 2024, A.2
        encoder[odd + 1] *= 2**0.5
    half = (torch.arange(n) // 2) % 2
    sites = {SITE: x[None].repeat(2, 1, 1)}
    words = Words(family, [str(k) for k in range(n)], concept, half, sites, sites, [], torch.tensor([0]))
    cases = []
    for number in (0, 1):
        members = ((concept == 0) & (half == number)).nonzero()[:, 0]
        yes = torch.ones(2, len(members), dtype=torch.bool)
        cases.append(Case(0, number, torch.eye(d)[0], -0.5, members, yes, yes, yes, 0 * yes.float()))
    return words, cases, planted(folder, encoder, decoder)


@pytest.mark.parametrize(("absorbed", "expected"), [(True, 0.5), (False, 0.0)])
def test_planted_absorption_of_a_concept_is_measured(tmp_path: Path, absorbed: bool, expected: float) -> None:
    words, cases, dictionary = concept_words(absorbed, tmp_path / "sae")
    judged = judge(dictionary, words, cases)
    found = figures(judged)
    assert all(each.own == 1 for each in judged)
    for key in ("silent", "silent_while_used", "absorbed_full", "absorbed_full_while_used", "absorbed_fraction"):
        assert found[key]["value"] == pytest.approx(expected), key
    assert found["present"]["value"] == 1
    for each in judged:
        each.present = each.present & (np.arange(len(each.present)) % 2 == 0)  # half of the members can be read
    assert figures(judged)["silent"]["value"] is None
    truly = {member for each in judged for member, silent in zip(each.member, each.silent, strict=True) if silent}
    assert truly == ({str(k) for k in range(1, 128, 2)} if absorbed else set())


def test_a_move_ends_where_the_probe_reads_the_level() -> None:
    generator = torch.Generator().manual_seed(0)
    x, along = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    probe = normalize(torch.randn(8, generator=generator), dim=0)
    new = moved(x, probe, along, 0.3)
    assert torch.allclose(new @ probe, torch.full((5,), 0.3), atol=1e-5)
    assert torch.linalg.matrix_rank(torch.cat([new - x, along[None]]), atol=1e-4) == 1
    assert torch.equal(moved(x, torch.eye(8)[0], torch.eye(8)[1], 0.3), x)


def test_contexts_and_examples_give_nothing_away() -> None:
    for family in FAMILIES:
        members = {word.lower() for each in family.concepts for word in each.members}
        assert not set(family.discovery) & set(family.evaluation)
        for context in (*family.discovery, *family.evaluation):
            told = set(f"{context.before} {context.after}".lower().replace(":", " ").replace(",", " ").split())
            assert not told & {each.answer.strip() for each in family.concepts}
            assert not told & members or family.name == "kinds, in sentences"
        everything = [word for each in family.concepts for word in each.members]
        assert len(set(everything)) == len(everything)
        assert not set(everything) & set(family.others)


class TestMissing:
    """Rows: 0 = axis 0, 1 = axis 1 with .8 of axis 0, 2 = axis 2."""

    @pytest.fixture
    def dictionary(self, tmp_path: Path) -> Dictionary:
        decoder = torch.tensor([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 1.0, 0]])
        encoder = torch.tensor([[1.0, -4 / 3, 0, 0], [0, 1 / 0.6, 0, 0], [0, 0, 1.0, 0]])
        return planted(tmp_path / "sae", encoder, decoder)

    def test_one_latent_takes_over(self, dictionary: Dictionary) -> None:
        a, b = torch.tensor([[1.0, 0, 1.0, 0]]), torch.tensor([[0.8, 0.6, 1.0, 0]])
        found = missing_latents(dictionary, a, b)
        assert (found.row.tolist(), found.latent.tolist(), found.on.tolist()) == ([0], [0], [2])
        assert found.value.tolist() == pytest.approx([1.0])
        assert found.others.tolist() == pytest.approx([0.8])
        assert found.one.tolist() == pytest.approx([0.8])
        assert found.error.tolist() == pytest.approx([0.0], abs=1e-6)

    def test_the_error_node_takes_over(self, dictionary: Dictionary) -> None:
        found = missing_latents(dictionary, torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0.4, 0, 0, 0]]))
        assert found.error.tolist() == pytest.approx([0.4])
        assert found.others.tolist() == pytest.approx([0.0], abs=1e-6)

    def test_nothing_takes_over(self, dictionary: Dictionary) -> None:
        found = missing_latents(dictionary, torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 0, 1.0, 0]]))
        kept = found.others + found.error
        assert kept.tolist() == pytest.approx([0.0], abs=1e-6)
        assert found.one.tolist() == pytest.approx([0.0], abs=1e-6)

    def test_gains_and_losses_add_up_to_the_projection(self, dictionary: Dictionary) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 200, 4, generator=generator)
        found = missing_latents(dictionary, a, b)
        w = dictionary.decoder[found.latent]
        change = ((b - a)[found.row] * w).sum(1)
        assert len(found.row) > 20
        assert torch.allclose(change, found.others + found.error - found.value, atol=1e-5)
        gain = dictionary.encode(b) - dictionary.encode(a)
        for k, (row, latent) in enumerate(zip(found.row.tolist(), found.latent.tolist(), strict=True)):
            each = gain[row] * (dictionary.decoder @ dictionary.decoder[latent])
            each[latent] = 0
            assert float(each.sum()) == pytest.approx(float(found.others[k]), abs=1e-5)
            assert max(float(each.max()), 0) == pytest.approx(float(found.one[k]), abs=1e-5)


class TestStrongestPart:
    codes = torch.tensor([[0.5, 0.4, 0.0, 0.1], [0.3, 0.0, 0.2, 0.0], [0.6, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])

    def test_shared(self) -> None:
        part = strongest_part(0, self.codes, torch.tensor([-2.0, 1.0, 9.0, 0.1]), [1, 2])
        assert part is not None
        assert (part.meta, part.sharers, part.chance) == (0, 2, 0.0)  # part 2 is none of its own, whatever its effect

    def test_own(self) -> None:
        part = strongest_part(0, self.codes, torch.tensor([1.0, 2.0, 0.0, 0.1]), [0, 1, 2])
        assert part is not None
        assert (part.meta, part.sharers, part.chance) == (1, 0, 0.5)

    def test_without_parts(self) -> None:
        assert strongest_part(3, self.codes, torch.zeros(4), [0, 1]) is None


class TestRelation:
    """300 windows of 20 tokens, a tenth of which are near a task word."""

    W, T = 300, 20

    @pytest.fixture
    def text(self) -> Text:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.arange(self.W * self.T).view(self.W, self.T)
        return Text(tokens, torch.rand(self.W, self.T, generator=generator) < 0.1)

    def test_peaks_are_the_strongest_token_of_the_strongest_windows(self, text: Text) -> None:
        values = torch.rand(self.W, self.T, 3, generator=torch.Generator().manual_seed(1))
        values[LEAST + 2 :, :, 2] = 0.0  # on in a few windows only
        peaks = Peaks(3)
        for part in values.split(7):
            peaks.add(part)
        kept = torch.ones(self.W, self.T, dtype=torch.bool)
        found = relation(peaks, text, kept)
        assert found.contexts.tolist() == [CONTEXTS, CONTEXTS, LEAST + 2]
        for latent, n in enumerate(found.contexts.tolist()):
            best, position = values[:, :, latent].max(1)
            windows = best.topk(n).indices
            assert peaks.value[:n, latent].tolist() == best[windows].tolist()
            assert found.share[latent] == text.near[windows, position[windows]].float().mean()
            assert found.peaks[:n, latent].tolist() == text.windows[windows, position[windows]].tolist()

    def test_latents_that_fire_at_random_are_unrelated(self, text: Text) -> None:
        generator = torch.Generator().manual_seed(2)
        rate = torch.logspace(-3, -0.3, 2000)  # of a token on which a latent is on
        peaks = Peaks(2000)
        for _ in range(10):
            values = torch.rand(30, self.T, 2000, generator=generator)
            peaks.add(values * (torch.rand(values.shape, generator=generator) < rate))
        found = relation(peaks, text, torch.ones(self.W, self.T, dtype=torch.bool))
        assert found.judged.sum() > 1500
        assert (found.p[found.judged] <= 0.05).mean() <= 0.055  # p is valid; counts of hits are discrete, so often less
        assert found.related[found.judged].mean() <= 0.002  # three of five contexts, now and then
        assert found.unrelated[found.judged].mean() >= 0.945
        assert (found.p[~found.judged] > 0).all()

    def test_tokens_that_do_not_count_are_not_drawn(self, text: Text) -> None:
        peaks = Peaks(1)
        values = torch.zeros(self.W, self.T, 1)
        values[:10, 5] = 1.0
        peaks.add(values)
        text.near[:, 5] = True
        everything = torch.ones(self.W, self.T, dtype=torch.bool)
        assert relation(peaks, text, everything).related.all()
        only = torch.zeros_like(everything)
        only[:, 5] = True
        assert relation(peaks, text, only).unrelated.all()  # all tokens that count are near: its are as any others
