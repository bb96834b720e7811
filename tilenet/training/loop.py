"""The training loop, visible from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tilenet.classes import NODATA
from tilenet.errors import ModelError, OutputError
from tilenet.training.checkpoint import BEST, LAST, RunState, read_checkpoint, write_checkpoint
from tilenet.training.datasets import Item, TrainWindows, ValWindows
from tilenet.training.losses import Loss
from tilenet.training.metrics import Scores
from tilenet.training.network import keep_depthwise_in_float32
from tilenet.training.schedule import Schedule
from tilenet.training.tracking import Tracker, write_history
from tilenet.training.work import Work
from tilenet.training.workers import end_with_parent, worker_context

__all__ = ["Progress", "Trainer"]


_logger = logging.getLogger(__name__)
_CHECKPOINT_SECONDS = 120.0
_PREFETCHED_BATCHES = 4

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with steps done, all steps, and the figures to show."""


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Forbid what gives other bytes each time; CUDA would need its environment changed for it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _classify(logits: Tensor) -> Tensor:
    """Return classes, (N, H, W), of logits, (N, K, H, W), as predict decides them."""
    return (logits[:, 0] >= 0).long() if logits.shape[1] == 1 else logits.argmax(1)


class Trainer:
    """One run: network, optimiser, average, state.

    Parameters
    ----------
    work : Work
        What is trained; its network is changed in place.
    out : Path
        The run's folder.
    tracker : Tracker
        Takes a row per epoch.
    progress : Progress
        Called after every step.
    """

    def __init__(self, work: Work, out: Path, tracker: Tracker, progress: Progress) -> None:
        config = self._config = work.config
        self._work, self._out = work, out
        self._tracker, self._progress = tracker, progress
        self.schedule = Schedule(config)
        self.state = RunState(data=work.found.fingerprint)
        if config.device.startswith("cuda:"):
            torch.cuda.set_device(config.device)  # accelerate takes the current one
        self._accelerator = Accelerator(
            mixed_precision={"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.precision],
            cpu=config.device == "cpu",
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        self._averaging = config.ema > 0
        averaging = get_ema_multi_avg_fn(self.schedule.memory)  # type: ignore[no-untyped-call]  # torch
        self._average = AveragedModel(
            work.network, multi_avg_fn=averaging, use_buffers=True
        ).to(self._accelerator.device)  # fmt: skip
        if config.device == "cpu" and config.precision == "bf16":
            keep_depthwise_in_float32(work.network)  # after the average has copied the plain one
        network = work.network.to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(
            network.parameters(), config.lr, weight_decay=config.weight_decay
        )
        self._network, self._optimiser = self._accelerator.prepare(network, optimiser)
        self._loss = Loss(config.loss_terms(work.channels), work.channels, work.class_weights)

    @property
    def _plain(self) -> nn.Module:
        network: nn.Module = self._accelerator.unwrap_model(self._network)
        return network

    @property
    def _judged(self) -> nn.Module:
        """The network whose weights are validated and kept."""
        return self._average.module if self._averaging else self._plain

    def _save(self) -> None:
        """Write the last checkpoint, from one process."""
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        tensors = {
            "network": self._plain.state_dict(),
            "average": self._average.state_dict() if self._averaging else None,
            "optimiser": self._optimiser.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        write_checkpoint(self._out / LAST, self.state, tensors)

    def load(self) -> None:
        """Go on from the last checkpoint.

        Raises
        ------
        OutputError
            It is damaged, or the data set is another one now.
        """
        self.state, tensors = read_checkpoint(self._out / LAST)
        if self.state.data != self._work.found.fingerprint:
            raise OutputError(
                "the data have changed since the run began", self._out, "--overwrite begins anew"
            )
        self._plain.load_state_dict(tensors["network"])
        if self._averaging:
            self._average.load_state_dict(tensors["average"])
        self._optimiser.load_state_dict(tensors["optimiser"])
        if self._accelerator.scaler is not None and tensors["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(tensors["scaler"])

    def _loader(self, windows: TrainWindows | ValWindows, first: int = 0) -> Any:
        config = self._config
        loader: DataLoader[Item] = DataLoader(
            windows,
            batch_size=config.batch_size,
            sampler=range(first, len(windows)),  # the order is the index: nothing to shuffle
            num_workers=config.workers,
            prefetch_factor=_PREFETCHED_BATCHES if config.workers else None,
            persistent_workers=config.workers > 0,
            pin_memory=config.device != "cpu",
            multiprocessing_context=worker_context() if config.workers else None,
            worker_init_fn=end_with_parent if config.workers else None,
        )
        return self._accelerator.prepare_data_loader(loader)

    def _forward(self, network: nn.Module, batch: Item) -> Tensor:
        """Return the logits of what a batch asks about; valid U-Nets may answer a bit more."""
        images = batch["image"].contiguous(memory_format=torch.channels_last)  # (N, C, T, T)
        with self._accelerator.autocast():
            logits: Tensor = network(images)  # (N, K, ≥ t, ≥ t)
        side = batch["target"].shape[-1]
        return logits[..., :side, :side].float()

    def _step(self, batch: Item) -> float:
        """Learn from one batch; return its loss."""
        config, state = self._config, self.state
        # Dropout is a function of seed and step, so that a resumed run repeats it.
        rank = self._accelerator.process_index
        torch.manual_seed((config.seed + 1009 * rank) * 1_000_003 + state.step)
        for group in self._optimiser.param_groups:
            group["lr"] = self.schedule.rate(state.step, state.factor)
        loss = self._loss(
            self._forward(self._network, batch), batch["target"], batch.get("weight")
        )  # fmt: skip
        value = float(loss.detach())
        if not math.isfinite(value) and self._accelerator.scaler is None:
            raise ModelError(
                f"the loss is not finite at step {state.step}", "--lr",
                "lower it, or use --precision fp32",
            )  # fmt: skip
        self._optimiser.zero_grad(set_to_none=True)
        self._accelerator.backward(loss)
        if config.clip:
            self._accelerator.clip_grad_norm_(self._network.parameters(), config.clip)
        self._optimiser.step()
        if self._averaging:
            self._average.update_parameters(self._plain)
        return value

    @torch.inference_mode()
    def _validate(self, loader: Any) -> Scores:
        """Return the figures of the judged weights on the validation windows."""
        classes = len(self._work.found.data.classes)
        network = self._judged.eval()
        total = torch.zeros(classes, classes, dtype=torch.long, device=self._accelerator.device)
        for batch in loader:
            both = batch["target"], _classify(self._forward(network, batch))
            truth, pred = self._accelerator.gather_for_metrics(both)
            total += multiclass_confusion_matrix(
                pred, truth.long(), classes, ignore_index=NODATA, validate_args=False
            )
        return Scores(np.pad(total.cpu().numpy(), ((0, 0), (0, 1))))  # a network always answers

    def _end_epoch(self, epoch: int, judge: Any) -> None:
        """Validate, write down how it went, keep the best and the last weights."""
        state, schedule = self.state, self.schedule
        scores = self._validate(judge)
        dice = scores.object_dice
        loss = torch.tensor(state.loss_sum / schedule.steps, device=self._accelerator.device)
        row = {
            "epoch": epoch,
            "step": state.step,
            "lr": schedule.rate(state.step - 1, state.factor),
            "loss": round(float(self._accelerator.reduce(loss, "mean")), 6),
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
        state.factor = schedule.lowered(state.factor, state.stale)
        if self._accelerator.is_main_process:
            self._tracker.log(row)
            write_history(self._out / "metrics.csv", state.history)
            # Best first: a kill between the two repeats the epoch and writes the same best again.
            if better:
                weights = {"network": self._judged.state_dict()}
                write_checkpoint(self._out / BEST, state, weights)
        self._save()
        _logger.info(
            "epoch %d of %d: loss %.4f, validation Dice %.4f%s",
            epoch, self._config.epochs, row["loss"], dice, " (best)" if better else "",
        )  # fmt: skip

    def _finished(self) -> bool:
        patience, state = self._config.patience, self.state
        waited = bool(patience) and state.stale >= patience
        between = state.step % self.schedule.steps == 0
        return state.step >= self.schedule.total or (waited and between)

    def fit(self, train: TrainWindows, val: ValWindows) -> None:
        """Train to the end, or until validation stops getting better.

        Parameters
        ----------
        train, val
            All windows of the run; those of one validation.

        Raises
        ------
        ModelError
            The loss is no number any more.
        """
        state, schedule = self.state, self.schedule
        if self._finished():
            return
        saved = time.monotonic()
        judge = self._loader(val)
        with _deterministic(self._config.device):
            batches = iter(self._loader(train, state.step * self._config.batch_size))
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
                epoch = -(-state.step // schedule.steps)
                shown = {"epoch": epoch, "loss": loss, "dice": max(0.0, state.best_dice)}
                self._progress(state.step, schedule.total, shown)
                if state.step % schedule.steps == 0:
                    self._end_epoch(epoch, judge)
                    self._network.train()
                    saved = time.monotonic()
                elif time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save()
                    saved = time.monotonic()
