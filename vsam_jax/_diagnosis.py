"""Measures the effect of several radii at given parameters, before a run."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsam_jax import _checks, _numerics, reuse
from vsam_jax import perturbation as perturbations
from vsam_jax._types import Mask, PyTree

# Thresholds for the verdict on a radius: conventions, not measured laws. If s is below
# a tenth of g, the direction turns by less than 6 degrees. If the cosine is below 0.7,
# it turns by more than 45: the part of g_SAM across g is longer than the part along g.
_HARDLY = 0.1
_TURNED = 0.7
# Above these, s counts as noise and ε as lost.
_NOISE = 0.9
_LOST = 0.5

_COLUMNS = ('ρ', '‖s‖/‖g‖', 'cos(g, g_SAM)', 'noise of s', 'L(w+ε) − L(w)')


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """The measurements of :func:`diagnose`.

    ``print`` shows them as a table, :meth:`~vsam_jax.Diagnosis.plot` as a picture.

    All arrays are float64 NumPy arrays with one entry for each of the R radii. If a
    second gradient was not finite, the entries of its radius are NaN.

    Attributes:
        rhos: the radii in ascending order, of shape (R,).
        num_batches: how many mini-batches were measured.
        grad_norm: the median of ‖g‖.
        grad_noise: the share of noise in g, in [0, 1].
        ratio: the median of ‖s‖/‖g‖, of shape (R,).
        ratio_quartiles: its quartiles over the mini-batches, of shape (2, R).
        cosine: the median of the cosine of g and g_SAM = g + s, of shape (R,).
        psf_noise: the share of noise in s, in [0, 1], of shape (R,); NaN if s is zero.
        sharpness: the mean of L(w + ε) − L(w), of shape (R,); NaN if ``grad_fn`` does
            not return the loss.
        rounding: how much of ε is lost when w + ε is rounded to the parameters' dtype,
            as a share of ‖ε‖, of shape (R,). 0 for float32 and float64.
    """

    rhos: np.ndarray
    num_batches: int
    grad_norm: float
    grad_noise: float
    ratio: np.ndarray
    ratio_quartiles: np.ndarray
    cosine: np.ndarray
    psf_noise: np.ndarray
    sharpness: np.ndarray
    rounding: np.ndarray

    def __str__(self) -> str:
        """A table, and what it means in plain words."""
        head = (
            f'{self.num_batches} mini-batches. ‖g‖ is {self.grad_norm:.3g}, and'
            f' {_percent(self.grad_noise)} of ‖g‖² is noise.'
        )
        rows = [_COLUMNS, *(self._row(i) for i in range(len(self.rhos)))]
        if np.isnan(self.sharpness).all():
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            '  '.join(
                cell.rjust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in rows
        ]
        return '\n'.join([head, '', *lines, '', *self._reading()])

    def _row(self, i: int) -> tuple[str, ...]:
        return (
            f'{self.rhos[i]:g}',
            f'{self.ratio[i]:.3f}',
            f'{self.cosine[i]:.3f}',
            _percent(self.psf_noise[i]),
            f'{self.sharpness[i]:.3g}',
        )

    def _reading(self) -> list[str]:
        """A sentence for each kind of radius that occurs."""
        hardly, turned = self.ratio < _HARDLY, self.cosine < _TURNED
        tried = ~(hardly | turned | np.isnan(self.ratio))
        kinds = (
            (hardly, f's is under {_percent(_HARDLY)} of g. Hardly any effect.'),
            (tried, f's is {_percent(_HARDLY)} of g or more. Try these.'),
            (
                turned & ~hardly,
                'g_SAM turns from g by more than 45 degrees. Likely too large.',
            ),
            (np.isnan(self.ratio), 'a second gradient is not finite. Too large.'),
            (
                self.rounding > _LOST,
                'more than half of ε is lost to rounding in the dtype of the'
                ' parameters. Keep them in float32.',
            ),
            (
                self.psf_noise > _NOISE,
                'mini-batches agree on little of s. One that is reused on later steps'
                ' brings its noise with it.',
            ),
        )
        lines = [
            f'ρ = {", ".join(f"{rho:g}" for rho in self.rhos[kind])}: {text}'
            for kind, text in kinds
            if kind.any()
        ]
        if not tried.any():
            lines.append('No radius is worth a trial: measure others.')
        return [*lines, 'These are rules of thumb. Validation accuracy decides.']

    def plot(self) -> Any:
        """Draws ‖s‖/‖g‖, and cosine and noise, against ρ.

        The band shows the quartiles over the mini-batches. As in the text, radii above
        the dashed lines are worth a trial.

        Returns:
            A figure of two panels, made by ``matplotlib.pyplot``. Save it with
            ``diagnosis.plot().savefig('rho.png')``.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                'Diagnosis.plot needs matplotlib, which is not installed: pip install'
                ' matplotlib. The numbers are in print(diagnosis).'
            ) from error
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout='constrained')
        left.plot(self.rhos, self.ratio, 'o-', color='#D55E00')
        left.fill_between(self.rhos, *self.ratio_quartiles, color='#D55E00', alpha=0.2)
        left.set(xscale='log', yscale='log', xlabel='ρ', ylabel='‖s‖ / ‖g‖')
        right.plot(self.rhos, self.cosine, 'o-', color='#0072B2', label='cosine')
        right.plot(self.rhos, self.psf_noise, 's-', color='#555555', label='noise of s')
        right.axhline(
            self.grad_noise, color='#555555', linestyle=':', label='noise of g'
        )
        for panel, level in ((left, _HARDLY), (right, _TURNED)):
            panel.axhline(level, color='#999999', linewidth=0.8, linestyle='--')
        right.set(xscale='log', xlabel='ρ', ylim=(min(0, right.get_ylim()[0]), 1.05))
        right.legend()
        return figure


