"""Oracle: SAELens' own encode and decode on a fresh instance, for every architecture and convention."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from mediation.dictionaries import Dictionary, attention_sinks, measure_fidelity
from mediation.errors import FidelityWarning, MediationError
from mediation.sites import Site, Stream
from tests.setups import random_dictionary

D_MODEL, D_SAE = 24, 40
HOOK = "blocks.1.hook_resid_pre"
SITE = Site(1, Stream.RESID_PRE)
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
INFERENCE = {
    "standard": (StandardSAE, StandardSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
}
TRAINING = {
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": [8, D_SAE]},
    ),
}
# (architecture, rescale_acts_by_decoder_norm); the flag exists for the TopK family only.
KINDS = [
    ("standard", False),
    ("gated", False),
    ("jumprelu", False),
    *itertools.product(("topk", "batchtopk", "matryoshka"), (False, True)),
]

pytestmark = pytest.mark.filterwarnings("ignore:Dictionary .* expects activations")


def metadata(**overrides: Any) -> SAEMetadata:
    return SAEMetadata(**{"hook_name": HOOK, "model_name": "gpt2-small", **overrides})


@torch.no_grad()
def randomise(sae: torch.nn.Module, seed: int, zero_rows: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Thresholds inside the range of pre-activations, so that jumps really cut.
        parameter.copy_(noise.abs() if name == "threshold" else 0.5 * noise)
    norms = 0.2 + 3 * torch.rand(D_SAE, 1, generator=generator)
    sae.W_dec.copy_(sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True) * norms)  # type: ignore[union-attr, operator]
    sae.W_dec[:zero_rows] = 0  # type: ignore[index, operator]


def save(
    folder: Path,
    kind: str,
    rescale: bool = False,
    *,
    normalise: str = "none",
    b_dec_in: bool = True,
    seed: int = 0,
    zero_rows: int = 0,
    checkpoint: bool = False,
    meta: SAEMetadata | None = None,
) -> Path:
    options: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "normalize_activations": normalise,
        "apply_b_dec_to_input": b_dec_in,
        "metadata": meta or metadata(),
    }
    if kind in ("topk", *TRAINING):
        options |= {"k": 6, "rescale_acts_by_decoder_norm": rescale}
    if kind in INFERENCE:
        sae_class, config_class = INFERENCE[kind]
        sae: Any = sae_class(config_class(**options))  # type: ignore[arg-type]
    else:
        training_class, training_config, extra = TRAINING[kind]
        sae = training_class(training_config(**options, **extra))
        sae.topk_threshold = torch.tensor(0.7, dtype=torch.double)
    randomise(sae, seed, zero_rows)
    if kind in INFERENCE or checkpoint:
        sae.save_model(folder)
    else:
        sae.save_inference_model(folder)
    return folder


def activations(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return 2 * torch.randn(*shape, D_MODEL, generator=generator) + torch.randn(D_MODEL, generator=generator)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize(("kind", "rescale"), KINDS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), b_dec_in=st.booleans(), batched=st.booleans())
def test_split_is_exact_and_agrees_with_saelens(
    tmp_path: Path, kind: str, rescale: bool, normalise: str, seed: int, b_dec_in: bool, batched: bool
) -> None:
    folder = save(tmp_path, kind, rescale, normalise=normalise, b_dec_in=b_dec_in, seed=seed)
    dictionary = Dictionary.load(folder)
    x = activations(seed, 3, 5) if batched else activations(seed, 7)

    reference = SAE.load_from_disk(folder)
    acts = reference.encode(x)
    expected_error = (x - reference.decode(acts)).detach()
    split = dictionary.split(x)

    size = x.abs().max()
    assert (split.error - expected_error).abs().max() < 1e-5 * max(size, expected_error.abs().max())
    whole = split.latents @ dictionary.decoder + split.constant + split.error
    assert (whole - x).abs().max() < 1e-5 * max(size, split.error.abs().max())
    assert torch.equal(split.latents != 0, acts != 0)
    assert 0 < (acts != 0).float().mean() < 1
    assert torch.allclose(dictionary.decoder.norm(dim=-1), torch.ones(D_SAE), atol=1e-6)
    # Encoding again, or after a half-done split, gives the same: nothing is remembered.
    dictionary.encode(2 * x)
    assert torch.equal(dictionary.encode(x), split.latents)


def frozen_jacobian(folder: Path, x: Tensor, scale: Tensor) -> Tensor:
    """d latent / d x by autograd through SAELens' encode, with the run-time scale replaced by a number."""
    sae = SAE.load_from_disk(folder)
    kind = sae.cfg.normalize_activations
    if kind == "layer_norm":
        sae.run_time_activation_norm_fn_in = lambda v: (v - v.mean(-1, keepdim=True)) / (scale + 1e-5)
    elif kind == "constant_norm_rescale":
        sae.run_time_activation_norm_fn_in = lambda v: v / scale
    norms = torch.ones(D_SAE)
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms = sae.W_dec.norm(dim=-1)
    return torch.autograd.functional.jacobian(lambda v: sae.encode(v) * norms * scale, x)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize(("kind", "rescale"), KINDS)
