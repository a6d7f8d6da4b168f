"""What a run looks out for: losses that go wrong, signals to end, and how fast it is."""

from __future__ import annotations

import collections
import functools
import math
import signal
import statistics
import threading
import time
import types
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath

from ernie_jax import chips, distributed
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.sharding import Layout
from ernie_jax.train.data import Batch, PreferenceBatch

_WINDOW, _LEAST = 32, 8  # losses whose mean a spike is seen against, and how many it takes


class Guard:
    """Look at the losses, one step late so that the device is never waited for, and stop at one that is wrong.

    Args:
      batch: step, counted from 1 -> what it learnt from.
    """

    def __init__(self, spike: float, output: epath.Path, batch: Callable[[int], Batch | PreferenceBatch]):
        self._spike, self._output, self._batch = spike, output, batch
        self._waiting: collections.deque = collections.deque()
        self._losses: collections.deque = collections.deque(maxlen=_WINDOW)

    def follow(self, step: int, values: dict[str, jax.Array]) -> None:
        """Take in a step that may still be computed; look at those before it.

        Raises:
          UserError: as `settle`.
        """
        self._waiting.append((step, values))
        self._look(1)

    def settle(self) -> None:
        """Look at all steps.

        Raises:
          UserError: if a loss or gradient is not finite or a loss has jumped up; the batch is saved.
        """
        self._look(0)

    def _look(self, leave: int) -> None:
        while len(self._waiting) > leave:
            step, values = self._waiting.popleft()
            loss, norm = float(values["train_loss"]), float(values["gradient_norm"])
            usual = statistics.fmean(self._losses) if len(self._losses) >= _LEAST else math.inf
            if not math.isfinite(loss) or not math.isfinite(norm):
                self._stop(step, f"the loss is {loss} and the gradient's norm {norm} at step {step}")
            if self._spike and loss > usual + self._spike:
                self._stop(step, f"the loss jumped from {usual:.3f} to {loss:.3f} at step {step}")
            self._losses.append(loss)

    def _stop(self, step: int, what: str) -> None:
        file = self._output / f"batch-{step}.npz"
        if distributed.is_primary():
            leaves = jax.tree_util.tree_leaves_with_path(self._batch(step))
            named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
            with file.open("wb") as opened:
                np.savez(opened, **named)
        distributed.barrier("the batch is saved")
        raise UserError(
            f"{what}; its batch is saved as {file}. Look at that, make learning_rate smaller or loss_spike larger, and "
            "choose another output"
        )


class Interrupts:
    """Hear signals to end, so that the run can save first; another one ends it at once."""

    def __init__(self):
        self.heard = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _hear(self, number: int, frame: types.FrameType | None) -> None:
        self.heard = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def operations(
    config: ModelConfig, sizes: Mapping[str, int], adapters: bool, ahead: bool, tokens: int, seen: int
) -> tuple[float, float]:
    """Return the operations of the forward and of the backward pass over some tokens.

    Forward takes 2 for each weight that a token goes through, and 4 for each number of a query and each position that
    it sees; backward twice that, but once for a weight that is frozen where there are adapters to learn.

    Args:
      sizes: of the weights, by name.
      adapters: are learnt.
      ahead: tokens beyond the next one are learnt, which takes the head once more for each depth.
      seen: pairs of a token and one that it sees.
    """
    share = config.moe_k / config.moe_num_experts if config.is_moe else 0.0
    depths = config.num_nextn_predict_layers if ahead else 0
    head = "embed.weight" if config.tie_word_embeddings else "head.weight"
    forward = backward = 0.0
    for name, size in sizes.items():
        if name.startswith("mtp.") and not depths or name == "embed.weight" != head:
            continue
        used = 2 * size * (1 + depths if name == head else share if ".experts." in name else 1.0)
        forward += used
        backward += used if adapters and ".lora_" not in name else 2 * used
    layers = config.num_hidden_layers + depths
    attention = 4 * layers * config.num_attention_heads * config.head_dim * seen
    return forward * tokens + attention, backward * tokens + 2 * attention


class Pace:
    """How fast a run is since it was last asked; what is computed again does not count.

    Args:
      sizes, adapters, ahead: as for `operations`.

    Attributes:
      operations: so many, since then.
    """

    def __init__(self, config: ModelConfig, layout: Layout, sizes: dict[str, int], adapters: bool, ahead: bool = False):
        self._layout = layout
        self._operations = functools.partial(operations, config, sizes, adapters, ahead)
        chip = chips.find(layout.mesh.devices.flat[0].device_kind)
        self._peak = chip and chip.device_flops * layout.mesh.size
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._tokens, self.operations, self._since = 0, 0.0, time.perf_counter()

    def count(self, *batches: Batch) -> None:
        """Take in what a step learns from, as it is on the host."""
        for batch in batches:
            real = batch.segments >= 0
            self._tokens += batch.tokens.size
            seen = int(np.sum(batch.positions + 1, where=real))
            self.operations += sum(self._operations(int(real.sum()), seen))

    def measure(self) -> dict[str, float]:
        """Return tokens a second, padding too, and where they are known the use of the peak arithmetic and memory."""
        seconds = time.perf_counter() - self._since
        found = {"tokens_per_second": self._tokens / seconds}
        if self._peak:
            found["mfu"] = self.operations / seconds / self._peak
        stats = [device.memory_stats() or {} for device in self._layout.mesh.local_devices]
        if peaks := [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]:
            found["memory_gb"] = max(peaks) / 1e9
        return found


def describe(row: dict[str, float]) -> str:
    """Say in a few words how a run goes."""
    words = [f"loss {row['train_loss']:.3f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in row:
        words.append(f"MFU {row['mfu']:.0%}")
    if "memory_gb" in row:
        words.append(f"{row['memory_gb']:.1f} GB")
    return ", ".join(words)