def diagnose(
    grad_fn: Callable[[PyTree, Any], PyTree],
    params: PyTree,
    batches: Iterable[Any],
    rhos: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    *,
    num_batches: int = 32,
    perturbation: perturbations.Perturbation = perturbations.l2_ascent,
    perturb_mask: Mask | None = None,
) -> Diagnosis:
    r"""Measures what sharpness-aware steps of several radii would do at ``params``.

    Take it to choose ρ before a run. For each mini-batch it computes the gradient g,
    and for each radius the second gradient g_SAM = ∇L(w + ε). It trains nothing. For
    each radius the result shows:

    - the length of the PSF, s = g_SAM − g, relative to that of g;
    - the cosine of g and g_SAM;
    - the rise in the loss, L(w + ε) − L(w);
    - the *share of noise*: the part of the mean of ‖s‖² in which the n mini-batches
      differ,

    .. math::
      \frac{n}{n - 1} \Big(1 - \frac{‖\bar s‖^2}{\overline{‖s‖^2}}\Big), \quad
      \bar s = \frac1n \sum_i s_i,

    clipped to [0, 1]. It is 0 if all mini-batches have the same s, and 1 if what they
    have in common is no longer than chance would make it.

    A radius at which s is below a tenth of g has hardly any effect. A radius at which
    g_SAM turns from g by more than 45 degrees is probably too large. These are rules of
    thumb. Measure again later in training: the same radius may then do more, or less.

    Args:
        grad_fn: ``grad_fn(params, batch)`` returns gradients, or ``(value, gradients)``
            as ``jax.value_and_grad`` does. It is compiled. It must return the same
            result for the same arguments, so put a dropout key into ``batch``.
        params: w, a tree of floating-point arrays.
        batches: at least two mini-batches of the same shapes. Pass slices of them,
            ``(x[::4] for x in batches)``, to see what ``psf_grad_fn`` would measure.
        rhos: the radii, numbers > 0. Each costs one gradient per mini-batch, and as
            much memory as the parameters.
        num_batches: how many mini-batches to take from ``batches``, at least two.
            ``batches`` may have fewer.
        perturbation: as in :func:`vsam_jax.sharpness_aware`. One with a memory sees the
            gradients of these mini-batches.
        perturb_mask: the tensors to perturb, as in :func:`vsam_jax.vsam`.

    Returns:
        A :class:`Diagnosis`. Sums and norms are computed in float32 or wider.
        Mini-batches with a zero gradient count only in the shares of noise.

    Raises:
        TypeError, ValueError: for invalid arguments, fewer than two mini-batches,
            mini-batches of different shapes, and gradients that do not match
            ``params``, are not finite, or are all zero.

    Example:
        >>> import jax, jax.numpy as jnp, vsam_jax
        >>> def loss(w, x):
        ...   return jnp.mean((w - x) ** 2 @ jnp.array([1.0, 100.0])) / 2
        >>> batches = 1e-3 * jax.random.normal(jax.random.key(0), (16, 32, 2))
        >>> diagnosis = vsam_jax.diagnose(
        ...   jax.grad(loss), jnp.array([1.0, 0.001]), batches, rhos=(0.005, 0.05, 0.5))
        >>> print(*str(diagnosis).splitlines()[2:-1], sep='\n')
            ρ  ‖s‖/‖g‖  cos(g, g_SAM)  noise of s
        0.005    0.050          0.999         4 %
         0.05    0.496          0.914         4 %
          0.5    4.956          0.378         4 %
        <BLANKLINE>
        ρ = 0.005: s is under 10 % of g. Hardly any effect.
        ρ = 0.05: s is 10 % of g or more. Try these.
        ρ = 0.5: g_SAM turns from g by more than 45 degrees. Likely too large.
    """
    if not callable(grad_fn):
        raise TypeError(
            f'grad_fn must be a function of (params, batch), got {grad_fn!r}.'
        )
    perturbations.check(perturbation)
    _checks.floating_leaves('params', params)
    radii = _radii(rhos)
    num_batches = _checks.integer('num_batches', num_batches, low=2)
    mask = _checks.resolve_mask('perturb_mask', perturb_mask, params)
    passes = _Passes(grad_fn, perturbation, mask)
    # Turns NumPy arrays into JAX's, so that both are donated and widened alike.
    params = jax.tree.map(jnp.asarray, params)
    taken = itertools.islice(_alike(batches), num_batches)
    return _diagnosis(radii, *_measured(passes, params, radii, taken))


