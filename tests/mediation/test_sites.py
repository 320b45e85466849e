"""Names of sites: every spelling is read, nothing else is, and depth orders them as the model runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediation.errors import MediationError
from mediation.sites import Site, Stream

SITES = st.builds(Site, st.integers(0, 200), st.sampled_from(Stream))


@given(SITES)
def test_saelens_name_round_trip(site: Site) -> None:
    assert Site.parse(site.name) == site


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.8.hook_resid_pre", Site(8, Stream.RESID_PRE)),
        ("model.layers.12", Site(12, Stream.RESID_POST)),
        ("model.layers.12.output", Site(12, Stream.RESID_POST)),
        ("model.layers.12.input", Site(12, Stream.RESID_PRE)),
        ("model.layers.0.self_attn", Site(0, Stream.ATTN_OUT)),
        ("model.layers.0.mlp", Site(0, Stream.MLP_OUT)),
        ("model.layers.8.mlp.input", Site(8, Stream.MLP_IN)),
        ("blocks.8.mlp.hook_in", Site(8, Stream.MLP_IN)),
        ("model.language_model.layers.3.mlp.output", Site(3, Stream.MLP_OUT)),
        ("transformer.h.7", Site(7, Stream.RESID_POST)),
        ("transformer.h.7.attn", Site(7, Stream.ATTN_OUT)),
        ("gpt_neox.layers.10.attention", Site(10, Stream.ATTN_OUT)),
        ("gpt_neox.layers.10.mlp", Site(10, Stream.MLP_OUT)),
    ],
)
def test_parses_every_spelling(name: str, site: Site) -> None:
    assert Site.parse(name) == site


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.8.hook_resid_mid",
        "blocks.8.attn.hook_q",
        "blocks.-1.hook_resid_pre",
        "blocks.8.hook_resid_pre ",
        "model.layers.8.self_attn.o_proj",
        "model.layers",
        "model.embed_tokens",
        "lm_head",
    ],
)
def test_refuses_other_points_in_one_sentence(name: str) -> None:
    with pytest.raises(MediationError, match="names no site") as caught:
        Site.parse(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hook", ["hook_mlp_in", "ln2.hook_normalized"])
def test_transformer_lens_names_of_values_before_the_gain_are_not_taken_for_what_the_mlp_is_given(hook: str) -> None:
    with pytest.raises(MediationError, match="before the norm or before its gain"):
        Site.parse(f"blocks.8.{hook}")


@given(st.integers(0, 200))
def test_depth_follows_the_residual_stream(layer: int) -> None:
    order = [Stream.RESID_PRE, Stream.ATTN_OUT, Stream.MLP_OUT, Stream.RESID_POST]
    depths = [Site(layer, stream).depth for stream in order]
    assert depths == sorted(set(depths))
    assert Site(layer, Stream.RESID_POST).depth == Site(layer + 1, Stream.RESID_PRE).depth


@given(SITES)
def test_canonical_keeps_depth_and_is_never_resid_post(site: Site) -> None:
    canonical = site.canonical()
    assert canonical.depth == site.depth
    assert canonical.stream is not Stream.RESID_POST
    assert canonical.canonical() == canonical
    assert (canonical == site) == (site.stream is not Stream.RESID_POST)


def test_importing_sites_imports_nothing_heavy() -> None:
    code = (
        "import sys, mediation.sites; "
        "print([m for m in ('torch', 'transformers', 'nnsight', 'sae_lens', 'polars') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
