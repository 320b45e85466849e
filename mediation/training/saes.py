"""Training a sparse autoencoder on activations, with SAELens' trainer, into a folder SAELens opens.

1. `TopK` (exactly k latents on each token) or `BatchTopK` (k on average; saved as JumpReLU with its learned threshold).
2. The decoder's bias starts at the mean of the first batch, so that latents explain what varies.
3. The rate falls to a tenth over the last third of the steps.
4. The inference form is saved. Its metadata names hook, model and SAELens version: without the version SAELens
   takes a folder for one of its early format and loses the hook's name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from mediation.errors import MediationError
from mediation.sites import Site

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}
DEAD_AFTER = 50  # steps; SAELens' default of 1000 would revive nothing in runs as short as these


def train_sae(
    data: Iterator[Tensor],
    folder: str | Path,
    *,
    site: Site,
    model_name: str,
    d_sae: int,
    k: int,
    steps: int,
    architecture: str = "batchtopk",
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    start: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Train on `steps` batches [batch, d_model] of fp32 activations; returns the folder.

    start [d_sae, d_model]: activations that the decoder rows begin at, encoder tied to them; random by default.
    The folder gets its files in one rename, so that a killed training leaves no half-written dictionary.
    """
    if architecture not in ARCHITECTURES:
        raise MediationError(f"There is no SAE trainer '{architecture}'; choose {' or '.join(ARCHITECTURES)}.")
    folder = Path(folder)
    first = next(data)
    torch.manual_seed(seed)
    make, configure = ARCHITECTURES[architecture]
    sae = make(configure(d_in=first.shape[1], d_sae=d_sae, k=k, rescale_acts_by_decoder_norm=False, device=device))
    sae.b_dec.data = first.mean(dim=0).to(device)
    if start is not None:
        if start.shape != sae.W_dec.shape:
            raise MediationError(
                f"{d_sae} decoder rows cannot begin at activations of shape {tuple(start.shape)}; give one per latent."
            )
        sae.W_dec.data = torch.nn.functional.normalize(start.to(device) - sae.b_dec, dim=1)
        sae.W_enc.data = sae.W_dec.T.clone().contiguous()
    trainer = SAETrainer(
        cfg=_settings(steps, len(first), lr, device),
        sae=sae,
        data_provider=_counted(chain([first], data), steps, progress),
    )
    # The trainer's own bar would be a second one beside `progress`.
    trainer.cfg.logger.log_to_wandb = False
    logging.getLogger("sae_lens").setLevel(logging.WARNING)
    trainer.fit()
    partial = folder.with_name(f".{folder.name}.partial")
    sae.save_inference_model(str(partial))
    _describe(partial / "cfg.json", site, model_name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    return folder


def _settings(steps: int, batch: int, lr: float, device: str) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        device=device,
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=min(100, steps // 10),
        lr_decay_steps=steps // 3,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        dead_feature_window=DEAD_AFTER,
        feature_sampling_window=max(steps + 1, 2000),
        logger=LoggingConfig(log_to_wandb=False),
    )


def _counted(data: Iterator[Tensor], steps: int, progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    for done, batch in enumerate(data):
        progress(min(done, steps), steps)
        yield batch


def _describe(file: Path, site: Site, model_name: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["metadata"] |= {
        "hook_name": site.name,
        "model_name": model_name,
        "sae_lens_version": sae_lens_version,
        "sae_lens_training_version": sae_lens_version,
    }
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
