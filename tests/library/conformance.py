"""Runs that programs of the authors recorded, made again with this library.

    python -m tests.library.conformance

makes them all and writes docs/evidence/conformance.md.
"""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsam_jax
from tests import problems
from vsam_jax import perturbation, reuse, sampling
from vsam_jax._methods import every_step

FOLDER = problems.GOLDEN / 'authors'


@dataclasses.dataclass(frozen=True)
class Case:
    """How a recorded run is made again.

    Attributes:
        method: what it is in this library, in words.
        make: the transformation, from the settings and arrays of the record.
        is_last: whether it stands after the base optimizer.
        tolerance: how far its parameters may be off.
    """

    method: str
    make: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
    is_last: bool = False
    tolerance: float = 1e-10


def _recorded(data: dict[str, np.ndarray], name: str, otherwise: Any) -> Any:
    """What a record says of every step, or what its settings say."""
    if name not in data:
        return otherwise
    return lambda count: jnp.asarray(data[name])[count]


CASES = {
    'sam_2': Case('`sam`', lambda m, _: vsam_jax.sam(m['rho'])),
    'asam': Case(
        '`asam(eta=…, scale_mask=all_but_biases)`',
        lambda m, _: vsam_jax.asam(
            m['rho'], eta=m['eta'], scale_mask=perturbation.all_but_biases
        ),
    ),
    'asam_3': Case('`asam`', lambda m, _: vsam_jax.asam(m['rho'])),
    'looksam': Case(
        '`looksam`',
        lambda m, _: vsam_jax.looksam(m['rho'], every=m['k'], gain=m['alpha']),
    ),
    'gsam': Case('`gsam`', lambda m, _: vsam_jax.gsam(m['rho'], m['alpha'])),
    'gsam_3': Case(
        '`SurrogateGap` with `elementwise_ascent` and a schedule of ρ',
        lambda m, data: every_step(
            perturbation.elementwise_ascent(),
            reuse.SurrogateGap(m['alpha']),
            _recorded(data, 'rho', None),
        ),
    ),
    'wsam_2': Case('`wsam`', lambda m, _: vsam_jax.wsam(m['rho'], m['gamma'])),
    'wsam_4': Case(
        '`Amplified` with `elementwise_ascent`',
        lambda m, _: every_step(
            perturbation.elementwise_ascent(),
            reuse.Amplified(m['gamma'] / (1 - m['gamma'])),
            m['rho'],
        ),
    ),
    'fsam': Case(
        '`fsam`', lambda m, _: vsam_jax.fsam(m['rho'], m['sigma'], m['lmbda'])
    ),
    # The authors divide by ‖d‖ + 1e-7.
    'vasso': Case(
        '`vasso`', lambda m, _: vsam_jax.vasso(m['rho'], m['theta']), tolerance=1e-6
    ),
    'asyncsam': Case('`asyncsam`', lambda m, _: vsam_jax.asyncsam(m['rho'])),
    'aesam': Case(
        '`aesam`',
        lambda m, _: vsam_jax.sharpness_aware(
            perturbation.l2_ascent,
            sampling.ByGradientNorm(
                steps=m['steps'],
                delta=m['delta'],
                lambda1=m['lambda1'],
                lambda2=m['lambda2'],
                initial_mean=m['mu_init'],
                initial_variance=m['var_init'],
            ),
            reuse.NoReuse(),
            m['rho'],
        ),
    ),
    'ssam': Case(
        '`Renormalized`',
        lambda m, _: every_step(perturbation.l2_ascent, reuse.Renormalized(), m['rho']),
    ),
    'ssam_2': Case(
        '`Renormalized` with `unified_ascent(0)`',
        lambda m, _: every_step(
            perturbation.unified_ascent(0.0), reuse.Renormalized(), m['rho']
        ),
    ),
    'unified': Case(
        '`unified_ascent`',
        lambda m, _: every_step(
            perturbation.unified_ascent(m['lambd']), reuse.NoReuse(), m['rho']
        ),
    ),
    'samon': Case(
        '`sam(perturb_mask=normalization_layers)`',
        lambda m, _: vsam_jax.sam(
            m['rho'], perturb_mask=perturbation.normalization_layers
        ),
    ),
    'msam': Case('`msam`', lambda m, _: vsam_jax.msam(m['rho']), is_last=True),
}
# Records of the same programs with other settings.
AGAIN = {
    'asam_2': 'asam',
    'looksam_2': 'looksam',
    'gsam_2': 'gsam',
    'fsam_2': 'fsam',
    'vasso_2': 'vasso',
    'aesam_2': 'aesam',
    'unified_4': 'unified',
    'samon_2': 'samon',
    'msam_2': 'msam',
}
CASES |= {again: CASES[first] for again, first in AGAIN.items()}


