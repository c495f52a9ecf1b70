"""One update of the weights: from a few batches to a step of the optimizer."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from lmtutorial.batches import IGNORE, Batch
from lmtutorial.devices import choose_precision, cpu_computes_lstm_in_bfloat16
from lmtutorial.distributed import Processes
from lmtutorial.losses import lm_loss
from lmtutorial.models.cache import LanguageModel, carried
from lmtutorial.optimizer_groups import build_optimizer
from lmtutorial.runs import Progress
from lmtutorial.sharding import shard, together
from lmtutorial.train_config import TrainConfig
from lmtutorial.weight_average import WeightAverage


class Updater:
    """A model, its optimizer, and how gradients are computed: precision, accumulation, several processes."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.config, self.processes = model, config, Processes.current()
        self.device = cast(LanguageModel, model).device
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.precision = choose_precision(config.precision, self.device, size)
        _check_lstm(model, self.device, self.precision)
        if config.shard and self.processes.size > 1:
            shard(model, self.precision)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            model,
            config.learning_rate,
            kind=config.optimizer,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        # float16 alone needs it: small gradients would be 0 if the loss were not scaled up
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.average = None if config.ema is None else WeightAverage(model, config.ema)
        if config.compile:
            model.compile()
        self.forward = self.processes.wrap(model)

    def __call__(self, batches: list[Batch], rate: float, run: Progress) -> None:
        """Move the weights against the gradient of the mean loss over all targets of `batches`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        nats, tokens = self._backward(batches, run)
        self.scaler.unscale_(self.optimizer)
        length = together(nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf))
        if self.config.skip_spikes is None or run.is_usual(length.item(), self.config.skip_spikes):
            self.scaler.step(self.optimizer)
            if self.average:
                self.average.update(run.step)
            run.nats += nats
            run.tokens += tokens
            run.gradient_norm += length
        self.scaler.update()
        run.step += 1
        run.row_steps += 1
        run.row_tokens += tokens
        run.all_tokens += tokens

    def _backward(self, batches: list[Batch], run: Progress) -> tuple[Tensor, int]:
        """Add up the gradients; the loss of this process's rows in nats, and the targets of all processes."""
        tokens = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        total = torch.zeros((), device=self.device)  # looked at only for the log: that waits for the device
        for number, batch in enumerate(batches, start=1):
            inputs, targets, continues = self.processes.share(batch).to(self.device)
            run.cache = carried(cast(LanguageModel, self.model), run.cache, len(inputs), continues)
            with self.processes.local(self.forward) if number < len(batches) else nullcontext():
                with self._precision():
                    nats = lm_loss(self.forward(inputs, run.cache), targets).nats
                # processes average their gradients, where the sum is wanted
                loss = nats / tokens * self.processes.size
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += nats.detach()
        return total, tokens

    def _precision(self) -> torch.autocast:
        """Inside, matrix products are computed in the run's precision."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


def _check_lstm(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Raise ValueError where the first forward would fail, and torch's own words would not tell why."""
    if device.type != "cpu" or precision != torch.bfloat16 or cpu_computes_lstm_in_bfloat16():
        return
    if any(isinstance(module, nn.LSTM) for module in model.modules()):
        raise ValueError(
            "precision is 'bfloat16', in which torch computes no LSTM on this CPU (it lacks AVX-512); "
            "it must be float32, or auto, which chooses"
        )
