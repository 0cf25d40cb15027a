"""Recording work as a CUDA graph: one launch instead of hundreds, none of which waits for Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

import torch

from factorkit.utils.errors import first_line

WARM_UP = (
    3  # runs before the capture, in which cuDNN, cuBLAS and Triton choose kernels and the optimiser makes its state
)


class GraphedWork:
    """Run ``work`` eagerly for the first calls, then record it once and replay the recording.

    Kernels and addresses are recorded: ``work`` may read no changing values except tensors that stay in place, and may
    not wait for the device. Random numbers are the same as without a graph; generators may be seeded between calls.
    Work whose kernels change now and then has another form: it is recorded again, and the old recording is dropped.

    Args:
        work: takes and returns nothing.
        generators: returns all generators of the device that ``work`` uses, except torch's default one.
        reset: called after a failed capture, before ``work`` runs instead: restores what the capture consumed.
        device: a CUDA device.
    """

    def __init__(
        self,
        work: Callable[[], None],
        generators: Callable[[], Sequence[torch.Generator]],
        reset: Callable[[], None],
        device: torch.device,
    ):
        self.work, self.generators, self.reset, self.device = work, generators, reset, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.side_stream = torch.cuda.Stream(device)
        self.runs, self.can_capture = 0, True
        self.form: Hashable = None

    def __call__(self, form: Hashable = None) -> None:
        """Run the work, from the graph once it is captured. ``form`` names the kernels that it launches."""
        if form != self.form:
            if self.graph is not None:
                torch.cuda.current_stream(self.device).synchronize()  # its last replay may not have ended
            self.form, self.graph, self.runs = form, None, 0
        if self.graph is None and self.can_capture and self.runs >= WARM_UP:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.can_capture:
            self._run_on_side_stream()
        else:
            self.work()
        self.runs += 1

    def _run_on_side_stream(self) -> None:
        """Run on the stream of the later capture: autograd remembers the stream that it first accumulated on."""
        current = torch.cuda.current_stream(self.device)
        self.side_stream.wait_stream(current)
        with torch.cuda.stream(self.side_stream):
            self.work()
        current.wait_stream(self.side_stream)

    def _capture(self) -> None:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            for generator in self.generators():
                graph.register_generator_state(generator)
            # the outer context: the inner one keeps the side stream current where a capture cannot be ended
            with torch.cuda.stream(self.side_stream), torch.cuda.graph(graph, pool=pool, stream=self.side_stream):
                self.work()
        except RuntimeError as error:
            self.can_capture = False
            self._abandon_capture(pool)
            self.reset()
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            warnings.warn(
                f"the training step could not be captured as a CUDA graph ({first_line(cause)}); training continues "
                "without one, with the same results but slower for small models. cuda_graph=False avoids this warning",
                stacklevel=2,
            )
        else:
            self.graph = graph

    def _abandon_capture(self, pool: tuple[int, int]) -> None:
        """Undo what torch leaves of a capture that the driver invalidated, which therefore never ends."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        # another state: the old one counts as capturing for ever and refuses to be drawn from or seeded
        torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(self.device))
        with suppress(RuntimeError):  # where the capture did end
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