@dataclasses.dataclass(frozen=True)
class _Passes:
    """The two passes, each a program."""

    grad_fn: Callable[[PyTree, Any], PyTree]
    perturbation: perturbations.Perturbation
    mask: PyTree | None

    def first(self, params: PyTree, batch: Any, total: PyTree) -> Any:
        """The loss (or None), g, the sum of gradients, and the length of g."""
        value, grads = _told(self.grad_fn(params, batch), params)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
        return value, grads, total, _numerics.wide_norm(grads)

    def second(
        self,
        params: PyTree,
        batch: Any,
        value: Any,
        grads: PyTree,
        memory: PyTree,
        rho: jax.Array,
        total: PyTree,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The sum of PSFs, and the numbers of this one."""
        wide = jax.tree.map(_numerics.widen, params)
        there, exact = (
            perturbations.perturb(self.perturbation, grads, w, rho, self.mask, memory)
            for w in (params, wide)
        )
        sam_value, sam_grads = _told(self.grad_fn(there, batch), params)
        sam, first = (jax.tree.map(_numerics.widen, x) for x in (sam_grads, grads))
        psf = reuse.psf_of(grads, sam_grads)
        norm = _numerics.wide_norm
        # Not optax.tree.vdot, whose reshapes fail on explicitly sharded arrays.
        along = jnp.asarray(optax.tree.sum(optax.tree.mul(first, sam)))
        numbers = {
            'psf_norm': norm(psf),
            # One division after the other: the product of both norms may underflow.
            'cosine': _share(_share(along, norm(first)), norm(sam)),
            'rounding': _share(
                norm(optax.tree.sub(exact, there)), norm(optax.tree.sub(exact, wide))
            ),
        }
        if value is not None:
            above, here = (_numerics.widen(jnp.asarray(x)) for x in (sam_value, value))
            numbers['sharpness'] = above - here
        total = jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, psf)
        return total, numbers

    def observe(self, grads: PyTree, params: PyTree, memory: PyTree) -> PyTree:
        """The memory of the perturbation after this mini-batch."""
        return perturbations.observe(
            self.perturbation, grads, params, memory, self.mask
        )


def _measured(
    passes: _Passes, params: PyTree, radii: np.ndarray, batches: Iterable[Any]
) -> tuple[np.ndarray, list[dict[str, np.ndarray]], np.ndarray]:
    """Norms of g, numbers by mini-batch and radius, and norms of the means.

    The first mean is that of g, the others are those of s.
    """
    first, observe = jax.jit(passes.first, donate_argnums=2), jax.jit(passes.observe)
    second = jax.jit(passes.second, donate_argnums=6)
    dtype = _numerics.statistics_dtype(params)
    zeros = lambda: optax.tree.zeros_like(params, dtype=dtype)
    totals, memory = (
        [zeros() for _ in radii],
        perturbations.init(passes.perturbation, params),
    )
    grad_total, norms, numbers = zeros(), [], []
    for batch in batches:
        value, grads, grad_total, norm = first(params, batch, grad_total)
        rows = []
        for i, rho in enumerate(radii):
            totals[i], row = second(
                params, batch, value, grads, memory, jnp.asarray(rho, dtype), totals[i]
            )
            rows.append(row)
        if memory is not None:
            memory = observe(grads, params, memory)
        # Waits for the device, so that at most one mini-batch is in flight.
        norm, rows = jax.device_get((norm, rows))
        if not np.isfinite(norm):
            raise ValueError(
                'grad_fn must give finite gradients at params, but ‖g‖ is'
                f' {norm} for mini-batch {len(norms)} of batches (from 0 on).'
            )
        norms.append(norm)
        numbers.append({name: [row[name] for row in rows] for name in rows[0]})
    if len(norms) < 2:
        raise ValueError(
            'batches must hold at least two mini-batches, because noise is how they'
            f' differ, got {len(norms)}. A generator that is exhausted gives none.'
        )
    norm_of = jax.jit(_numerics.wide_norm)
    means = [norm_of(t) / len(norms) for t in (grad_total, *totals)]
    return np.asarray(norms, float), numbers, np.asarray(jax.device_get(means), float)


def _diagnosis(
    radii: np.ndarray,
    grad_norms: np.ndarray,
    numbers: list[dict[str, Any]],
    mean_norms: np.ndarray,
) -> Diagnosis:
    """Summarizes the numbers of all mini-batches."""
    counts = grad_norms > 0
    if not counts.any():
        raise ValueError(
            f'grad_fn must give gradients that are not all zero, but those of all'
            f' {len(counts)} mini-batches are. At these params there is nothing to'
            ' measure; are all targets masked, or all units dead?'
        )
    columns = {
        name: np.array([row[name] for row in numbers], float) for name in numbers[0]
    }
    psf_norms = columns['psf_norm']
    ratios = psf_norms[counts] / grad_norms[counts, None]
    # Medians turn them into NaN.
    ratios = np.where(np.isfinite(ratios), ratios, np.nan)
    mean = lambda name: columns[name].mean(axis=0)
    has_value = 'sharpness' in columns
    return Diagnosis(
        rhos=radii,
        num_batches=len(grad_norms),
        grad_norm=float(np.median(grad_norms)),
        grad_noise=float(_noise(grad_norms[:, None], mean_norms[:1])[0]),
        ratio=np.median(ratios, axis=0),
        ratio_quartiles=np.quantile(ratios, (0.25, 0.75), axis=0),
        cosine=np.median(columns['cosine'][counts], axis=0),
        psf_noise=_noise(psf_norms, mean_norms[1:]),
        sharpness=mean('sharpness') if has_value else np.full(len(radii), np.nan),
        rounding=mean('rounding'),
    )


def _noise(norms: np.ndarray, mean_norms: np.ndarray) -> np.ndarray:
    """The share of noise, of shape (R,); NaN where norms are zero or not finite."""
    n, power = len(norms), (norms**2).mean(axis=0)
    usable = np.isfinite(power) & (power > 0)
    common = mean_norms**2 / np.where(usable, power, 1)
    share = np.clip(n / (n - 1) * (1 - np.where(usable, common, 0)), 0, 1)
    return np.where(usable, share, np.nan)


def _told(result: Any, params: PyTree) -> tuple[Any, PyTree]:
    """The loss, or None if it is not returned, and the gradient."""
    value, grads, structure = None, result, jax.tree.structure(params)
    if isinstance(result, tuple) and len(result) == 2:
        is_gradient = jax.tree.structure(result) == structure
        if not is_gradient and jax.tree.structure(result[1]) == structure:
            value, grads = result
    name = 'the result of grad_fn'
    _checks.same_tree(name, grads, 'params', params, dtypes=False)
    _checks.floating_leaves(name, grads)
    if value is not None and [jnp.shape(x) for x in jax.tree.leaves(value)] != [()]:
        raise TypeError(
            'grad_fn must give gradients or (value, gradients), value being the loss'
            f' alone, a scalar, got {value!r} for it. Does the loss function return'
            ' more (has_aux)? Take the first of it.'
        )
    return value, grads


def _radii(rhos: Any) -> np.ndarray:
    """The radii as an array in ascending order."""
    allowed = 'a sequence of finite numbers > 0, such as (0.05, 0.1, 0.2)'
    try:
        radii = np.asarray(rhos, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f'rhos must be {allowed}, got {rhos!r}.') from None
    if (
        radii.ndim != 1
        or not radii.size
        or not (np.isfinite(radii) & (radii > 0)).all()
    ):
        raise ValueError(f'rhos must be {allowed}, got {rhos!r}.')
    return np.sort(radii)


def _alike(batches: Iterable[Any]) -> Iterable[Any]:
    """The mini-batches; raises at one whose shapes differ from the first."""
    like = None
    for i, batch in enumerate(batches):
        like = batch if i == 0 else like
        name = f'batches[{i}]'
        try:
            _checks.same_tree(name, batch, 'batches[0]', like, dtypes=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'{error} All mini-batches must be alike, as noise depends on their'
                ' size: leave out a smaller last one.'
            ) from error
        yield batch


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 where both are 0."""
    return part / jnp.where(whole == 0, 1, whole)


def _percent(share: float) -> str:
    return '–' if np.isnan(share) else f'{100 * share:.0f} %'
