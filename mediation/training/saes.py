"""Training a sparse autoencoder on activations, with SAELens' trainer, into a folder SAELens opens.

1. `BatchTopK` (k latents a token on average; saved as JumpReLU with its learned threshold), `Matryoshka` (the same,
   with nested reconstructions, against absorption) or `TopK` (exactly k latents on each token).
2. The decoder's bias starts at the mean of the first batch, so that latents explain what varies.
3. Where it is asked for, activations are scaled to a mean norm of sqrt(d_model), which makes one learning rate fit
   every layer; the scale is folded into the weights at the end.
4. The rate falls to zero over the last third of the steps.
5. The inference form is saved. Its metadata names hook, model and SAELens version: without the version SAELens
   takes a folder for one of its early format and loses the hook's name.

The steps of the first two touch only the latents that fire: see mediation.training.sparse.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes import (
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mediation.errors import MediationError
from mediation.sites import Site
from mediation.training.sparse import SparseBatchTopK, SparseMatryoshka

DEAD_AFTER = 50  # steps; SAELens' default of 1000 would revive nothing in runs as short as these
MATRYOSHKA_LEVELS = (1 / 16, 1 / 4, 1.0)  # nested widths, as shares of all latents


@dataclass(frozen=True)
class SAESettings:
    """What an SAE is trained with. `bf16`: which latents fire is found by products in bfloat16; all else is fp32."""

    d_sae: int
    k: int
    steps: int
    architecture: str = "batchtopk"
    lr: float = 1e-3
    normalize: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise MediationError(f"There is no SAE trainer '{self.architecture}'; choose one of {known}.")
        if not 0 < self.k <= self.d_sae:
            raise MediationError(
                f"{self.k} active latents do not fit a dictionary of {self.d_sae}; choose a smaller k."
            )


ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "batchtopk": (SparseBatchTopK, BatchTopKTrainingSAEConfig),
    "matryoshka": (SparseMatryoshka, MatryoshkaBatchTopKTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
}


class SAETraining:
    """One SAE in training: give it batches, look at its figures, save it."""

    def __init__(
        self, settings: SAESettings, first: Tensor, *, device: str = "cpu", start: Tensor | None = None
    ) -> None:
        """first [batch, d_model] gives width, mean and scale. start [d_sae, d_model]: activations that the decoder
        rows begin at, encoder tied to them; random by default.
        """
        self.settings = settings
        torch.manual_seed(settings.seed)
        make, configure = ARCHITECTURES[settings.architecture]
        options: dict[str, Any] = {}
        if settings.architecture == "matryoshka":
            options["matryoshka_widths"] = [round(level * settings.d_sae) for level in MATRYOSHKA_LEVELS]
        self.sae = make(
            configure(
                d_in=first.shape[1],
                d_sae=settings.d_sae,
                k=settings.k,
                rescale_acts_by_decoder_norm=False,
                normalize_activations="expected_average_only_in" if settings.normalize else "none",
                device=device,
                **options,
            )
        )
        self.trainer = SAETrainer(
            cfg=_trainer_settings(settings, len(first), device), sae=self.sae, data_provider=iter([])
        )
        for group in self.trainer.optimizer.param_groups:  # one pass over memory where SAELens' default takes many
            group["foreach"], group["fused"] = False, True
        self.sae.bf16 = settings.bf16
        first = first.float()
        if settings.normalize:
            scale = math.sqrt(first.shape[1]) / float(first.norm(dim=1).mean())
            self.trainer.activation_scaler.scaling_factor = scale
            first = first * scale
        self.sae.b_dec.data = first.mean(dim=0).to(device)
        if start is not None:
            if start.shape != self.sae.W_dec.shape:
                raise MediationError(
                    f"{settings.d_sae} decoder rows cannot begin at activations of shape {tuple(start.shape)}; "
                    "give one per latent."
                )
            self.sae.W_dec.data = torch.nn.functional.normalize(start.to(device) - self.sae.b_dec, dim=1)
            self.sae.W_enc.data = self.sae.W_dec.T.clone().contiguous()
        self._last: Any = None

    def step(self, x: Tensor) -> None:
        """One optimiser step on x [batch, d_model]."""
        if not torch.isfinite(x).all():
            raise MediationError("The model's activations are not finite numbers; run it in another dtype.")
        self._last = self.trainer.step(x.float())
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Of the last batch: loss, variance_explained, l0; and dead, the share of latents silent for `DEAD_AFTER`."""
        out = self._last
        spread = (out.sae_in - out.sae_in.mean(dim=0)).square().sum()
        return {
            "loss": float(out.loss),
            "variance_explained": float(1 - (out.sae_in - out.sae_out).square().sum() / spread),
            "l0": float(out.feature_acts.bool().sum() / len(out.sae_in)),
            "dead": float(self.trainer.dead_neurons.float().mean()),
        }

    def save(self, folder: Path, site: Site, model_name: str) -> Path:
        """Write the inference form in one rename, so that a kill leaves no half-written dictionary. Ends training."""
        scaler = self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.sae.save_inference_model(str(partial))
        save_file({"sparsity": self.trainer.log_feature_sparsity}, partial / "sparsity.safetensors")
        _describe(partial / "cfg.json", site, model_name)
        partial.rename(folder)
        return folder

    def checkpoint(self, file: Path) -> None:
        """Everything needed to go on, as safetensors: weights, Adam's moments, counters."""
        tensors = {f"sae.{name}": value.contiguous() for name, value in self.sae.state_dict().items()}
        for index, state in self.trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        tensors["since_fired"] = self.trainer.n_forward_passes_since_fired
        tensors["frequencies"] = self.trainer.act_freq_scores
        counters = {
            "steps": self.trainer.n_training_steps,
            "samples": self.trainer.n_training_samples,
            "frequency_samples": self.trainer.n_frac_active_samples,
            "scale": self.trainer.activation_scaler.scaling_factor,
        }
        save_file(tensors, file, {"counters": json.dumps(counters)})

    def restore(self, file: Path) -> None:
        """Go on from `checkpoint`; the settings must be the same."""
        with safe_open(file, framework="pt", device=str(self.sae.device)) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            counters = json.loads(opened.metadata()["counters"])
        prefix = "sae."
        self.sae.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        optimizer = self.trainer.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, field = name.split(".")
                optimizer["state"].setdefault(int(index), {})[field] = value
        self.trainer.optimizer.load_state_dict(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no optimiser step came before
            for _ in range(counters["steps"]):  # the schedule is a function of the step: no state of its own to keep
                self.trainer.lr_scheduler.step()
        self.trainer.n_forward_passes_since_fired = tensors["since_fired"]
        self.trainer.act_freq_scores = tensors["frequencies"]
        self.trainer.n_training_steps = counters["steps"]
        self.trainer.n_training_samples = counters["samples"]
        self.trainer.n_frac_active_samples = counters["frequency_samples"]
        self.trainer.activation_scaler.scaling_factor = counters["scale"]
        self.sae.steps_averaged = counters["steps"]


def train_sae(
    data: Iterator[Tensor],
    folder: str | Path,
    settings: SAESettings,
    *,
    site: Site,
    model_name: str,
    device: str = "cpu",
    start: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Train on `settings.steps` batches [batch, d_model]; returns the folder. See `SAETraining` for `start`."""
    folder = Path(folder)
    first = next(data)
    training = SAETraining(settings, first, device=device, start=start)
    for done, batch in zip(range(settings.steps), chain([first], data), strict=False):
        training.step(batch)
        progress(done + 1, settings.steps)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return training.save(folder, site, model_name)


def _trainer_settings(settings: SAESettings, batch: int, device: str) -> SAETrainerConfig:
    logging.getLogger("sae_lens").setLevel(logging.WARNING)
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=settings.steps * batch,
        train_batch_size_samples=batch,
        device=device,
        autocast=False,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=min(100, settings.steps // 10),
        lr_decay_steps=settings.steps // 3,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        dead_feature_window=DEAD_AFTER,
        feature_sampling_window=max(settings.steps + 1, 2000),
        logger=LoggingConfig(log_to_wandb=False),
    )


def _describe(file: Path, site: Site, model_name: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["metadata"] |= {
        "hook_name": site.name,
        "model_name": model_name,
        "sae_lens_version": sae_lens_version,
        "sae_lens_training_version": sae_lens_version,
    }
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
