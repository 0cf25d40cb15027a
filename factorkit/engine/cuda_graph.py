"""A piece of work recorded as one CUDA graph: hundreds of kernels started by one call, none waiting for Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

WARM_UP = 3  # runs before the capture: cuDNN, cuBLAS and Triton choose and build, the optimiser makes its state


class GraphedWork:
    """Runs ``work`` as it is for the first calls, then records it once and replays the record.

    What is recorded are kernels and addresses: ``work`` may read nothing that changes from call to call but tensors
    that stay where they are, and may not wait for the device. The random numbers of ``generators`` and of torch's
    default one go on as if there were no graph; they may be seeded anew between calls.

    Args:
        work: takes and returns nothing.
        generators: called at the capture, gives every generator of the device that ``work`` draws from.
        again: called after a capture that failed, before ``work`` is run in its place: to put back what it consumed.
        device: a CUDA device.
    """

    def __init__(
        self,
        work: Callable[[], None],
        generators: Callable[[], Sequence[torch.Generator]],
        again: Callable[[], None],
        device: torch.device,
    ):
        self.work, self.generators, self.again, self.device = work, generators, again, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.aside = torch.cuda.Stream(device)
        self.runs, self.possible = 0, True

    def __call__(self) -> None:
        if self.graph is None and self.possible and self.runs >= WARM_UP:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.possible:
            self._run_aside()
        else:
            self.work()
        self.runs += 1

    def _run_aside(self) -> None:
        """On a stream of its own, as the capture will be: autograd remembers the stream it first accumulated on."""
        present = torch.cuda.current_stream(self.device)
        self.aside.wait_stream(present)
        with torch.cuda.stream(self.aside):
            self.work()
        present.wait_stream(self.aside)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self.generators():
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=self.aside):
                self.work()
        except RuntimeError as error:
            self.possible = False
            self.again()
            warnings.warn(
                f"the training step could not be captured as a CUDA graph ({str(error).splitlines()[0]}); it goes on "
                "without one, with the same results, slower where the model is small. cuda_graph=False asks for that",
                stacklevel=2,
            )
        else:
            self.graph = graph
