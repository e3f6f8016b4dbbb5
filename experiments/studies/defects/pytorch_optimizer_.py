"""Reproductions with the package ``pytorch_optimizer``: bSAM, LookSAM, WSAM, norms.

Losses are quadratics, so that the right numbers follow from the formulas in a few lines
of NumPy. All parameters are float64.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_optimizer  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

from experiments.studies.defects.finding import Finding

_PACKAGE = 'pytorch_optimizer'
# So many examples that bSAM's noise is nothing beside the rest.
_HARDLY_ANY_NOISE = 10**12


def findings() -> list[Finding]:
    """What the package computes beside what the authors' formulas give."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [*_bsam(), *_looksam(), *_wsam(), *_norms()]


def _parameter(values: Any) -> Any:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _closure(optimizer: Any, loss: Callable[[], Any]) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


# --- bSAM: the loss is (w − 3)² / 2, w starts at 0 ------------------------------------


def _bsam() -> list[Finding]:
    finding = functools.partial(Finding, package=_PACKAGE, method='BSAM')
    noise, left = _bsam_noise(num_data=100)
    ascent, _ = _run_bsam(steps=1, lr=0.0, rho=0.1)
    undecayed, _ = _run_bsam(steps=100, lr=0.5, rho=0.0, weight_decay=0.0)
    right_undecayed, _ = _right_bsam(steps=100, lr=0.5, rho=0.0, weight_decay=0.0)
    curvature = {'lr': 0.0, 'rho': 0.0, 'betas': (0.9, 0.0)}
    _, s = _run_bsam(steps=1, **curvature)
    _, right_s = _right_bsam(steps=1, **curvature)
    return [
        finding(
            name='bsam_noise',
            quantity='standard deviation of the noise, N = 100, s = 1',
            measured=noise,
            right=1 / math.sqrt(100),
        ),
        finding(
            name='bsam_noise_left',
            quantity='standard deviation of the weights after a step with rate 0, ρ 0',
            measured=left,
            right=0.0,
        ),
        finding(
            name='bsam_ascent_left',
            quantity='|w| after a step with rate 0, ρ = 0.1, hardly any noise',
            measured=abs(ascent),
            right=0.0,
        ),
        finding(
            name='bsam_weight_decay',
            quantity='w after 100 steps with weight decay δ = 0, rate 0.5, ρ 0',
            measured=undecayed,
            right=right_undecayed,
        ),
        finding(
            name='bsam_curvature',
            quantity='s after a step with β₂ = 0, |g| = 3, damping 0.1, δ = 1e-4',
            measured=s,
            right=right_s,
        ),
    ]


def _bsam_noise(num_data: int) -> tuple[float, float]:
    """The spread of the noise that is put on, and of what a step leaves of it."""
    w = _parameter(np.zeros(200_000))
    optimizer = pytorch_optimizer.BSAM([w], num_data=num_data, lr=0.0, rho=0.0)
    seen = []

    def loss() -> Any:
        seen.append(w.detach().clone())
        return ((w - 3) ** 2).sum() / 2

    closure = _closure(optimizer, loss)
    closure()
    optimizer.step(closure)
    return float(seen[1].std()), float(w.detach().std())