def test_encoder_rows_are_the_derivative_with_gates_held(
    tmp_path: Path, kind: str, rescale: bool, normalise: str
) -> None:
    folder = save(tmp_path, kind, rescale, normalise=normalise, seed=3)
    x = activations(3)
    scale = torch.ones(1)
    if normalise == "layer_norm":
        scale = x.std().reshape(1)
    elif normalise == "constant_norm_rescale":
        scale = (x.norm() / math.sqrt(D_MODEL)).reshape(1)
    dictionary = Dictionary.load(folder)
    on = dictionary.encode(x) != 0
    assert on.sum() > 2
    jacobian = frozen_jacobian(folder, x, scale)
    assert torch.allclose(jacobian[on], dictionary.encoder[on], rtol=1e-4, atol=1e-4)
    assert not jacobian[~on].any()


@given(share=st.floats(0, 1), rows=st.integers(0, 5))
def test_few_latents_write_what_the_dense_product_writes(shared: Dictionary, share: float, rows: int) -> None:
    """From none on to all on, also rows without any; and gradients reach the latents."""
    generator = torch.Generator().manual_seed(rows)
    size = (2, rows, shared.d_sae)
    latents = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < share**3)
    latents.requires_grad_()
    written = shared.decode(latents)
    assert torch.allclose(written, latents @ shared.decoder, atol=1e-5)
    if written.requires_grad and rows:
        (gradient,) = torch.autograd.grad(written.sum(), latents)
        dense = shared.decoder.sum(1).expand_as(latents)
        assert torch.allclose(gradient, torch.where(latents != 0, dense, gradient), atol=1e-5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    return random_dictionary(tmp_path_factory.mktemp("shared"), "blocks.1.hook_resid_pre")


def test_encode_is_differentiable_and_weights_are_frozen(tmp_path: Path) -> None:
    dictionary = Dictionary.load(save(tmp_path, "standard"))
    assert not dictionary.encode(activations(0, 2)).requires_grad
    x = activations(0).requires_grad_()
    latents = dictionary.encode(x)
    (gradient,) = torch.autograd.grad(latents.sum(), x)
    assert torch.allclose(gradient, (latents > 0).float() @ dictionary.encoder, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "gated", "topk", "jumprelu"])
def test_all_zero_rows_stay_zero(tmp_path: Path, kind: str) -> None:
    dictionary = Dictionary.load(save(tmp_path, kind, zero_rows=3))
    x = activations(0, 9)
    assert not dictionary.decoder[:3].any()
    assert not dictionary.encode(x)[:, :3].any()
    assert all(t.isfinite().all() for t in (dictionary.encoder, dictionary.split(x).error))


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_an_all_zero_activation_is_finite(tmp_path: Path, normalise: str) -> None:
    split = Dictionary.load(save(tmp_path, "standard", normalise=normalise)).split(torch.zeros(2, D_MODEL))
    assert split.latents.isfinite().all()
    assert split.error.isfinite().all()


