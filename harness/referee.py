"""The referee: the object inside the training process that owns the clock, the token streams and the evaluation.

A trainer sees only what is public here. Events are written by rank 0; every rank checks its own loss.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from data.errors import UserError
from data.shard import file_sha256
from data.stream import BatchStream, TokenSequence
from harness.clock import Clock
from harness.evaluate import validation_loss
from harness.events import EventWriter
from harness.track import Track
from harness.warmup import Snapshot, state_bytes

RandomBatch = Callable[[int, int], tuple[Tensor, Tensor]]


class Referee:
    """Hands out tokens, keeps time, evaluates, and writes down what happened.

    Args:
        track: the race.
        seed: of this run; the random generators are already set from it.
        train: the training tokens.
        val: the validation tokens.
        device: of this rank's model.
        writer: rank 0's event file; None on the other ranks.
        weights_folder: where rank 0 leaves the final weights.
    """

    def __init__(
        self,
        *,
        track: Track,
        seed: int,
        train: TokenSequence,
        val: TokenSequence,
        device: torch.device,
        writer: EventWriter | None,
        weights_folder: Path,
    ) -> None:
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.track, self.seed, self.device = track, seed, device
        self.step = 0  # optimizer steps logged so far
        self.finished = False
        self._train, self._val, self._writer, self._weights_folder = train, val, writer, weights_folder
        self._clock = Clock(self._settle)
        self._stream: BatchStream | None = None
        self._tokens = 0  # handed out by streams that are closed
        self._pending: deque[_PendingLoss] = deque()
        self._optimizers: Sequence[torch.optim.Optimizer] = ()
        self._warming = False

    # ---- before the clock ----

    @contextmanager
    def warm_up(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Iterator[RandomBatch]:
        """Untimed steps on random tokens; afterwards everything is as it was, and a digest proves it.

        Args:
            model: the module whose parameters are trained (not a compiled or distributed wrapper of it).
            optimizers: all that will step.

        Yields:
            A function (batch_tokens, sequence_length) -> this rank's (inputs, targets) of random tokens.
        """
        if self._clock.started:
            raise UserError(
                "warm-up after the first training token", where="referee.warm_up", fix="Warm up before the first batch is drawn"
            )
        begun = time.perf_counter()
        self._optimizers = optimizers
        snapshot = Snapshot(model, optimizers)
        stepped: list[torch.optim.Optimizer] = []
        hook = register_optimizer_step_post_hook(lambda optimizer, *rest: stepped.append(optimizer))
        self._warming = True
        try:
            yield self._random_batch
        finally:
            self._warming = False
            hook.remove()
        self._settle()
        if any(all(optimizer is not known for known in optimizers) for optimizer in stepped):
            raise UserError(
                "an optimizer that was not handed over took a step during warm-up",
                where="referee.warm_up",
                fix="Hand every optimizer to warm_up",
            )
        digest = snapshot.restore()
        if digest != snapshot.digest:
            raise UserError(
                "the warm-up left a trace: model, optimizer or random state differs from before",
                where="referee.warm_up",
                fix="Hand every optimizer to warm_up",
            )
        self._write(
            event="warm_up", digest_before=snapshot.digest, digest_after=digest, warm_up_ms=round((time.perf_counter() - begun) * 1e3, 1)
        )

    def _random_batch(self, batch_tokens: int, sequence_length: int) -> tuple[Tensor, Tensor]:
        rows = batch_tokens // (self.world_size * sequence_length)
        shape = (max(rows, 1), sequence_length)
        high = self._train.vocab_size
        return torch.randint(high, shape, device=self.device), torch.randint(high, shape, device=self.device)

    # ---- the race ----

    def batches(self, batch_tokens: int, sequence_length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's (inputs, targets), each (sequences, sequence_length) int64, one pair per optimizer step, without end.

        Args:
            batch_tokens: tokens of a step over all ranks; a multiple of sequence_length * world_size.
            sequence_length: tokens of a row.

        The first batch starts the clock. Called again, for example with another batch size, it goes on where the stream stands.
        """
        self._refuse_real_tokens()
        fixed = self.track.batch_tokens
        if fixed not in (None, batch_tokens):
            raise UserError(
                f"track {self.track.id} fixes batch_tokens = {fixed}, the trainer asks for {batch_tokens}",
                fix=f"--set batch_tokens={fixed}",
            )
        if not self._clock.started:
            return self._first_batches(batch_tokens, sequence_length)
        return self._open_stream(batch_tokens, sequence_length)

    def _first_batches(self, batch_tokens: int, sequence_length: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._refuse_real_tokens()  # again: the iterator may be older than the warm-up
        if self._clock.started:  # by another iterator made before the first token
            yield from self._open_stream(batch_tokens, sequence_length)
        stream = self._open_stream(batch_tokens, sequence_length, start_paused=True)
        self._clock.start()  # reading ahead is inside the clock too: not one token is touched before it
        stream.resume()
        yield from stream

    def _refuse_real_tokens(self) -> None:
        if self._warming:
            raise UserError(
                "real tokens asked for during warm-up", where="referee.batches", fix="Use the random batches that warm_up yields"
            )

    def _open_stream(self, batch_tokens: int, sequence_length: int, *, start_paused: bool = False) -> BatchStream:
        if self._stream is not None:
            self._tokens = self._stream.position
            self._stream.close()
        self._stream = BatchStream(
            self._train,
            batch_tokens=batch_tokens,
            sequence_length=sequence_length,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            position=self._tokens,
            paused=start_paused,
        )
        return self._stream

    @property
    def tokens(self) -> int:
        """Training tokens handed out so far, over all ranks."""
        return self._stream.position if self._stream is not None else self._tokens

    def due(self, step: int) -> bool:
        """Whether the track's grid asks for a validation after `step` optimizer steps."""
        return step % self.track.val_every_steps == 0

    def log(self, step: int, loss: Tensor) -> None:
        """Note the training loss of an optimizer step. Costs no device synchronisation.

        Args:
            step: optimizer steps done, counted from 1.
            loss: this rank's mean training loss, a scalar tensor.
        """
        if step != self.step + 1:
            raise UserError(
                f"step {step} logged after step {self.step}", where="referee.log", fix="Log every optimizer step once, counted from 1"
            )
        self.step = step
        self._pending.append(_PendingLoss(step, self.tokens, self._clock.read_ms(), loss))
        self._drain(wait=False)

    def validate(self, model: nn.Module, step: int) -> float:
        """Pause the clock and the prefetch, evaluate, write the result down.

        Returns:
            The validation loss, nats per token, the same on every rank.
        """
        self._refuse_finished()
        if step != self.step:
            raise UserError(
                f"validation at step {step}, but {self.step} steps are logged",
                where="referee.validate",
                fix="Validate after logging the step",
            )
        self._pause()
        self._drain(wait=True)
        loss = self._evaluate(model)
        self._resume()
        return loss

    def finish(self, model: nn.Module) -> None:
        """Stop the clock; last validation; keep the weights; write the result."""
        self._refuse_finished()
        self._pause()
        self._drain(wait=True)
        train_time_ms = self._clock.read_ms()
        loss = self._evaluate(model)
        if self.rank == 0:
            digest, size = self._keep_weights(model)
            self._write(
                event="finish",
                step=self.step,
                tokens=self.tokens,
                val_loss=loss,
                train_time_ms=train_time_ms,
                epochs=round(self.tokens / len(self._train), 6),
                weights_sha256=digest,
                weights_bytes=size,
                parameters=sum(parameter.numel() for parameter in unwrap(model).parameters()),
                optimizer_state_bytes=state_bytes(self._optimizers),
                peak_memory_mib=peak_memory_mib(self.device),
            )
        if self._stream is not None:
            self._stream.close()
        self.finished = True

    # ---- inside ----

    def _refuse_finished(self) -> None:
        if self.finished:
            raise UserError(
                "the run has finished already", where="referee.finish", fix="Call referee.finish(model) once, as the last thing"
            )

    def _evaluate(self, model: nn.Module) -> float:
        training = model.training
        model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # an evaluation draws nothing from the trainer's random numbers
            loss = validation_loss(
                model, self._val, val_tokens=self.track.val_tokens, sequence_length=self.track.val_sequence_length, device=self.device
            )
        model.train(training)
        if not math.isfinite(loss):
            raise UserError(
                f"validation loss is {loss} at step {self.step} (rank {self.rank})",
                fix="Lower the learning rate, or look for a fault in the trainer",
            )
        if self.step == 0 and loss <= self.track.target_loss:
            raise UserError(
                f"val_loss {loss:.4f} meets the target {self.track.target_loss} before any training",
                fix="The model has seen the data already, or the track's target is set too high",
            )
        self._write(event="validation", step=self.step, tokens=self.tokens, val_loss=round(loss, 6), train_time_ms=self._clock.read_ms())
        return round(loss, 6)

    def _drain(self, *, wait: bool) -> None:
        """Write down the losses that have arrived on the host; stop at one that is not a number."""
        while self._pending and (wait or self._pending[0].ready()):
            pending = self._pending.popleft()
            value = pending.value()
            if not math.isfinite(value):
                raise UserError(
                    f"training loss is {value} at step {pending.step} on rank {self.rank}",
                    fix="Lower the learning rate, or look for a fault in the trainer",
                )
            self._write(
                event="step", step=pending.step, tokens=pending.tokens, train_loss=round(value, 6), train_time_ms=pending.train_time_ms
            )

    def _keep_weights(self, model: nn.Module) -> tuple[str, int]:
        self._weights_folder.mkdir(parents=True, exist_ok=True)
        partial = self._weights_folder / f".{os.getpid()}.partial"
        try:
            safetensors.torch.save_model(unwrap(model), str(partial))
            digest, size = file_sha256(partial), partial.stat().st_size
            partial.replace(self._weights_folder / f"{digest}.safetensors")
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise UserError(
                f"cannot keep the final weights: {error}", where=str(self._weights_folder), fix="Free some space, or set SPEEDRUN_HOME"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        return digest, size

    def _pause(self) -> None:
        if self._clock.started:
            self._stream.pause()
            self._clock.pause()

    def _resume(self) -> None:
        if self._clock.started:
            self._clock.start()
            self._stream.resume()

    def _settle(self) -> None:
        """Return once the device and all ranks have done what they were given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world_size > 1:
            dist.barrier()

    def _write(self, **event: object) -> None:
        if self._writer is not None:
            self._writer.write(event)


class _PendingLoss:
    """A loss on its way from the device to the host."""

    def __init__(self, step: int, tokens: int, train_time_ms: float, loss: Tensor) -> None:
        self.step, self.tokens, self.train_time_ms = step, tokens, train_time_ms
        self._arrived = None
        self._loss = loss.detach()
        if loss.is_cuda:
            self._loss = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(self._loss, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def value(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._loss)


def unwrap(model: nn.Module) -> nn.Module:
    """The trainer's own module below torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None)
        if inner is None:
            return model
        model = inner


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this rank has used: on the GPU as torch allocated it, on CPU the resident size of the process, MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    import resource  # not on Windows, where nothing else here runs either

    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
