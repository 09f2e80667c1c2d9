"""The token stream: shards read strictly in order by memory map, cut into batches, split by rank, prefetched in the background.

Batch k of B tokens is the B tokens after the k * B before it, whatever the world size and micro-batch: rank r of W
gets the r-th part of it. Past the last token of the last shard the stream starts again at the first: a new epoch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from data.shard import HEADER_BYTES, open_shard

_READY_BATCHES = 2  # batches kept ready; one is enough to hide the read, two hide a slow page fault


class TokenSequence:
    """Shards laid end to end and read as one endless sequence of tokens."""

    def __init__(self, paths: Sequence[Path], vocab_size: int) -> None:
        if not paths:
            raise ValueError("a token sequence needs at least one shard")
        self.paths = [Path(path) for path in paths]
        self.vocab_size = vocab_size
        self._shards = [open_shard(path) for path in self.paths]
        self._ends = np.cumsum([shard.size for shard in self._shards])

    def __len__(self) -> int:
        """Tokens in one epoch."""
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), wrapping around at the end.

        Returns:
            (count,) int64.

        Raises:
            UserError: a token is outside the vocabulary, or its shard was cut short.
        """
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            at = (start + filled) % len(self)
            index = int(np.searchsorted(self._ends, at, side="right"))
            offset = at - (int(self._ends[index - 1]) if index else 0)
            self._refuse_truncated(index)
            part = self._shards[index][offset : offset + count - filled]
            out[filled : filled + part.size] = part
            if part.max() >= self.vocab_size:
                where = offset + int(np.argmax(part >= self.vocab_size))
                raise UserError(
                    f"token {int(part.max())} is outside the vocabulary of {self.vocab_size}, at or after position {where}",
                    where=str(self.paths[index]),
                    fix="Fetch the shard again: delete it, then speedrun data get TRACK",
                )
            filled += part.size
        return out

    def _refuse_truncated(self, index: int) -> None:
        """A file cut short while it is mapped would end the process by SIGBUS; one that is deleted stays readable by the map."""
        path = self.paths[index]
        if path.exists() and path.stat().st_size < HEADER_BYTES + self._shards[index].nbytes:
            raise UserError(
                "token shard was cut short while it was being read",
                where=str(path),
                fix="Leave data alone during a run; fetch it again: speedrun data get TRACK",
            )


class BatchStream:
    """This rank's batches, one after another, read ahead by a thread that can be paused.

    Args:
        tokens: what to read.
        batch_tokens: tokens of a batch over all ranks.
        sequence_length: tokens of a row; batch_tokens is a multiple of it times world_size.
        rank: this rank, of world_size.
        world_size: ranks that share a batch.
        device: where batches are handed out; on a GPU they travel through pinned memory.
        position: tokens handed out before, by an earlier stream of the same run.
        paused: read nothing until resume().
    """

    def __init__(
        self,
        tokens: TokenSequence,
        *,
        batch_tokens: int,
        sequence_length: int,
        rank: int,
        world_size: int,
        device: torch.device,
        position: int = 0,
        paused: bool = False,
    ) -> None:
        if batch_tokens <= 0 or batch_tokens % (sequence_length * world_size):
            raise UserError(
                f"batch of {batch_tokens} tokens does not split into {world_size} ranks x sequences of {sequence_length}",
                fix=f"Make batch_tokens a multiple of {sequence_length * world_size}, or use another number of processes",
            )
        self.position = position  # tokens handed out so far, over all ranks
        self.batch_tokens = batch_tokens
        self._tokens, self._sequence_length, self._device = tokens, sequence_length, device
        self._share = batch_tokens // world_size
        self._offset = rank * self._share
        self._ready: queue.Queue = queue.Queue(maxsize=_READY_BATCHES)
        self._working = threading.Lock()  # held while the thread reads, and by pause()
        self._paused = False
        self._closed = threading.Event()
        if paused:
            self.pause()
        self._thread = threading.Thread(target=self._read_ahead, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next (inputs, targets) of this rank, each (sequences, sequence_length) int64; targets are one token later."""
        if self._closed.is_set():
            raise RuntimeError("this stream is closed: a newer one has taken over, or the run has finished")
        rows = self._ready.get()
        if isinstance(rows, BaseException):
            self._ready.put(rows)  # the thread has ended: asked again, say it again
            raise rows
        self.position += self.batch_tokens
        inputs, targets = (part.view(-1, self._sequence_length) for part in (rows[:-1], rows[1:]))
        return inputs.to(self._device, non_blocking=True), targets.to(self._device, non_blocking=True)

    def pause(self) -> None:
        """Return once the thread reads nothing; it stays idle until resume()."""
        self._working.acquire()
        self._paused = True

    def resume(self) -> None:
        """Let the thread read ahead again."""
        self._paused = False
        self._working.release()

    def close(self) -> None:
        """Stop reading ahead; the stream hands out nothing more."""
        self._closed.set()
        while not self._ready.empty():  # a thread waiting for room sees the flag
            self._ready.get_nowait()
        if self._paused:
            self.resume()
        self._thread.join(timeout=10)

    def _read_ahead(self) -> None:
        position = self.position
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread starts on device 0
        while not self._closed.is_set():
            try:
                with self._working:
                    rows = torch.from_numpy(self._tokens.read(position + self._offset, self._share + 1))
                    if self._device.type == "cuda":
                        rows = rows.pin_memory()
            except BaseException as error:  # handed to the training thread, which stops the run
                rows = error
            position += self.batch_tokens
            self._put(rows)
            if isinstance(rows, BaseException):
                return

    def _put(self, rows: Tensor | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(rows, timeout=0.2)
            except queue.Full:
                continue
