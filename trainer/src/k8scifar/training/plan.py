"""Epoch, learning rate, resolution and samples of each step; they depend on nothing but the step."""

from __future__ import annotations

from dataclasses import dataclass

from k8scifar.config.schema import Config
from k8scifar.data.order import Order
from k8scifar.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The steps of a training run over `count` images."""

    config: Config
    count: int

    def __post_init__(self) -> None:
        if not self.steps_per_epoch:
            raise UserError(
                f"global_batch {self.config.global_batch} is more than the {self.count} training images; lower it, "
                "or set last_batch=pad"
            )

    @property
    def order(self) -> Order:
        """The samples of each step."""
        config = self.config
        return Order(self.count, config.global_batch, config.micro_batch, config.last_batch, config.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return self.order.steps_per_epoch

    @property
    def steps(self) -> int:
        """Optimiser steps in the run."""
        return self.config.epochs * self.steps_per_epoch

    def lr(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear from `start` to the peak, then linear to `end`."""
        schedule, peak_at = self.config.schedule, self.config.schedule.warmup * self.steps
        if step < peak_at:
            factor = schedule.start + (1.0 - schedule.start) * step / peak_at
        else:
            factor = schedule.end + (1.0 - schedule.end) * (self.steps - step) / (self.steps - peak_at)
        return self.config.optimizer.lr * factor

    def pixels(self, step: int) -> int:
        """Height and width of the images of `step` (0-based)."""
        done = step / self.steps
        return next((stage.pixels for stage in self.config.resolution if done < stage.until), self.last_pixels)

    def work(self, step: int) -> float:
        """Work of the steps before `step`, in pixels of a sample: a convolution's work is proportional to the area."""
        done, begin = 0.0, 0.0
        for stage in self.config.resolution:
            end = min(float(step), stage.until * self.steps)
            done, begin = done + max(0.0, end - begin) * stage.pixels**2, max(begin, end)
        return done

    @property
    def last_pixels(self) -> int:
        """Height and width of the images at the end of training."""
        return self.config.resolution[-1].pixels

    def images_at(self) -> dict[int, int]:
        """Number of images that the run trains on at each resolution."""
        found: dict[int, int] = {}
        for step in range(self.steps):
            found[self.pixels(step)] = found.get(self.pixels(step), 0) + self.config.global_batch
        return found