@pytest.mark.parametrize("kind", list(TRAINING))
@pytest.mark.parametrize("rescale", [False, True])
def test_a_training_checkpoint_loads_as_its_inference_form(tmp_path: Path, kind: str, rescale: bool) -> None:
    checkpoint = Dictionary.load(save(tmp_path / "a", kind, rescale, checkpoint=True))
    inference = Dictionary.load(save(tmp_path / "b", kind, rescale))
    x = activations(1, 20)
    assert checkpoint.architecture == "jumprelu"
    assert torch.equal(checkpoint.encode(x), inference.encode(x))
    # JumpReLU: what a row gets does not depend on the batch it comes in.
    assert torch.allclose(checkpoint.encode(x[:1]), checkpoint.encode(x)[:1], atol=1e-5)


def test_the_scaling_factor_beside_a_checkpoint_is_folded(tmp_path: Path) -> None:
    folder = save(tmp_path, "standard", normalise="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    x = activations(0, 6)
    split = Dictionary.load(folder).split(x)
    sae = SAE.load_from_disk(folder)
    assert torch.allclose(split.error, x - sae.decode(sae.encode(0.5 * x)) / 0.5, atol=1e-4)


def test_missing_scaling_factor_warns(tmp_path: Path) -> None:
    folder = save(tmp_path, "standard", normalise="expected_average_only_in")
    with pytest.warns(FidelityWarning, match="factor"):
        Dictionary.load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(tmp_path, "jumprelu")
    config = json.loads((folder / "cfg.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {k: v.to(dtype) for k, v in load_file(folder / "sae_weights.safetensors").items()}
    save_file(weights, folder / "sae_weights.safetensors")
    dictionary = Dictionary.load(folder)
    x = activations(0, 4)
    latents = dictionary.encode(x.to(dtype))
    assert latents.dtype == dictionary.decoder.dtype == torch.float32
    upcast = {k: v.float() for k, v in weights.items()}
    pre = (x.to(dtype).float() - upcast["b_dec"]) @ upcast["W_enc"] + upcast["b_enc"]
    expected = pre * (pre > upcast["threshold"]) * (pre > 0) * upcast["W_dec"].norm(dim=-1)
    assert torch.allclose(latents, expected, atol=1e-5)


def test_identity_comes_from_the_folder(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", "standard", seed=0), save(tmp_path / "b", "standard", seed=1)
    first, second = Dictionary.load(a), Dictionary.load(b)
    assert (first.name, first.site, first.model_name) == ("a", SITE, "gpt2-small")
    assert (first.d_model, first.d_sae) == (D_MODEL, D_SAE)
    assert len(first.content_hash) == 64
    assert first.content_hash == Dictionary.load(a).content_hash != second.content_hash


def test_module_paths_name_a_site(tmp_path: Path) -> None:
    folder = save(tmp_path, "standard", meta=metadata(hook_name="model.layers.12"))
    assert Dictionary.load(folder).site == Site(12, Stream.RESID_POST)


def test_site_is_needed_where_the_folder_names_none(tmp_path: Path) -> None:
    folder = save(tmp_path, "standard")
    config = json.loads((folder / "cfg.json").read_text())
    for key in ("sae_lens_version", "sae_lens_training_version"):
        config["metadata"].pop(key)
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(MediationError, match="sae_lens_version"):
        Dictionary.load(folder)
    assert Dictionary.load(folder, site=SITE).site == SITE


@pytest.mark.parametrize("kind", [Transcoder, JumpReLUTranscoder])
def test_a_transcoder_reads_one_site_and_writes_another(tmp_path: Path, kind: Any) -> None:
    """latents @ decoder + constant is SAELens' own output, and the error what the written site has beyond it."""
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    reference = transcoder(kind, tmp_path, hooks)
    dictionary = Dictionary.load(tmp_path)
    assert (dictionary.reads, dictionary.site) == (Site(1, Stream.MLP_IN), Site(1, Stream.MLP_OUT))
    read, x = torch.randn(2, 7, D_MODEL, generator=torch.Generator().manual_seed(4))
    split = dictionary.split(x, read)
    assert torch.allclose(split.latents, dictionary.encode(read))
    assert torch.allclose(x - split.error, reference(read), atol=1e-5)
    norms = dictionary.decoder.norm(dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    probe = read[0].clone().requires_grad_()
    latents = dictionary.encode(probe)
    on = int(latents.argmax())
    (gradient,) = torch.autograd.grad(latents[on], probe)
    assert torch.allclose(gradient, dictionary.encoder[on], atol=1e-5)


def test_transcoders_that_cannot_be_placed_are_refused(tmp_path: Path) -> None:
    transcoder(Transcoder, tmp_path / "nowhere", {"hook_name": "blocks.1.mlp.hook_in"})
    transcoder(SkipTranscoder, tmp_path / "skip", {"hook_name": HOOK, "hook_name_out": HOOK})
    with pytest.raises(MediationError, match="where it reads and writes"):
        Dictionary.load(tmp_path / "nowhere")
    with pytest.raises(MediationError, match="skip_transcoder"):
        Dictionary.load(tmp_path / "skip")


def transcoder(kind: Any, folder: Path, hooks: dict[str, str]) -> Any:
    configs = {
        Transcoder: TranscoderConfig,
        JumpReLUTranscoder: JumpReLUTranscoderConfig,
        SkipTranscoder: SkipTranscoderConfig,
    }
    torch.manual_seed(0)
    metadata = SAEMetadata(**hooks)
    sae = kind(configs[kind](d_in=D_MODEL, d_out=D_MODEL, d_sae=D_SAE, apply_b_dec_to_input=False, metadata=metadata))
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.5)
    sae.save_model(folder)
    return sae


def test_a_contradicting_site_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "standard")
    with pytest.raises(MediationError, match="was trained at"):
        Dictionary.load(folder, site=Site(2, Stream.RESID_PRE))
    same_vector = Site(0, Stream.RESID_POST)
    assert Dictionary.load(folder, site=same_vector).site == same_vector


def model(**overrides: Any) -> Any:
    known = {"name": "openai-community/gpt2", "d_model": D_MODEL, "n_layers": 2} | overrides
    return SimpleNamespace(**known, width=lambda _: known["d_model"])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"d_model": D_MODEL + 1}, "dimensions"),
        ({"n_layers": 1}, "layer 1"),
        ({"name": "google/gemma-2-2b"}, "trained on 'gpt2-small'"),
    ],
)
def test_check_refuses_another_model(tmp_path: Path, wrong: dict[str, Any], match: str) -> None:
    dictionary = Dictionary.load(save(tmp_path, "standard"))
    dictionary.check(model())
    dictionary.check(model(name="GPT2"))
    dictionary.check(model(name="gpt2-Q4_K_M"))
    with pytest.raises(MediationError, match=match):
        dictionary.check(model(**wrong))