@functools.cache
def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and settings of a record; see tests/library/golden/README.md."""
    with np.load(FOLDER / f'{name}.npz') as file:
        data = {key: file[key] for key in file}
    meta = json.loads(str(data.pop('meta')))
    # The examples of a mini-batch are those of its seed, in multiples of 1/1024.
    normal = np.random.RandomState(meta['seed']).standard_normal((meta['steps'], 32, 6))
    data['x'] = np.round(normal * 1024) / 1024
    return data, meta


def tree(meta: dict[str, Any], arrays: list[Any]) -> dict[str, dict[str, Any]]:
    """The tensors of a record by layer, under the names that Flax has for them."""
    made: dict[str, dict[str, Any]] = {}
    for name, array in zip(meta['order'], arrays, strict=True):
        layer, kind = name.removesuffix(' [in, out]').split('.')
        weight = 'kernel' if '[in, out]' in name else 'scale'
        made.setdefault(layer, {})['bias' if kind == 'bias' else weight] = array
    return made


def loss_of(meta: dict[str, Any]) -> Callable[..., jax.Array]:
    """The loss of the network of a record."""
    layers = list(dict.fromkeys(name.split('.')[0] for name in meta['order']))

    def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * (
            scale
        ) + (bias)

    def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = batch
        for name, following in zip(layers, [*layers[1:], None], strict=True):
            if 'kernel' in params[name]:
                x = x @ params[name]['kernel'] + params[name]['bias']
            else:
                x = layer_norm(x, **params[name])
            if following is not None and 'kernel' in params[following]:
                x = jnp.tanh(x)
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    return loss


def largest_difference(name: str) -> float:
    """How far this library's run is off a record, at most, in any parameter."""
    data, meta = load(name)
    case = CASES[name]
    method = case.make(meta, data)
    base = (
        optax.add_decayed_weights(meta['weight_decay']),
        optax.sgd(_recorded(data, 'lr', meta['lr']), momentum=meta['momentum']),
    )
    tx = optax.chain(*base, method) if case.is_last else optax.chain(method, *base)
    count = len(meta['order'])
    params = tree(meta, [jnp.asarray(data[f'init_{i}']) for i in range(count)])
    step = jax.jit(problems.make_step(tx, loss_of(meta)))
    state, worst = (params, tx.init(params)), 0.0
    for t in range(meta['steps']):
        state, _ = step(state, (jnp.asarray(data['x'][t]), jnp.asarray(data['y'][t])))
        if case.is_last:
            reached = vsam_jax.msam_eval_params(state[1], state[0])
        else:
            reached = state[0]
        for row in np.flatnonzero(data['at'] == t):
            expected = tree(meta, [data[f'params_{i}'][row] for i in range(count)])
            gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), reached, expected)
            worst = max(worst, *map(float, jax.tree.leaves(gaps)))
    return worst


PAGE = pathlib.Path(__file__).parents[2] / 'docs/evidence/conformance.md'
TEXT = """# Conformance

Methods are held to runs of 60 steps that programs of their authors recorded in
float64, or, where none was found, programs that others wrote (*made by* says which):
this library makes the run again, with the same data, initial parameters and settings,
and the parameters are compared after steps 1, 2, 3, 6, 11, 21, 41 and 60. The records
stand in `tests/library/golden/`; its README says how they were made. `make test`
compares them all.

{table}

*Largest difference*: of any parameter, at any of these steps; parameters are of the
order of 1. Where no program of the authors was found, *made by* says who wrote the
one that was recorded. Differences near 1e-7 are those of another small number that
keeps a division finite: VaSSO's authors divide by ‖d‖ + 1e-7, here it is ‖d‖ + 1e-12.

Where the published formula and the program of its authors differ, this library does
the following.

- **F-SAM**: the program subtracts the average of the *earlier* gradients, the paper
  the one that has the latest in it. At the default σ = 1 both give the same
  direction. The program's form is used.
- **VaSSO**: the average starts with the first gradient, as in the program.
- **GSAM**: in the authors' example the first step has the smallest ρ, because their
  schedule of the learning rate says zero before its first call. Here ρ follows the
  rate from the first step on.
- **MSAM**: with a schedule of ρ the program takes the old perturbation back with the
  new ρ, so that parameters drift. Here what was added is taken back.
- **MSAM after AdamW**: the authors' variant goes along the mean of the gradients and
  decays the unperturbed weights; here ε follows the whole update of the base optimizer.
- `vsam` has a record of its own (`vsam_k10`, in `test_golden.py`); `steady_vsam` and
  `lean_sam` are this library's.
- **WSAM**: the decoupled form keeps the sharpness out of the base optimizer's
  momentum; links of an optax chain share no state, so it is not offered.
- **ESAM** is no optax transformation (it selects examples); the trainer in
  `experiments/` has it, and its tests hold it to the authors' runs.

Made with {versions}: `python -m tests.library.conformance`.
"""


def page() -> str:
    """docs/evidence/conformance.md: every record, compared now."""
    lines = [
        '| Method | Of this library | Made by | Steps | Largest difference |',
        '| --- | --- | --- | --- | --- |',
    ]
    for name, case in CASES.items():
        _, meta = load(name)
        source = meta['made_by']
        if meta['repository']:
            path = meta['repository'].removeprefix('https://github.com/')
            source += f', [{path}]({meta["repository"]}), `{meta["file"]}`'
            source += f' at {meta["commit"][:7]}'
        gap = largest_difference(name)
        lines.append(
            f'| {name} | {case.method} | {source} | {meta["steps"]} | {gap:.0e} |'
        )
    versions = ', '.join(
        f'{package} {importlib.metadata.version(package)}'
        for package in ('jax', 'jaxlib', 'optax')
    )
    return TEXT.format(table='\n'.join(lines), versions=versions)


if __name__ == '__main__':
    with jax.enable_x64(True):
        PAGE.write_text(page())