def _run_bsam(
    steps: int,
    lr: float,
    rho: float,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[float, float]:
    w = _parameter([0.0])
    optimizer = pytorch_optimizer.BSAM(
        [w],
        num_data=_HARDLY_ANY_NOISE,
        lr=lr,
        rho=rho,
        weight_decay=weight_decay,
        betas=betas,
        damping=0.1,
    )
    closure = _closure(optimizer, lambda: ((w - 3) ** 2).sum() / 2)
    for _ in range(steps):
        closure()
        optimizer.step(closure)
    # Nine decimals: the others are of the noise.
    return round(float(w.detach()), 9), round(float(optimizer.state[w]['s']), 9)


def _right_bsam(
    steps: int,
    lr: float,
    rho: float,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[float, float]:
    """The same by the authors' formula, without noise."""
    w, m, s = 0.0, 0.0, 1.0
    for _ in range(steps):
        g = w - 3
        p = w + rho * g / s - 3
        m = betas[0] * m + (1 - betas[0]) * (p + weight_decay * w)
        w -= lr * m / s
        s = betas[1] * s + (1 - betas[1]) * (math.sqrt(s) * abs(g) + 0.1 + weight_decay)
    return w, s


# --- LookSAM: the loss is wᵀ H w / 2 --------------------------------------------------


def _looksam() -> list[Finding]:
    finding = functools.partial(Finding, package=_PACKAGE, method='LookSAM')
    off = 'distance from the right reuse step, as a share of that step'
    gradients = 'gradients in 10 steps, k = 5'
    return [
        finding(
            name='looksam_two_tensors',
            quantity=f'two tensors: {off}',
            measured=_looksam_error((3, 3)),
            right=0.0,
        ),
        finding(
            name='looksam_one_tensor',
            quantity=f'one tensor: {off}',
            measured=_looksam_error((6,)),
            right=0.0,
        ),
        finding(
            name='looksam_gradients',
            quantity=f'{gradients}, by step(closure)',
            measured=_looksam_gradients(always=True),
            right=12,
        ),
        finding(
            name='looksam_gradients_skipped',
            quantity=f'{gradients}, second_step() alone on reuse steps',
            measured=_looksam_gradients(always=False),
            right=12,
        ),
    ]


def _looksam_error(sizes: tuple[int, ...]) -> float:
    """How far a reuse step is off for six weights in tensors of these sizes."""
    lr, rho, alpha = 0.1, 0.5, 0.5
    rng = np.random.default_rng(0)
    start, root = rng.normal(size=6), rng.normal(size=(6, 6))
    hessian = root @ root.T / 6

    tensors = [_parameter(x) for x in np.split(start, np.cumsum(sizes)[:-1])]
    optimizer = pytorch_optimizer.LookSAM(
        tensors, torch.optim.SGD, rho=rho, k=2, alpha=alpha, lr=lr
    )
    matrix = torch.tensor(hessian)

    def loss() -> Any:
        w = torch.cat(tensors)
        return w @ matrix @ w / 2

    closure = _closure(optimizer, loss)
    for _ in range(2):
        closure()
        optimizer.step(closure)
    found = torch.cat(tensors).detach().numpy()

    g = hessian @ start
    p = hessian @ (start + rho * g / np.linalg.norm(g))
    g_v = p - (p @ g) / (g @ g) * g
    w = start - lr * p
    g = hessian @ w
    step = lr * (g + alpha * np.linalg.norm(g) / np.linalg.norm(g_v) * g_v)
    return float(np.linalg.norm(found - (w - step)) / np.linalg.norm(step))


def _looksam_gradients(always: bool) -> int:
    period, calls = 5, []
    w = _parameter([1.0, 2.0, 3.0])
    optimizer = pytorch_optimizer.LookSAM([w], torch.optim.SGD, k=period, lr=0.1)

    def loss() -> Any:
        calls.append(1)
        return (w**2).sum()

    closure = _closure(optimizer, loss)
    for step in range(10):
        closure()
        if always or step % period == 0:
            optimizer.step(closure)
        else:
            optimizer.second_step()
    return len(calls)


# --- WSAM: the loss is ‖w‖² / 2, w starts at (10, 0, 0) -------------------------------

_WSAM = {'rho': 0.1, 'gamma': 0.9, 'lr': 0.1}


def _wsam() -> list[Finding]:
    rows = [
        ('wsam_decoupled_clipped', True, 1.0, 1),
        ('wsam_coupled_clipped', False, 1.0, 1),
        ('wsam_decoupled_clipped_3', True, 1.0, 3),
        ('wsam_decoupled', True, None, 1),
        ('wsam_coupled', False, None, 1),
    ]
    return [
        Finding(
            name,
            _PACKAGE,
            f'WSAM, decouple={decouple}, max_norm={max_norm}',
            f'w from 10 after {steps} step{"s" if steps > 1 else ""}',
            _run_wsam(decouple, max_norm, steps),
            _right_wsam(max_norm, steps),
        )
        for name, decouple, max_norm, steps in rows
    ]


def _run_wsam(decouple: bool, max_norm: float | None, steps: int) -> float:
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    w: Any = model.weight
    w.data.copy_(torch.tensor([[10.0, 0.0, 0.0]]))
    optimizer = pytorch_optimizer.WSAM(
        model,
        model.parameters(),
        torch.optim.SGD,
        decouple=decouple,
        max_norm=max_norm,
        **_WSAM,
    )
    closure = _closure(optimizer, lambda: (w**2).sum() / 2)
    for _ in range(steps):
        optimizer.step(closure)
    return float(w.detach()[0, 0])


def _right_wsam(max_norm: float | None, steps: int) -> float:
    """Both gradients clipped; SGD without momentum: decoupled and coupled agree."""
    a = _WSAM['gamma'] / (1 - _WSAM['gamma'])
    w = 10.0
    for _ in range(steps):
        gradients = [w, w + _WSAM['rho'] * np.sign(w)]
        if max_norm is not None:
            gradients = [x * min(1, max_norm / (abs(x) + 1e-6)) for x in gradients]
        g, p = gradients
        w -= _WSAM['lr'] * (g + a * (p - g))
    return float(w)


# --- Norms in float32 -----------------------------------------------------------------


def _norms() -> list[Finding]:
    rho = 0.05
    gradient = np.random.default_rng(0).normal(size=1000)
    # The length that the formula gives, in float64: ρ to its last digits.
    norm = float(np.linalg.norm(gradient))
    exact = rho * norm / (norm + 1e-12)
    precision = [
        Finding(
            f'float32_{name.lower()}',
            _PACKAGE,
            name,
            'relative error of the length of ε, float64',
            abs(_perturbation(name, rho, gradient) / exact - 1),
            0.0,
        )
        for name in ('SAM', 'WSAM', 'LookSAM', 'FriendlySAM')
    ]
    huge = Finding(
        'float32_overflow',
        _PACKAGE,
        'SAM',
        'length of ε, ρ = 0.05, float64, ‖g‖ = 2e20',
        _perturbation('SAM', rho, np.full(4, 1e20)),
        rho,
    )
    return [*precision, huge]


def _perturbation(name: str, rho: float, gradient: np.ndarray) -> float:
    """The length of ε in the first step of a method, in float64."""
    w = _parameter(np.zeros_like(gradient))
    w.grad = torch.tensor(gradient)
    # WSAM wants the network as well, for its batch statistics.
    network = [torch.nn.Identity()] if name == 'WSAM' else []
    optimizer = getattr(pytorch_optimizer, name)(
        *network, [w], torch.optim.SGD, rho=rho, lr=0.1
    )
    optimizer.first_step()
    return float(w.detach().norm())