def test_check_accepts_a_dictionary_of_unknown_origin(tmp_path: Path) -> None:
    folder = save(tmp_path, "standard", meta=metadata(model_name=None))
    Dictionary.load(folder).check(model(name="anything"))


def test_unreadable_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refuse(folder: Path, match: str) -> None:
        with pytest.raises(MediationError, match=match) as error:
            Dictionary.load(folder)
        assert "\n" not in str(error.value)

    refuse(tmp_path / "nowhere", "no folder")
    refuse(tmp_path, "no cfg.json")

    pickled = save(tmp_path / "pickled", "standard")
    (pickled / "sae_weights.safetensors").rename(pickled / "sae_weights.pt")
    refuse(pickled, "never opened")

    other_width = save(tmp_path / "width", "standard")
    config = json.loads((other_width / "cfg.json").read_text())
    (other_width / "cfg.json").write_text(json.dumps(config | {"d_in": 5}))
    refuse(other_width, "cannot be read")

    (other_width / "cfg.json").write_text(json.dumps(config | {"architecture": "quantum"}))
    refuse(other_width, "cannot be read")
    (other_width / "cfg.json").write_text("{")
    refuse(other_width, "cannot be read")

    damaged = save(tmp_path / "damaged", "standard")
    (damaged / "sae_weights.safetensors").write_bytes(b"not weights")
    refuse(damaged, "cannot be read")

    broken = save(tmp_path / "nan", "standard")
    weights = load_file(broken / "sae_weights.safetensors")
    weights["W_dec"][0, 0] = math.nan
    save_file(weights, broken / "sae_weights.safetensors")
    refuse(broken, "not finite")

    whitened = save(tmp_path / "whitened", "standard", normalise="covariance_whitening")
    refuse(whitened, "whitened")


