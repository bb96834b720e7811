"""The training loop, visible from top to bottom. The only importer of accelerate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from tilenet.training.checkpoint import RunState, read_checkpoint, write_checkpoint
from tilenet.training.config import TrainConfig
from tilenet.training.datasets import Item, TrainWindows, ValWindows
from tilenet.training.losses import Loss
from tilenet.training.metrics import Scores, confusion
from tilenet.training.network import keep_depthwise_in_float32
from tilenet.training.tracking import Tracker, write_history

__all__ = ["Progress", "Trainer", "TrainingPlan"]

_logger = logging.getLogger(__name__)
_CHECKPOINT_SECONDS = 600.0
_PLATEAU_EPOCHS, _PLATEAU_FACTOR, _LOWEST = 5, 0.5, 1e-3
_EMA_LONGEST = 500.0

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with steps done, all steps, and the figures to show."""


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop works on.

    Parameters
    ----------
    config : TrainConfig
        With nothing left on "auto" but the loss.
    channels, classes : int
        Of the network; of the labels.
    steps : int
        Per epoch.
    class_weights : list of float or None
        For the loss.
    out : Path
        The run's folder.
    """

    config: TrainConfig
    channels: int
    classes: int
    steps: int
    class_weights: list[float] | None
    out: Path

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.steps * self.config.epochs

    def rate(self, step: int, factor: float) -> float:
        """Return the learning rate of a step: warm-up, then the schedule."""
        config = self.config
        warm = round(config.warmup * self.total)
        if step < warm:
            return config.lr * (step + 1) / warm
        if config.schedule == "cosine":
            share = (step - warm) / max(1, self.total - warm)
            return config.lr * max(0.01, 0.5 * (1 + math.cos(math.pi * share)))
        return config.lr * factor

    @property
    def ema_decay(self) -> float:
        """How much of the average a step keeps; short runs need a shorter memory."""
        return 1 - 1 / max(1.0, min(_EMA_LONGEST, self.total * self.config.ema))


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Forbid what gives other bytes each time; on CUDA, only where torch has another way."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def classify(logits: Tensor) -> Tensor:
    """Return classes, (N, H, W) uint8, of logits, (N, K, H, W), as predict decides them."""
    if logits.shape[1] == 1:
        return (logits[:, 0] >= 0).to(torch.uint8)
    return logits.argmax(1).to(torch.uint8)


class Trainer:
    """One run: network, optimiser, average, state.

    Parameters
    ----------
    plan : TrainingPlan
        What to do.
    network : nn.Module
        Changed in place.
    tracker : Tracker
        Takes a row per epoch.
    progress : Progress
        Called after every step.
    """

    def __init__(
        self, plan: TrainingPlan, network: nn.Module, tracker: Tracker, progress: Progress
    ) -> None:
        config = plan.config
        self.plan, self.state = plan, RunState()
        self._tracker, self._progress = tracker, progress
        self._accelerator = Accelerator(
            mixed_precision={"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.precision],
            cpu=config.device == "cpu",
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        self._averaging = config.ema > 0
        averaging = get_ema_multi_avg_fn(plan.ema_decay)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(network, multi_avg_fn=averaging, use_buffers=True).to(
            self._accelerator.device
        )
        if config.device == "cpu" and config.precision == "bf16":
            keep_depthwise_in_float32(network)  # after the average has copied the plain network
        network = network.to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(
            network.parameters(), config.lr, weight_decay=config.weight_decay
        )
        self._network, self._optimiser = self._accelerator.prepare(network, optimiser)
        self._loss = Loss(config.loss_terms(plan.channels), plan.channels, plan.class_weights)

    @property
    def _plain(self) -> nn.Module:
        network: nn.Module = self._accelerator.unwrap_model(self._network)
        return network

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights that are judged and kept."""
        if self._averaging:
            return self.average.module.state_dict()
        return self._plain.state_dict()

    def save(self, path: Path) -> None:
        """Write a checkpoint, from one process."""
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        tensors = {
            "network": self._plain.state_dict(),
            "average": self.average.state_dict() if self._averaging else None,
            "optimiser": self._optimiser.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        write_checkpoint(path, self.state, tensors)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.state, tensors = read_checkpoint(path)
        self._plain.load_state_dict(tensors["network"])
        if self._averaging:
            self.average.load_state_dict(tensors["average"])
        self._optimiser.load_state_dict(tensors["optimiser"])
        if self._accelerator.scaler is not None and tensors["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(tensors["scaler"])

    def _loader(self, windows: TrainWindows | ValWindows, first: int = 0) -> Any:
        config = self.plan.config
        loader: DataLoader[Item] = DataLoader(
            windows,
            batch_size=config.batch_size,
            sampler=range(first, len(windows)),  # the order is the index: nothing to shuffle
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            pin_memory=config.device != "cpu",
            # A fork of a process with threads may hang; a server that never had any may not.
            multiprocessing_context="forkserver" if config.workers else None,
        )
        return self._accelerator.prepare_data_loader(loader)

    def _step(self, batch: Item) -> float:
        config, state = self.plan.config, self.state
        # Dropout is a function of seed and step, so that a resumed run repeats it.
        torch.manual_seed(config.seed * 1_000_003 + state.step)
        for group in self._optimiser.param_groups:
            group["lr"] = self.plan.rate(state.step, state.factor)
        images = batch["image"].contiguous(memory_format=torch.channels_last)  # (N, C, T, T)
        with self._accelerator.autocast():
            logits = self._network(images)  # (N, K, ≥ t, ≥ t)
        side = batch["target"].shape[-1]
        loss = self._loss(logits[..., :side, :side], batch["target"], batch.get("weight"))
        self._optimiser.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        if config.clip:
            self._accelerator.clip_grad_norm_(self._network.parameters(), config.clip)
        self._optimiser.step()
        if self._averaging:
            self.average.update_parameters(self._plain)
        return float(loss.detach())

    @torch.inference_mode()
    def validate(self, windows: ValWindows) -> Scores:
        """Return the figures of the judged weights on the validation windows."""
        network = self.average.module if self._averaging else self._plain
        network.eval()
        total = np.zeros((self.plan.classes, self.plan.classes + 1), np.int64)
        for batch in self._loader(windows):
            images = batch["image"].contiguous(memory_format=torch.channels_last)
            with self._accelerator.autocast():
                logits = network(images)
            side = batch["target"].shape[-1]
            pred = classify(logits[..., :side, :side].float())
            both = self._accelerator.gather_for_metrics((batch["target"], pred))
            truth, found = (part.cpu().numpy() for part in both)
            total += confusion(truth, found, self.plan.classes)
        return Scores(total)

    def _end_epoch(self, epoch: int, windows: ValWindows) -> None:
        state, plan = self.state, self.plan
        scores = self.validate(windows)
        dice = scores.object_dice
        row = {
            "epoch": epoch,
            "step": state.step,
            "lr": plan.rate(state.step - 1, state.factor),
            "loss": round(state.loss_sum / plan.steps, 6),
            "val_dice": round(dice, 6),
            "val_mean_dice": round(scores.mean(scores.dice), 6),
            "val_mean_iou": round(scores.mean(scores.iou), 6),
            "val_accuracy": round(scores.accuracy, 6),
        }
        state.history.append(row)
        state.loss_sum, state.stale = 0.0, state.stale + 1
        better = dice > state.best_dice
        if better:
            state.best_dice, state.best_epoch, state.stale = dice, epoch, 0
        elif plan.config.schedule == "plateau" and state.stale % _PLATEAU_EPOCHS == 0:
            state.factor = max(_LOWEST, state.factor * _PLATEAU_FACTOR)
        if self._accelerator.is_main_process:
            self._tracker.log(row)
            write_history(plan.out / "metrics.csv", state.history)
        # best first: a kill between the two repeats the epoch and writes the same best again.
        if better:
            self._save_best()
        self.save(plan.out / "checkpoints" / "last.pt")
        _logger.info(
            "epoch %d of %d: loss %.4f, validation Dice %.4f%s",
            epoch, plan.config.epochs, row["loss"], dice, " (best)" if better else "",
        )  # fmt: skip

    def _save_best(self) -> None:
        if self._accelerator.is_main_process:
            path = self.plan.out / "checkpoints" / "best.pt"
            write_checkpoint(path, self.state, {"network": self._weights()})

    def _finished(self) -> bool:
        patience = self.plan.config.patience
        waiting = bool(patience) and self.state.stale >= patience
        between = self.state.step % self.plan.steps == 0
        return self.state.step >= self.plan.total or (waiting and between)

    def fit(self, train: TrainWindows, val: ValWindows) -> None:
        """Train to the end, or until validation stops getting better.

        Parameters
        ----------
        train, val
            All windows of the run; those of one validation.
        """
        plan, state = self.plan, self.state
        if self._finished():
            return
        saved = time.monotonic()
        with _deterministic(plan.config.device):
            batches = iter(self._loader(train, state.step * plan.config.batch_size))
            self._network.train()
            while not self._finished():
                start = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - start
                loss = self._step(batch)
                state.seconds += time.perf_counter() - start
                state.wait_seconds += waited
                state.loss_sum += loss
                state.step += 1
                shown = {"loss": loss, "dice": max(0.0, state.best_dice)}
                self._progress(state.step, plan.total, shown)
                if state.step % plan.steps == 0:
                    self._end_epoch(state.step // plan.steps, val)
                    self._network.train()
                    saved = time.monotonic()
                elif time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self.save(plan.out / "checkpoints" / "last.pt")
                    saved = time.monotonic()
