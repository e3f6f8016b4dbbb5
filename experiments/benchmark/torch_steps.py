"""Training steps of the same networks in PyTorch, with its SAM and LookSAM.

The optimizers are those of the package ``pytorch_optimizer``. On a GPU images are
laid out channels last and the network goes through ``torch.compile``.
"""

import contextlib
import functools
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytorch_optimizer  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from experiments.benchmark import torch_networks, variants
from experiments.benchmark.problems import Problem

# What takes the gradients of a mini-batch and makes an optimizer step of them.
Update = Callable[[Callable[[], Any]], None]


def device() -> torch.device:
    """The kind of device that JAX runs on.

    Raises:
        RuntimeError: if PyTorch cannot use it; beside an accelerator, rows of the
            host's CPU would say nothing.
    """
    backend = jax.default_backend()
    if backend == 'cpu':
        return torch.device('cpu')
    if backend != 'gpu' or not torch.cuda.is_available():
        raise RuntimeError(f'PyTorch {torch.__version__} cannot use the {backend}.')
    return torch.device('cuda')


def _base(problem: Problem) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    settings = {
        'lr': variants.LEARNING_RATE[problem.base],
        'weight_decay': variants.WEIGHT_DECAY[problem.base],
    }
    if problem.base == 'AdamW':
        return torch.optim.AdamW, settings
    return torch.optim.SGD, {**settings, 'momentum': variants.MOMENTUM}


def _plain(parameters: list[Any], problem: Problem) -> Update:
    kind, settings = _base(problem)
    optimizer: Any = kind(parameters, **settings)

    def update(gradient: Callable[[], Any]) -> None:
        optimizer.zero_grad()
        gradient()
        optimizer.step()

    return update


def _sam(parameters: list[Any], problem: Problem) -> Update:
    kind, settings = _base(problem)
    optimizer: Any = pytorch_optimizer.SAM(
        parameters, kind, rho=variants.RHO, **settings
    )
    return functools.partial(_two_passes, optimizer)


def _looksam(parameters: list[Any], problem: Problem, *, skip: bool) -> Update:
    """LookSAM; its ``step`` takes two gradients always, unless they are skipped."""
    kind, settings = _base(problem)
    optimizer: Any = pytorch_optimizer.LookSAM(
        parameters, kind, rho=variants.RHO, k=variants.PERIOD, **settings
    )

    def update(gradient: Callable[[], Any]) -> None:
        if skip and optimizer.get_step() % variants.PERIOD:
            optimizer.zero_grad()
            gradient()
            optimizer.second_step()
        else:
            _two_passes(optimizer, gradient)

    return update


def _two_passes(optimizer: Any, gradient: Callable[[], Any]) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        return gradient()

    closure()
    optimizer.step(closure)


class _Method:
    """A peer: how it updates, and after how many steps that repeats."""

    def __init__(self, make: Callable[[list[Any], Problem], Update], steps: int = 1):
        self.make = make
        self.steps = steps


METHODS: dict[str, _Method] = {
    variants.BASE: _Method(_plain),
    'SAM': _Method(_sam),
    f'LookSAM, k = {variants.PERIOD}': _Method(
        functools.partial(_looksam, skip=False), variants.PERIOD
    ),
    f'LookSAM, k = {variants.PERIOD}, second passes skipped': _Method(
        functools.partial(_looksam, skip=True), variants.PERIOD
    ),
}


class TorchRunner:
    """Times one method.

    Args:
        problem: the network.
        method: how to make a step.

    Attributes:
        steps: how many optimizer steps a cycle is.
        compile_seconds: of the first step where the network is compiled, else None.
        num_parameters: how many numbers are trained.
    """

    library = 'PyTorch'
    flops = None
    conditionals = None

    def __init__(self, problem: Problem, method: _Method):
        self.steps = method.steps
        self._device = device()
        on_gpu = self._device.type == 'cuda'
        layout: Any = torch.channels_last if on_gpu else torch.contiguous_format
        torch.manual_seed(0)
        network: Any = torch_networks.port(problem.model, problem.shape)
        network = network.to(self._device).train()
        if on_gpu and len(problem.shape) == 4:
            network = network.to(memory_format=layout)
        parameters = list(network.parameters())
        self.num_parameters = sum(p.numel() for p in parameters)
        inputs, labels = (torch.from_numpy(x) for x in problem.batch())
        if inputs.ndim == 4:
            inputs = inputs.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        self._inputs = inputs.to(self._device)
        self._labels = labels.to(self._device, torch.int64)
        model: Any = problem.model
        self._narrow = jnp.dtype(model.dtype) == jnp.bfloat16
        if on_gpu:
            # Code of another batch size would be generalised instead of made anew.
            torch.compiler.reset()
            network = torch.compile(network, dynamic=False)
        self._network = network
        self._update = method.make(parameters, problem)
        self.compile_seconds = None
        if on_gpu:
            start = time.perf_counter()
            self.run(1)
            self.compile_seconds = time.perf_counter() - start

    def _gradient(self) -> torch.Tensor:
        cast = (
            torch.autocast(self._device.type, torch.bfloat16)
            if self._narrow
            else contextlib.nullcontext()
        )
        with cast:
            logits = self._network(self._inputs)
        loss = functional.cross_entropy(logits.float(), self._labels)
        loss.backward()
        return loss

    def run(self, cycles: int) -> float:
        """Makes some cycles of steps and returns the seconds that a step took."""
        steps = cycles * self.steps
        start = time.perf_counter()
        for _ in range(steps):
            self._update(self._gradient)
        if self._device.type == 'cuda':
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps


def title(name: str, problem: Problem) -> str:
    """The title of the row of a method."""
    return f'PyTorch {problem.base if name == variants.BASE else name}'


def runners(
    problem: Problem, names: tuple[str, ...] = tuple(METHODS)
) -> dict[str, TorchRunner]:
    """Runners of methods by title; the first is that of the base optimizer.

    Args:
        problem: the network.
        names: which of :data:`METHODS`, that of the base optimizer first.
    """
    torch.backends.cudnn.benchmark = True
    if device().type == 'cuda':
        torch.cuda.empty_cache()  # Of the networks before this one.
    return {title(name, problem): TorchRunner(problem, METHODS[name]) for name in names}


def versions() -> dict[str, str]:
    """Of the packages, for the record."""
    return {
        name: importlib.metadata.version(name)
        for name in ('torch', 'pytorch_optimizer')
    }