def test_releases_are_checked_by_name_and_never_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    offline: list[bool] = []

    def from_pretrained(*args: object, **options: object) -> None:
        offline.append(huggingface_hub.constants.is_offline_mode())
        raise LocalEntryNotFoundError("absent")

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(MediationError, match="no release 'gpt3'"):
        Dictionary.load("gpt3", "blocks.0.hook_resid_pre")
    with pytest.raises(MediationError, match="has no dictionary 'x'"):
        Dictionary.load("gpt2-small-res-jb", "x")
    with pytest.raises(MediationError, match="release with an id"):
        Dictionary.load("gpt2-small-res-jb")
    assert not offline
    with pytest.raises(MediationError, match="allow_download"):
        Dictionary.load("gpt2-small-res-jb", HOOK)
    with pytest.raises(MediationError, match="check the network"):
        Dictionary.load("gpt2-small-res-jb", HOOK, allow_download=True)
    assert offline == [True, False]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_release_loads_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, "jumprelu")
    monkeypatch.setattr(SAE, "from_pretrained", lambda *args, **options: SAE.load_from_disk(folder))
    released, local = Dictionary.load("gpt2-small-res-jb", HOOK), Dictionary.load(folder)
    x = activations(0, 4)
    assert torch.equal(released.encode(x), local.encode(x))
    assert released.name == f"gpt2-small-res-jb/{HOOK}"
    assert len(released.content_hash) == 64


class LinearModel:
    """Embedding -> site -> unembedding: cross-entropies have a closed form."""

    bos_id: int | None = 0
    device = torch.device("cpu")

    def __init__(self, vocab: int = 11) -> None:
        generator = torch.Generator().manual_seed(5)
        self.embedding = torch.randn(vocab, D_MODEL, generator=generator)
        # Each token is followed by the next id, so the clean model is good and zeros are at chance.
        self.unembedding = torch.roll(torch.linalg.pinv(self.embedding) * 8, 1, dims=1)

    def forward(self, tokens: Tensor, mask: Tensor, *, read: Any = (), edit: Any = None) -> Any:
        x = self.embedding[tokens]
        if edit:
            x = edit[SITE](x)
        return SimpleNamespace(logits=x @ self.unembedding, sites={site: x for site in read})


def prompts() -> tuple[Tensor, Tensor]:
    tokens = torch.stack([torch.cat([torch.tensor([0]), (torch.arange(8) + i) % 10 + 1]) for i in range(7)])
    mask = torch.ones_like(tokens)
    mask[2, 6:] = 0
    return tokens, mask


def identity_dictionary(folder: Path, gain: float) -> Dictionary:
    """Latents +-e_i: reconstructs gain * x exactly."""
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL, metadata=metadata()))
    with torch.no_grad():
        rows = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(gain * rows.T)
    sae.save_model(folder)
    return Dictionary.load(folder)


def test_a_perfect_dictionary_recovers_everything(tmp_path: Path) -> None:
    tokens, mask = prompts()
    fidelity = measure_fidelity(
        LinearModel(),  # type: ignore[arg-type]
        identity_dictionary(tmp_path, 1.0),
        tokens,
        mask,
        batch_size=3,
    )
    assert fidelity.variance_explained == pytest.approx(1, abs=1e-9)
    assert fidelity.cross_entropy_recovered == pytest.approx(1, abs=1e-5)
    assert fidelity.l0 == pytest.approx(D_MODEL)
    assert fidelity.tokens == int(mask[:, 1:].sum())
    assert "L0 24.0" in str(fidelity)


