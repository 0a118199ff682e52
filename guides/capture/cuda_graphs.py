"""Calls of a compiled graph recorded on a GPU and replayed: no launch of a kernel from Python.

    record once:  outputs = run(live parameters and states, buffers of data and noise)
    each call:    buffers <- data, noise;  replay;  return copies of the outputs

Parameters and states of optimizers are recorded where they are and change in place, as without a
recording; where one of them has moved, the calls are recorded anew. Noise is drawn outside, by the
random state of the device, so that the stream stays that of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recording", "record_on_gpu", "records"]

Run = Callable[..., Sequence[Tensor]]
Recorder = Callable[[Callable[[], Sequence[Tensor]]], tuple[Sequence[Tensor], Callable[[], Any]]]


def records(inputs: Sequence[Tensor], mode: str, reason: str | None) -> bool:
    """Whether calls are recorded and replayed: compiled ones, of tensors of one GPU."""
    places = {value.device for value in inputs}
    return mode == "inductor" and reason is None and [p.type for p in places] == ["cuda"]


def record_on_gpu(
    run: Callable[[], Sequence[Tensor]],
) -> tuple[Sequence[Tensor], Callable[[], Any]]:
    """Record a function of no arguments as a CUDA graph.

    Args:
        run: Reads and writes tensors of a GPU that stay where they are. It was called before, so
            that its kernels are there.

    Returns:
        Its outputs, which are filled by each replay, and what replays it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


class Recording:
    """What runs a function of tensors by replaying one recorded call of it.

    Args:
        run: The function; it may write into its first inputs.
        num_live: How many inputs are read and written where they are.
        record: Records a call; :func:`record_on_gpu` by default.
    """

    def __init__(self, run: Run, num_live: int, record: Recorder = record_on_gpu) -> None:
        self.run = run
        self.num_live = num_live
        self.record = record
        self._places: list[int] = []
        self._live: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Make the call."""
        live, rest = inputs[: self.num_live], inputs[self.num_live :]
        places = [tensor.data_ptr() for tensor in live]
        if self._replay is None or places != self._places:
            self._prepare(live, rest)
            self._places = places
        for buffer, value in zip(self._buffers, rest, strict=True):
            buffer.copy_(value)
        assert self._replay is not None
        self._replay()
        # The next replay writes over what this one gave.
        return [output.clone() for output in self._outputs]

    def _prepare(self, live: Sequence[Tensor], rest: Sequence[Tensor]) -> None:
        self._live = list(live)  # what is recorded must stay where it is
        self._buffers = [value.clone() for value in rest]
        kept = [value.clone() for value in live]

        def call() -> Sequence[Tensor]:
            return self.run(*self._live, *self._buffers)

        # Kernels are loaded and tuned by a first call, whose step is then undone.
        call()
        self._put_back(kept)
        self._outputs, self._replay = self.record(call)
        self._put_back(kept)

    def _put_back(self, kept: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._live, kept, strict=True):
            tensor.copy_(value)
