"""Meta-latents: the facts inside a latent, found by decomposing decoder rows.

A decoder row is written as w_i = b + sum_j z_ij u_j + r_i, with unit directions u_j, codes z_ij and the
residual r_i kept. Two ways to get there, one interface (`Decomposition`):

`MetaDictionary`, a BatchTopK autoencoder trained on the rows (Bussmann et al. 2024, "Showing SAE latents are
not atomic using meta-SAEs"; BatchTopK: Bussmann, Leask and Nanda 2024):
1. Drop all-zero rows, scale the others to unit norm.
2. Start from random unit directions, encoder tied to them (starting from data rows does worse). The bias is held
   at 0, or at the mean row, and not learned: rows of about k facts each can trade it against a shift common to
   all directions, and where it was learned planted directions came back at cosine .80 only.
3. Each step: z = the k * batch largest of relu((w - b) E) over the batch, with 2 k falling to k over the first
   half; loss = |w - b - z U|^2, plus 1/16 of the error left when directions that have been silent for 50 steps
   explain the residual. Adam; the part of the gradient along a direction is removed and the direction rescaled
   to unit norm; the rate falls to 0 over the last fifth.
4. Fix one threshold so that on average k codes per row are on over all rows. Codes then depend on nothing but
   their row, and the whole is a JumpReLU autoencoder in SAELens' format.
5. Repeat from other starts; keep the one that reconstructs best.

`MatchingPursuit`, the baseline without training (Pati et al. 1993): each row as k other rows of a dictionary.
1. Take the direction with the largest positive inner product with the residual, never the row's own.
2. Refit all coefficients by least squares; repeat k times. k = 1 is the nearest row.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from torch.nn.functional import normalize

from mediation.dictionaries import Autoencoder, Dictionary, open_folder, weight_file_hash
from mediation.errors import FidelityWarning, MediationError

FEW_ROWS = 200  # below, planted meta-latents were recovered only half of the time
TRAINED_ON = "decoder rows"  # how a meta-dictionary's metadata tells it from a dictionary
DEAD_AFTER = 50  # steps without firing
DEAD_WEIGHT = 1 / 16
MIN_BATCH, MAX_BATCH = 256, 16384
MAX_DENSE = 2**26  # numbers in one block of inner products (256 MiB)

Progress = Callable[[int, int], None]


@dataclass
class Parts:
    """Rows taken apart: rows = codes @ directions + bias + residual.

    codes [n, n_meta], bias [d], residual [n, d].
    """

    codes: Tensor
    bias: Tensor
    residual: Tensor


class Decomposition(Protocol):
    """A way to write rows [n, d] as sums of few unit directions [n_meta, d] around a bias [d]."""

    directions: Tensor
    bias: Tensor

    @abstractmethod
    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """Codes [n, n_meta] of rows [n, d].

        own [n]: each row's index among the directions, not to be used for it.
        """

    def decompose(self, rows: Tensor, own: Tensor | None = None) -> Parts:
        """Take rows [n, d] apart exactly; `own` as in `codes`."""
        rows = rows.to(self.directions)
        codes = self.codes(rows, own)
        return Parts(codes, self.bias, rows - codes @ self.directions - self.bias)

    def variance_explained(self, rows: Tensor, own: Tensor | None = None) -> float:
        """1 - sum |residual|^2 / sum |row - mean row|^2; below 0 if the mean does better."""
        residual = self.decompose(rows, own).residual
        return 1 - (residual.square().sum() / (rows - rows.mean(0)).square().sum()).item()


class MetaDictionary(Decomposition):
    """A meta-SAE: an autoencoder on the decoder rows of a dictionary.

    directions [d_meta, d_model], unit rows; bias [d_model]; base_hash: content hash of the dictionary whose
    rows it was trained on, where known; content_hash: sha256 of its weight file, None until saved or loaded;
    metadata: SAELens' notes in cfg.json; what `mediation train meta` adds is listed in mediation.training.meta.
    """

    def __init__(self, sae: SAE[Any], *, name: str = "meta", content_hash: str | None = None) -> None:
        self._autoencoder = Autoencoder(sae)
        self.name, self.content_hash = name, content_hash
        self.metadata: SAEMetadata = sae.cfg.metadata
        self.base_hash: str | None = self.metadata.base_hash
        self.d_model, self.d_meta = self._autoencoder.d_model, self._autoencoder.d_sae
        self.directions, self.bias = self._autoencoder.decoder, self._autoencoder.b_dec

    @classmethod
    def train(
        cls,
        rows: Tensor,
        *,
        width: int,
        k: int,
        steps: int = 2000,
        batch: int | None = None,
        lr: float = 3e-3,
        seed: int = 0,
        restarts: int = 3,
        center: bool = False,
        base_hash: str | None = None,
        progress: Progress = lambda done, of: None,
    ) -> MetaDictionary:
        """Train on rows [n, d], on their device, `restarts` times; the best reconstruction is kept.

        width: number of meta-latents; too few merges facts and ruins the rest, too many is harmless (the
        surplus stays silent), so aim at 1.5 times the facts expected. k: meta-latents per row, on average.
        batch: rows per step, by default an eighth of the rows but at least 256. center: hold the bias at the
        mean row and not at 0, for rows that are mostly one common direction. progress: called with (steps done,
        of). Warns below 200 rows.
        """
        rows = checked_rows(rows)
        if not 1 <= k < width:
            raise MediationError(f"A meta-SAE of width {width} cannot use {k} per row; make 1 <= k < width.")
        bias = rows.mean(0) if center else torch.zeros_like(rows[0])
        batch = batch or min(max(MIN_BATCH, len(rows) // 8), MAX_BATCH)
        starts = []
        for at in range(restarts):

            def tick(step: int, before: int = at * steps) -> None:
                progress(before + step, restarts * steps)

            weights = _fit(rows - bias, width, k, steps, batch, lr, seed * restarts + at, tick)
            starts.append(_to_sae(weights, bias, k, base_hash))
        return max(map(cls, starts), key=lambda meta: meta.variance_explained(rows))

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> MetaDictionary:
        """Load a folder in SAELens' format; any architecture without activation normalisation will do."""
        folder = Path(folder)
        sae = open_folder(folder, device)
        if sae.cfg.normalize_activations != "none":
            raise MediationError(
                f"The meta-SAE in '{folder}' normalises its input, so its bias is not constant; "
                "use one trained with normalize_activations 'none'."
            )
        return cls(sae, name=folder.resolve().name, content_hash=weight_file_hash(folder))

    def save(self, folder: str | Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` opens."""
        self._autoencoder.sae.save_model(folder)
        self.content_hash = weight_file_hash(Path(folder))

    def check(self, dictionary: Dictionary) -> None:
        """Refuse (MediationError) a dictionary of another width, or not the one it was trained on."""
        if self.d_model != dictionary.d_model:
            raise MediationError(
                f"Meta-SAE '{self.name}' reads {self.d_model} dimensions but dictionary '{dictionary.name}' "
                f"has {dictionary.d_model}; train a meta-SAE on this dictionary."
            )
        bases = {self.base_hash} if self.base_hash else set(self.metadata.dictionaries or ())
        if bases and dictionary.content_hash not in bases:
            raise MediationError(
                f"Meta-SAE '{self.name}' was trained on another dictionary than '{dictionary.name}'; "
                "train a meta-SAE on this dictionary."
            )

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """Codes [n, d_meta] of unit rows [n, d_model]; `own` has no meaning here, directions are not rows."""
        return self._autoencoder.encode(rows)


class MatchingPursuit(Decomposition):
    """Orthogonal matching pursuit over given directions, such as a dictionary's own rows. bias is 0."""

    def __init__(self, directions: Tensor, k: int) -> None:
        """directions [n_meta, d], scaled to unit norm here; k: how many make up a row (1: the nearest)."""
        if not 1 <= k <= len(directions):
            raise MediationError(f"A row cannot be made of {k} out of {len(directions)} directions; change k.")
        self.directions = normalize(directions.float(), dim=1)
        self.bias = torch.zeros_like(self.directions[0])
        self.k = k

    def codes(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        codes = self.directions.new_zeros(len(rows), len(self.directions))
        size = max(1, MAX_DENSE // len(self.directions))
        for start in range(0, len(rows), size):
            here = slice(start, start + size)
            codes[here] = self._pursue(rows[here].to(self.directions), None if own is None else own[here])
        return codes

    def _pursue(self, rows: Tensor, own: Tensor | None) -> Tensor:
        codes = rows.new_zeros(len(rows), len(self.directions))
        chosen = torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)
        useful = torch.empty(len(rows), 0, dtype=torch.bool, device=rows.device)
        residual, coefficients = rows, rows.new_zeros(len(rows), 0)
        floor = 1e-5 * rows.norm(dim=1)
        for _ in range(self.k):
            products = residual @ self.directions.T
            products.scatter_(1, chosen, -torch.inf)
            if own is not None:
                products.scatter_(1, own[:, None].to(products.device), -torch.inf)
            best = products.max(dim=1)
            chosen = torch.cat([chosen, best.indices[:, None]], dim=1)
            # A row that is already explained takes nothing more: the direction enters as zeros.
            useful = torch.cat([useful, (best.values > floor)[:, None]], dim=1)
            atoms = self.directions[chosen] * useful[..., None]  # [n, chosen, d]
            gram, products = (atoms @ atoms.mT).double(), (atoms @ rows[..., None]).double()
            coefficients = (torch.linalg.pinv(gram, hermitian=True) @ products)[..., 0].to(rows)
            residual = rows - (coefficients[:, None] @ atoms)[:, 0]
        return codes.scatter_add_(1, chosen, coefficients)


@dataclass
class LinearSplit:
    """A latent's first-order attribution over its parts: meta [n, n_meta], bias [n], residual [n]."""

    meta: Tensor
    bias: Tensor
    residual: Tensor


def linear_split(delta: Tensor, gradient: Tensor, parts: Parts, directions: Tensor) -> LinearSplit:
    """delta_i (g_i . w_i) = sum_j meta_ij + bias_i + residual_i, to rounding error.

    delta [n]: the latents' change; gradient [n, d]: the behaviour's gradient where each latent sits; parts of
    their rows w [n, d]; directions [n_meta, d].
    """
    return LinearSplit(
        delta[:, None] * parts.codes * (gradient @ directions.T),
        delta * (gradient @ parts.bias),
        delta * (gradient * parts.residual).sum(1),
    )


def rotated(rows: Tensor, seed: int) -> Tensor:
    """The null: every row [n, d] turned on its own to a random direction, so that rows share nothing."""
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return normalize(noise, dim=1).to(rows) * rows.norm(dim=1, keepdim=True)


@dataclass
class _Weights:
    encoder: Tensor  # [d, width]
    directions: Tensor  # [width, d], unit rows
    threshold: float


def checked_rows(rows: Tensor) -> Tensor:
    """Step 1: the rows [n, d] that are not all zero, at unit norm. Warns below 200."""
    if rows.dim() != 2 or not rows.isfinite().all():
        raise MediationError("A meta-SAE is trained on a table of finite decoder rows; check the dictionary.")
    rows = normalize(rows[rows.any(1)].float(), dim=1)
    if len(rows) < 2:
        raise MediationError("Fewer than two decoder rows are not zero; there is nothing to decompose.")
    if len(rows) < FEW_ROWS:
        warnings.warn(
            f"{len(rows)} decoder rows are few for a meta-SAE (aim at {FEW_ROWS} or more); "
            "compare with MatchingPursuit.",
            FidelityWarning,
            stacklevel=3,
        )
    return rows


def _fit(
    rows: Tensor, width: int, k: int, steps: int, batch: int, lr: float, seed: int, tick: Callable[[int], None]
) -> _Weights:
    """Steps 2 to 4, on rows less the bias. tick: called with the steps done."""
    generator = torch.Generator().manual_seed(seed)
    start = normalize(torch.randn(width, rows.shape[1], generator=generator), dim=1).to(rows.device)
    directions = start.clone().requires_grad_()
    encoder = start.T.clone().requires_grad_()
    adam = torch.optim.Adam([encoder, directions], lr=lr, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: min(1.0, 5 * (1 - t / steps)))
    silent = torch.zeros(width, dtype=torch.long, device=rows.device)
    for step in range(steps):
        on = min(round(k * batch * max(1.0, 2 - 2 * step / steps)), width * batch)
        w = rows[torch.randint(len(rows), (batch,), generator=generator).to(rows.device)]
        inputs = w @ encoder
        cut = inputs.flatten().topk(on).values[-1].clamp_min(0)
        z = torch.where(inputs >= cut, inputs, 0).relu()
        residual = w - z @ directions
        silent = torch.where(z.any(0), 0, silent + 1)
        loss = residual.square().sum(1).mean()
        dead = silent >= DEAD_AFTER
        if dead.any():
            loss = loss + DEAD_WEIGHT * _dead_loss(residual.detach(), inputs, directions, dead)
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = directions.grad
            assert gradient is not None
            gradient -= (gradient * directions).sum(1, keepdim=True) * directions
            adam.step()
            directions.copy_(normalize(directions, dim=1))
        decay.step()
        tick(step + 1)
    encoder, directions = encoder.detach(), directions.detach()
    # Half-way between the last code that is on and the first that is off.
    border = (rows @ encoder).relu().flatten().topk(k * len(rows) + 1).values[-2:]
    return _Weights(encoder, directions, border.mean().item())


def _dead_loss(residual: Tensor, inputs: Tensor, directions: Tensor, dead: Tensor) -> Tensor:
    """Error left when the most excited silent directions, d / 2 at most, explain the residual."""
    size = min(int(dead.sum()), directions.shape[1] // 2)
    excited = inputs.masked_fill(~dead, -torch.inf).topk(size, dim=1)
    z = torch.zeros_like(inputs).scatter(1, excited.indices, excited.values)
    return (residual - z @ directions).square().sum(1).mean()


def _to_sae(weights: _Weights, bias: Tensor, k: int, base_hash: str | None) -> JumpReLUSAE:
    width, d = weights.directions.shape
    about = SAEMetadata(training_architecture="batchtopk", trained_on=TRAINED_ON, k=k, base_hash=base_hash)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=width, device=str(bias.device), metadata=about))
    sae.load_state_dict(
        {
            "W_enc": weights.encoder,
            "W_dec": weights.directions,
            "b_enc": torch.zeros_like(weights.directions[:, 0]),
            "b_dec": bias,
            "threshold": torch.full_like(weights.directions[:, 0], weights.threshold),
        }
    )
    return sae