def test_fidelity_matches_its_definition_and_warns(tmp_path: Path) -> None:
    tokens, mask = prompts()
    subject, gain = LinearModel(), 0.25
    dictionary = identity_dictionary(tmp_path, gain)
    with pytest.warns(FidelityWarning, match="fits these prompts badly"):
        fidelity = measure_fidelity(subject, dictionary, tokens, mask, batch_size=3)  # type: ignore[arg-type]
    judged = mask.bool()
    judged[:, 0] = False
    x = subject.embedding[tokens]
    seen = x[judged]
    expected = 1 - ((1 - gain) * seen).square().sum() / (seen - seen.mean(0)).square().sum()
    assert fidelity.variance_explained == pytest.approx(expected.item(), rel=1e-5)

    def loss(value: Tensor) -> float:
        scores = torch.where(judged[..., None], value, x) @ subject.unembedding
        pairs = (mask[:, :-1] * mask[:, 1:]).bool()
        return torch.nn.functional.cross_entropy(scores[:, :-1][pairs], tokens[:, 1:][pairs]).item()

    recovered = (loss(0 * x) - loss(gain * x)) / (loss(0 * x) - loss(x))
    assert fidelity.cross_entropy_recovered == pytest.approx(recovered, rel=1e-5)


def test_fidelity_does_not_depend_on_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, mask = prompts()
    dictionary = identity_dictionary(tmp_path, 0.9)
    whole = measure_fidelity(LinearModel(), dictionary, tokens, mask, batch_size=7)  # type: ignore[arg-type]
    monkeypatch.setattr("mediation.dictionaries.MAX_DENSE_LATENTS", 5 * dictionary.d_sae)
    parts = measure_fidelity(LinearModel(), dictionary, tokens, mask, batch_size=2)  # type: ignore[arg-type]
    assert parts.tokens == whole.tokens
    for name in ("variance_explained", "l0", "cross_entropy_recovered"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_fidelity_needs_tokens(tmp_path: Path) -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(MediationError, match="two real tokens"):
        measure_fidelity(
            LinearModel(),  # type: ignore[arg-type]
            identity_dictionary(tmp_path, 1.0),
            tokens,
            torch.ones_like(tokens),
            batch_size=2,
        )


def test_attention_sinks_are_found_by_row_and_padding_does_not_count() -> None:
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0))
    x[0, 4] *= 100
    x[3, 4:] *= 200  # most of a row: a run of end-of-text tokens
    x[2, 1:3] *= 30
    x[1, 5:] = 1e6  # padding, louder than everything
    real = torch.ones(4, 9, dtype=torch.bool)
    real[1, 5:] = False
    expected = torch.zeros(4, 9, dtype=torch.bool)
    expected[0, 4] = expected[2, 1] = expected[2, 2] = True
    expected[3, 4:] = True
    for scale in (1e-3, 1.0, 1e3):
        assert torch.equal(attention_sinks(x * scale, real), expected)


def test_fidelity_leaves_attention_sinks_out(tmp_path: Path) -> None:
    subject = LinearModel()
    subject.embedding = subject.embedding.clone()
    subject.embedding[1] *= 1000
    tokens = torch.tensor([[2, 3, 1, 4, 5, 3], [4, 1, 2, 2, 3, 5]])
    dictionary = identity_dictionary(tmp_path, 1.0)
    fidelity = measure_fidelity(subject, dictionary, tokens, torch.ones_like(tokens), batch_size=1)  # type: ignore[arg-type]
    assert fidelity.tokens == 8
    few = tokens[:1, :3]
    with pytest.raises(MediationError, match="attention sink"):
        measure_fidelity(subject, dictionary, few, torch.ones_like(few), batch_size=1)  # type: ignore[arg-type]
