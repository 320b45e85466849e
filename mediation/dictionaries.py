"""Dictionaries: sparse autoencoders of any SAELens architecture, brought to one convention.

Architectures and training recipes disagree on where norms and scales live. After loading there is one form,

    x = latents @ decoder + constant + error,

with unit-norm decoder rows in model space, so that a latent's size is the length of what it writes. x is the value
of the site a dictionary writes to; a transcoder reads its latents off another one (`reads`), an SAE off x itself.

1. Load with SAELens in float32. A saved training checkpoint of BatchTopK or Matryoshka is first turned into
   its inference form (JumpReLU with the learned threshold), so that no activation depends on its batch.
2. Fold the norms |W_dec[i]| into the latents; TopK with `rescale_acts_by_decoder_norm` has done so already.
3. Normalise at run time here and not in SAELens: z = (x - shift) / scale is encoded, latents and bias are
   multiplied by the scale, and the bias is moved by the shift. SAELens keeps scale and shift between encode
   and decode, and they go stale when a caller encodes twice; here nothing is kept.
4. error = x - (latents @ decoder + constant), which is x minus SAELens' own reconstruction.

Fidelity (variance explained, L0, cross-entropy recovered) follows SAELens and SAEBench.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import Tensor
from transformer_lens.loading_from_pretrained import get_official_model_name

from mediation.errors import FidelityWarning, MediationError
from mediation.sites import Site

if TYPE_CHECKING:
    from mediation.subject import SubjectModel

QUANTISED = re.compile(r"[.-](i?q\d\w*|bf16|f16|f32)$")  # how names of GGUF files end
ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "transcoder", "jumprelu_transcoder")
TRAINING_ARCHITECTURES = ("batchtopk", "matryoshka_batchtopk")  # saved for inference as jumprelu
LAYER_NORM_EPS = 1e-5  # SAELens adds it to the standard deviation on the way in and not on the way out
SINK_NORM = 10.0  # as SAE dashboards leave out
FLOOR_VARIANCE_EXPLAINED = 0.5
FLOOR_CROSS_ENTROPY_RECOVERED = 0.8
UNIT = 1e-6  # how far from 1 a decoder row's norm may be to count as 1
FEW = 16  # latents for each one that is on, where gathering rows beats the dense product
MAX_DENSE_LATENTS = 2**26  # latent values held at once while fidelity is measured (256 MiB)


@dataclass
class Split:
    """One activation taken apart: x = latents @ decoder + constant + error.

    latents [..., d_sae]; constant [..., d_model], b_dec unless activations are normalised at run time;
    error [..., d_model], what the dictionary misses.
    """

    latents: Tensor
    constant: Tensor
    error: Tensor


@dataclass
class Fidelity:
    """How well a dictionary stands in for the model on the tokens measured (BOS and padding left out)."""

    variance_explained: float  # 1 - sum |error|^2 / sum |x - mean x|^2
    l0: float  # latents on per token
    cross_entropy_recovered: float  # 1 = bare model, 0 = site set to zero; nan where zeroing does no harm
    tokens: int

    def __str__(self) -> str:
        return (
            f"variance explained {self.variance_explained:.3f}, L0 {self.l0:.1f}, "
            f"cross-entropy recovered {self.cross_entropy_recovered:.3f} ({self.tokens} tokens)"
        )


class Autoencoder:
    """A SAELens autoencoder in the one convention.

    decoder [d_sae, d_model]: unit-norm rows in model space (all-zero rows stay zero).
    encoder [d_sae, d_model]: d latent_i / d x with gates, thresholds and the run-time scale held.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self.architecture = sae.cfg.architecture()
        self.d_model, self.d_sae = sae.cfg.d_in, sae.cfg.d_sae
        self.normalisation: str = sae.cfg.normalize_activations
        self.sae = sae.requires_grad_(False).eval()
        sae.turn_off_forward_pass_hook_z_reshaping()  # values of attention heads come side by side here
        # The normalisation is done in `_normalise`, without state.
        sae.run_time_activation_norm_fn_in = lambda x: x

        norms = sae.W_dec.norm(dim=-1, keepdim=True)
        rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        unit = bool(((norms - 1).abs() < UNIT).all())  # then SAELens' own rows do, which saves their copy
        self.decoder = sae.W_dec.detach() if unit else torch.where(norms > 0, sae.W_dec / norms, 0.0)
        self.b_dec = sae.b_dec.detach()
        self._fold = torch.ones_like(norms[:, 0]) if rescaled else norms[:, 0]
        self._gain = norms * sae.r_mag.exp()[:, None] if self.architecture == "gated" else norms

    @property
    def encoder(self) -> Tensor:
        """All rows of the encoder, made anew at each call: `encoder_rows` is cheaper for some."""
        return self.encoder_rows(torch.arange(self.d_sae, device=self.decoder.device))

    def encoder_rows(self, latent: Tensor) -> Tensor:
        """The encoder's rows [n, d_model] of n latents (long)."""
        rows = self.sae.W_enc[:, latent].T * self._gain[latent]
        return rows - rows.mean(-1, keepdim=True) if self.normalisation == "layer_norm" else rows

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., d_sae] of x [..., d_model], in units of the unit-norm decoder rows."""
        z, scale, _ = self._normalise(x)
        return self.sae.encode(z) * self._fold * scale

    def split(self, x: Tensor, read: Tensor | None = None) -> Split:
        """Take x [..., d_model] apart so that latents @ decoder + constant + error is x.

        `read` [..., d_model] is what the latents are read off; x itself by default.
        """
        latents, constant = self.explain(x if read is None else read)
        return Split(latents, constant, x.to(latents) - self.decode(latents) - constant)

    def explain(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and constant of `split`, [..., d_sae] and [..., d_model], without the error, which costs a decode."""
        z, scale, shift = self._normalise(read)
        latents = self.sae.encode(z) * self._fold * scale
        return latents, (self.b_dec * scale + shift).expand(*read.shape[:-1], -1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents @ decoder, [..., d_model] of [..., d_sae]; where few are on, by those alone."""
        flat = latents.reshape(-1, latents.shape[-1])
        token, latent = flat.nonzero(as_tuple=True)
        if len(token) == 0 or FEW * len(token) > flat.numel():
            return latents @ self.decoder
        starts = torch.searchsorted(token, torch.arange(len(flat), device=token.device))
        values = flat[token, latent]
        written = torch.nn.functional.embedding_bag(latent, self.decoder, starts, per_sample_weights=values, mode="sum")
        return written.reshape(*latents.shape[:-1], -1)

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z as the SAE reads it, and the scale and shift [..., 1] that bring its output back."""
        x = x.to(self.decoder)
        if self.normalisation == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = (x - shift).std(-1, keepdim=True)
            return (x - shift) / (scale + LAYER_NORM_EPS), scale, shift
        if self.normalisation == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / math.sqrt(self.d_model)
            return x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale, torch.zeros_like(scale)
        return x, x.new_ones(()), x.new_zeros(())


class Dictionary(Autoencoder):
    """A sparse autoencoder, or a transcoder, at one site of one model.

    site, reads: where it writes, and where its latents are read off: the same but for a transcoder.
    content_hash: sha256 of the weight file, or of the loaded weights for a dictionary from the hub.
    folder: where its labels are kept: its own, or for a dictionary from the hub one in the hub's local cache.
    """

    def __init__(self, sae: SAE[Any], *, name: str, site: Site, content_hash: str, folder: Path | None = None) -> None:
        super().__init__(sae)
        self.reads = Site.parse(sae.cfg.metadata.hook_name) if is_transcoder(sae) else site
        self.name, self.site, self.content_hash, self.folder = name, site, content_hash, folder
        self.model_name: str | None = sae.cfg.metadata.model_name

    @classmethod
    def load(
        cls,
        source: str | Path,
        sae_id: str | None = None,
        *,
        device: str = "cpu",
        site: Site | None = None,
        allow_download: bool = False,
    ) -> Dictionary:
        """Load from a folder (`cfg.json`, `sae_weights.safetensors`) or by SAELens release and id.

        `site` is needed when the dictionary does not name its hook. Without `allow_download` a release is
        taken from the local Hugging Face cache only.
        """
        folder = Path(source)
        if sae_id is None:
            sae = open_folder(folder, device)
            name, digest = folder.resolve().name, weight_file_hash(folder)
        else:
            name = f"{source}/{sae_id}"
            folder = Path(huggingface_hub.constants.HF_HOME) / "latent-mediation" / name
            sae = _open_release(str(source), sae_id, device, allow_download)
            digest = _weights_hash(sae)
        return cls(sae, name=name, site=_resolve_site(sae, name, site), content_hash=digest, folder=folder)

    def rows(self, read: Tensor, latent: Tensor) -> Tensor:
        """What n latents (long) read off `read` [n, d_model]: their encoder rows [n, d_model], wherever they are."""
        return self.encoder_rows(latent)

    def check(self, model: SubjectModel) -> None:
        """Refuse (MediationError) a model of another width, too few layers, or another name."""
        if max(self.site.layer, self.reads.layer) >= model.n_layers:
            raise MediationError(
                f"Dictionary '{self.name}' sits at layer {self.site.layer} but model '{model.name}' has "
                f"{model.n_layers} layers, counted from 0; use a dictionary trained on this model."
            )
        for site, width in ((self.reads, self.d_model), (self.site, self.decoder.shape[1])):
            if width != model.width(site):
                raise MediationError(
                    f"Dictionary '{self.name}' has {width} dimensions at {site} but model '{model.name}' has "
                    f"{model.width(site)}; use a dictionary trained on this model."
                )
        if self.model_name and _plain_name(self.model_name) != _plain_name(model.name):
            raise MediationError(
                f"Dictionary '{self.name}' was trained on '{self.model_name}', not on '{model.name}'; load "
                f"that model, or correct model_name in the dictionary's cfg.json if they are the same."
            )


class Coordinates(Dictionary):
    """A site without a dictionary: its coordinates as latents, no error. What any dictionary has to beat."""

    def __init__(self, site: Site, d_model: int, device: str = "cpu") -> None:
        self.architecture, self.normalisation = "coordinates", "none"
        self.d_model = self.d_sae = d_model
        self.decoder = torch.eye(d_model, device=device)
        self.b_dec = torch.zeros(d_model, device=device)
        self.name, self.site, self.reads = f"{site.name}.coordinates", site, site
        self.content_hash, self.folder, self.model_name = "", None, None

    def encoder_rows(self, latent: Tensor) -> Tensor:
        """Those of the identity."""
        return self.decoder[latent]

    def encode(self, x: Tensor) -> Tensor:
        """The coordinates themselves, [..., d_model]."""
        return x.to(self.decoder)

    def explain(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """All of it is latents, [..., d_model]; the constant is zero."""
        latents = self.encode(read)
        return latents, torch.zeros_like(latents)


@torch.no_grad()
def measure_fidelity(
    model: SubjectModel,
    dictionary: Dictionary,
    tokens: Tensor,
    mask: Tensor,
    *,
    batch_size: int,
    skip_first: bool = True,
) -> Fidelity:
    """Fidelity on tokens [batch, pos] with mask [batch, pos] (true = real token).

    The dictionary is judged, and stands in, at real positions that are not BOS, nor the first one under
    `skip_first`, nor attention sinks, whose norms would drown all others in the variance; cross-entropy runs over
    all real next tokens. Warns below the floors.
    """
    mask = mask.bool()
    judged = mask if model.bos_id is None else mask & (tokens != model.bos_id)
    if skip_first:
        judged = judged & (torch.arange(tokens.shape[1], device=tokens.device) > 0)
    if int(judged.sum()) < 2:
        raise MediationError("Fidelity needs at least two real tokens after BOS; give longer prompts.")

    n = 0
    total = squares = torch.zeros(dictionary.d_model, dtype=torch.float64)
    error, active = 0.0, 0
    losses = torch.zeros(3, dtype=torch.float64)  # bare model, dictionary at the site, zeros at the site
    for rows in range(0, len(tokens), batch_size):
        batch, real = (t[rows : rows + batch_size].to(model.device) for t in (tokens, mask))
        clean = model.forward(batch, real, read=[dictionary.site, dictionary.reads])
        x, read = (clean.sites[site].to(dictionary.decoder) for site in (dictionary.site, dictionary.reads))
        here = judged[rows : rows + batch_size].to(x.device) & ~attention_sinks(x, real.to(x.device))
        n += int(here.sum())
        reconstruction = torch.zeros_like(x)
        reconstruction[here], batch_error, batch_active = _reconstruct(dictionary, x[here], read[here])
        error, active = error + batch_error, active + batch_active
        total, squares = (
            total + x[here].double().sum(0).cpu(),
            squares + x[here].double().square().sum(0).cpu(),
        )
        batch_losses = [_cross_entropy(clean.logits, batch, real)]
        clean.logits = None  # as wide as all else together, and two more come
        for value in (reconstruction, torch.zeros_like(x)):
            edit = {dictionary.site: partial(_replace, value=value, where=here[..., None])}
            batch_losses.append(_cross_entropy(model.forward(batch, real, edit=edit).logits, batch, real))
        losses += torch.tensor(batch_losses, dtype=torch.float64)

    if n < 2:
        raise MediationError("Fidelity found hardly a token that is no attention sink; give other prompts.")
    variance = (squares - total.square() / n).sum().item()
    bare, replaced, zeroed = losses.tolist()
    fidelity = Fidelity(
        variance_explained=1 - error / variance if variance > 0 else math.nan,
        l0=active / n,
        cross_entropy_recovered=(zeroed - replaced) / (zeroed - bare) if zeroed > bare else math.nan,
        tokens=n,
    )
    _warn_below_floor(dictionary, fidelity)
    return fidelity


def attention_sinks(x: Tensor, real: Tensor) -> Tensor:
    """Positions [B, T] whose norm is over `SINK_NORM` times that of their row's quiet ones (the lower quartile, which
    holds where most of a row are sinks: a run of end-of-text tokens); x [B, T, d], real [B, T].
    """
    norms = x.float().norm(dim=-1).masked_fill(~real, torch.nan)
    return norms > SINK_NORM * norms.nanquantile(0.25, dim=1, keepdim=True, interpolation="lower")


def _reconstruct(dictionary: Dictionary, x: Tensor, read: Tensor) -> tuple[Tensor, float, int]:
    """Reconstruction of x [n, d_model] from `read`, sum |error|^2 and count of latents on, in bounded memory."""
    reconstruction, error, active = [x[:0]], 0.0, 0
    size = max(1, MAX_DENSE_LATENTS // dictionary.d_sae)
    for piece, of_read in zip(x.split(size), read.split(size), strict=True):
        split = dictionary.split(piece, of_read)
        reconstruction.append(piece - split.error)
        error += split.error.double().square().sum().item()
        active += int((split.latents != 0).sum())
    return torch.cat(reconstruction), error, active


def _replace(site_value: Tensor, *, value: Tensor, where: Tensor) -> Tensor:
    return torch.where(where.to(site_value.device), value.to(site_value), site_value)


def _cross_entropy(logits: Tensor | None, tokens: Tensor, real: Tensor) -> float:
    """Summed next-token cross-entropy in nats, over pairs of real tokens."""
    assert logits is not None
    pairs = real[:, :-1] & real[:, 1:]
    total = 0.0
    for row, answers, kept in zip(logits, tokens[:, 1:], pairs, strict=True):  # row by row: logits are wide
        total += torch.nn.functional.cross_entropy(row[:-1][kept], answers[kept], reduction="sum").item()
    return total


def _warn_below_floor(dictionary: Dictionary, fidelity: Fidelity) -> None:
    low_variance = fidelity.variance_explained < FLOOR_VARIANCE_EXPLAINED
    if low_variance or fidelity.cross_entropy_recovered < FLOOR_CROSS_ENTROPY_RECOVERED:
        message = (
            f"Dictionary '{dictionary.name}' fits these prompts badly ({fidelity}; floors "
            f"{FLOOR_VARIANCE_EXPLAINED} and {FLOOR_CROSS_ENTROPY_RECOVERED}); was it trained on this model?"
        )
        warnings.warn(message, FidelityWarning, stacklevel=3)


def open_folder(folder: Path, device: str) -> SAE[Any]:
    """The float32 autoencoder of a folder in SAELens' layout, or MediationError with the reason."""
    if not folder.is_dir():
        raise MediationError(f"There is no folder '{folder}'; give a folder, or a SAELens release with an id.")
    for needed in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (folder / needed).is_file():
            pickled = any(folder.glob("*.pt")) or any(folder.glob("*.bin"))
            why = " (pickled weights are never opened: convert them with SAELens first)" if pickled else ""
            raise MediationError(f"The folder '{folder}' has no {needed}{why}; give one saved by SAELens.")
    try:
        sae = _read_folder(folder, device)
        scaler = folder / ACTIVATION_SCALER_CFG_FILENAME
        if sae.cfg.normalize_activations == "expected_average_only_in" and scaler.is_file():
            sae.fold_activation_norm_scaling_factor(float(json.loads(scaler.read_text())["scaling_factor"]))
    except Exception as reason:  # SAELens raises many types for a damaged folder
        first_line = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        raise MediationError(f"The dictionary in '{folder}' cannot be read: {first_line}") from reason
    _refuse_unsupported(sae, folder.resolve().name)
    return sae


def _read_folder(folder: Path, device: str) -> SAE[Any]:
    architecture = json.loads((folder / SAE_CFG_FILENAME).read_text()).get("architecture", "standard")
    if architecture not in TRAINING_ARCHITECTURES:
        return SAE.load_from_disk(folder, device=device, dtype="float32")
    checkpoint = TrainingSAE.load_from_disk(folder, device=device, dtype="float32")
    with tempfile.TemporaryDirectory() as inference:
        checkpoint.save_inference_model(inference)
        return SAE.load_from_disk(inference, device=device, dtype="float32")


def _open_release(release: str, sae_id: str, device: str, allow_download: bool) -> SAE[Any]:
    releases = get_pretrained_saes_directory()
    if release not in releases and "/" not in release:
        raise MediationError(f"SAELens knows no release '{release}'; its table of pretrained SAEs has the names.")
    if release in releases and sae_id not in releases[release].saes_map:
        some = ", ".join(list(releases[release].saes_map)[:3])
        raise MediationError(f"Release '{release}' has no dictionary '{sae_id}'; it has for example {some}.")
    try:
        with _hub(offline=not allow_download):
            sae = SAE.from_pretrained(release, sae_id, device=device, dtype="float32")
    except Exception as reason:  # SAELens and the hub raise many types for a missing or unreachable file
        remedy = "check the network" if allow_download else "allow the download (allow_download=True)"
        raise MediationError(
            f"The dictionary '{release}/{sae_id}' could not be opened "
            f"({type(reason).__name__}); {remedy} or give a local folder."
        ) from reason
    _refuse_unsupported(sae, f"{release}/{sae_id}")
    return sae


@contextmanager
def _hub(*, offline: bool) -> Iterator[None]:
    """SAELens has no switch for 'cached files only', so the hub client's own is set for the call."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _refuse_unsupported(sae: SAE[Any], name: str) -> None:
    architecture, normalisation = sae.cfg.architecture(), sae.cfg.normalize_activations
    if architecture not in ARCHITECTURES:
        raise MediationError(
            f"Dictionary '{name}' is of architecture '{architecture}'; use one of "
            f"{', '.join(ARCHITECTURES + TRAINING_ARCHITECTURES)}."
        )
    if normalisation == "covariance_whitening":
        raise MediationError(f"Dictionary '{name}' reads whitened activations; use one that reads the stream.")
    if is_transcoder(sae) and normalisation != "none":
        raise MediationError(f"Transcoder '{name}' normalises its input ({normalisation}); use one that does not.")
    if not all(bool(p.isfinite().all()) for p in sae.parameters()):
        raise MediationError(f"Dictionary '{name}' has weights that are not finite; get an undamaged copy.")
    if normalisation == "expected_average_only_in":
        warnings.warn(
            f"Dictionary '{name}' expects activations scaled by a factor that it does not carry; "
            f"if its fidelity is low, that is why.",
            FidelityWarning,
            stacklevel=3,
        )


def is_transcoder(sae: SAE[Any]) -> bool:
    """Whether it reads one site and writes to another."""
    return "transcoder" in sae.cfg.architecture()


def _resolve_site(sae: SAE[Any], name: str, site: Site | None) -> Site:
    """Where it writes."""
    if is_transcoder(sae) and not (sae.cfg.metadata.hook_name and sae.cfg.metadata.hook_name_out):
        raise MediationError(
            f"Transcoder '{name}' does not say where it reads and writes; name both in its cfg.json "
            f"(metadata: hook_name, hook_name_out)."
        )
    out = sae.cfg.metadata.hook_name_out if is_transcoder(sae) else None
    hook = out or sae.cfg.metadata.hook_name or sae.cfg.metadata.hf_hook_name
    if hook is None and site is None:
        raise MediationError(
            f"Dictionary '{name}' does not say where it reads: its cfg.json has no hook_name, or no "
            f"sae_lens_version, without which SAELens drops it; name the site when loading."
        )
    if hook is None or (site is not None and Site.parse(hook).canonical() == site.canonical()):
        assert site is not None
        return site
    if site is not None:
        raise MediationError(f"Dictionary '{name}' was trained at {hook}, not at {site.name}; drop the site.")
    return Site.parse(hook)


def _plain_name(model: str) -> str:
    """'openai-community/gpt2', 'gpt2' and TransformerLens' 'gpt2-small' are one model, and so is a GGUF file of it."""
    name = QUANTISED.sub("", model.rstrip("/").rsplit("/", 1)[-1].lower())
    try:
        return get_official_model_name(name).rsplit("/", 1)[-1].lower()
    except ValueError:
        return name


def weight_file_hash(folder: Path) -> str:
    """sha256 of the weights in a folder in SAELens' layout."""
    with (folder / SAE_WEIGHTS_FILENAME).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_hash(sae: SAE[Any]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(sae.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
