"""What of a configuration runs on the device: data, model, step, evaluation."""

import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsam_jax
from experiments.common import configuration
from experiments.common.devices import Devices
from experiments.data import augmentation, examples, sources
from experiments.data.augmentation import Augmentation
from experiments.methods import registry
from experiments.models import quantization, zoo
from experiments.training import start
from experiments.training.loss import loss_of
from experiments.training.state import COLUMNS, RunState

PyTree = Any
# How many examples are evaluated at once.
_EVALUATION_BATCH = 512


class Experiment:
    """A configuration, made runnable for any number of seeds.

    Everything that depends on the seed is an argument of the programs, so they
    are compiled once, whichever seeds are run.

    Args:
        config: a configuration, see :mod:`experiments.common.configuration`.
        dataset: the data set of ``config.data``, if it is loaded already.
        num_devices: how many devices are trained on, 0 for all; several processes
            train on all of theirs.

    Attributes:
        devices: the devices.
        dataset: the data set, with true labels, on the devices.
        model: the network.
        augmentation: how training images are changed at random.
        method: the optimizer and what goes with it.
        steps_per_epoch: full batches of an epoch.
        num_steps: steps of a run.
        rows: steps of a logging interval.
        step: ``step(state, batch) -> (state, None)``, compiled; the state that is
            passed in is consumed.
        compile_seconds: the time that compilation took, by program.
    """

    def __init__(
        self,
        config: Any,
        dataset: examples.Dataset | None = None,
        num_devices: int = 1,
    ):
        configuration.check(config)
        self.devices = Devices.first(num_devices)
        if config.batch_size % self.devices.count:
            raise configuration.ConfigError(
                'config.batch_size must be a multiple of the number of devices,'
                f' {self.devices.count}, got {config.batch_size}.'
            )
        if dataset is None:
            dataset = sources.load(config.data, self.devices)
        self.dataset = dataset.on(self.devices)
        network = zoo.create(
            config.model, config.models[config.model], self.dataset.num_classes
        )
        self.model = configuration.call(
            quantization.quantize,
            'config.quantization',
            config.quantization,
            network=network,
            image_shape=self.dataset.image_shape,
        )
        self._config = config
        self.augmentation = configuration.call(
            Augmentation, 'config.augmentation', config.augmentation
        )
        self.batch_size = config.batch_size
        self.steps_per_epoch = examples.steps_per_epoch(
            self.dataset.train.size, config.batch_size
        )
        self.num_steps = config.epochs * self.steps_per_epoch
        self.rows = config.log_every * self.steps_per_epoch
        self.method = registry.create(
            config.method,
            config.methods[config.method],
            config.optimizer,
            registry.Task(
                num_steps=self.num_steps,
                steps_per_epoch=self.steps_per_epoch,
                num_examples=self.dataset.train.size,
                num_classes=self.dataset.num_classes,
                last_tensors=functools.partial(
                    zoo.last_tensors, self.model, self.dataset.image_shape
                ),
            ),
        )
        loss_fn = loss_of(self.model, config.label_smoothing)
        train_step = _recorded(
            self.method.make_step(_spread(loss_fn, self.devices)),
            has_plan=bool(self.method.programs),
        )
        shardings = (self.devices.whole, None)
        self.step: Any
        if self.method.programs and config.dispatch == 'planned':
            self.step = vsam_jax.PlannedStep(train_step, out_shardings=shardings)
        else:
            self.step = jax.jit(train_step, donate_argnums=0, out_shardings=shardings)
        self.compile_seconds: dict[str, float] = {}

    def init(self, seed: int) -> RunState:
        """The state of step 0."""
        images = self.batch(self.dataset.train, self.epoch(seed, 0), 0)['image']
        variables = start.variables(
            self.model, _stream(seed, 0), images, self._config, seed
        )
        state = RunState.create(
            apply_fn=self.model.apply,
            params=variables['params'],
            batch_stats=variables.get('batch_stats'),
            tx=self.method.tx,
            record=jnp.zeros((self.rows, len(COLUMNS)), jnp.float32),
            memory=self.method.init_memory(),
        )
        return self.devices.replicate(state)

    def epoch(self, seed: int, epoch: int) -> examples.Epoch:
        """What the batches of an epoch follow from, a function of both numbers."""
        order = examples.epoch_order(
            _stream(seed, 1),
            epoch,
            num_examples=self.dataset.train.size,
            batch_size=self.batch_size,
        )
        key = examples.epoch_key(_stream(seed, 2), epoch)
        return self.devices.replicate(examples.Epoch(order, key))

    def batch(self, split: examples.Split, epoch: examples.Epoch, index: int) -> PyTree:
        """One batch of an epoch; all epochs have the same number of them."""
        return examples.take_batch(
            split,
            self.dataset.mean,
            self.dataset.std,
            epoch.order,
            np.int32(index % self.steps_per_epoch),
            epoch.key,
            augmentation=self.augmentation,
        )

    def compile(self, state: RunState, batch: PyTree) -> None:
        """Compiles the programs of a run, once; ``state`` is left as it is.

        The difference between a first and a second call is the time it took.
        """
        if self.compile_seconds:
            return
        programs = {'step': self.step}
        if isinstance(self.step, vsam_jax.PlannedStep):
            programs = {
                'sampled' if sample else 'reuse': self.step.program(sample)
                for sample in self.method.programs
            }
        for name, program in programs.items():
            first, second = (_seconds(program, state, batch) for _ in range(2))
            self.compile_seconds[name] = max(first - second, 0.0)

    def counts(self, state: RunState) -> dict[str, int]:
        """How many steps of the run so far were sampled, and how many in vain."""
        counts = {'num_samples': 0, 'num_rejected': 0}
        if self.method.programs:
            numbers = jax.device_get(vsam_jax.metrics(state.opt_state))
            counts = {name: int(numbers[name]) for name in counts}
        elif self.method.always_samples:
            counts['num_samples'] = int(state.step)
        return counts

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Accuracies and losses on the examples held back, of each kind there is."""
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        splits = {'validation': self.dataset.validation, 'test': self.dataset.test}
        splits = {name: split for name, split in splits.items() if split.size}
        totals = {}
        for name, split in splits.items():
            length = min(_EVALUATION_BATCH, split.size)
            # So that each device gets the same number of them.
            length += -length % self.devices.count
            parts = [
                _evaluate_part(
                    self.model,
                    variables,
                    split,
                    self.dataset.mean,
                    self.dataset.std,
                    start,
                    length,
                )
                for start in range(0, split.size, length)
            ]
            totals[name] = sum(parts[1:], parts[0])
        return {
            f'{name}_{quantity}': float(total) / splits[name].size
            for name, pair in jax.device_get(self.devices.replicate(totals)).items()
            for quantity, total in zip(('accuracy', 'loss'), pair, strict=True)
        }


def _stream(seed: int, number: int) -> jax.Array:
    """A key of its own for each use that a run makes of its seed."""
    key = jax.random.key(seed, impl='threefry2x32')
    return jax.random.fold_in(key, number)


def _spread(loss_fn: Callable[..., Any], devices: Devices) -> Callable[..., Any]:
    """The same loss, of which each device computes its share of the examples."""

    def spread_loss(params: PyTree, batch_stats: PyTree, batch: Any, key: Any, /):
        return loss_fn(params, batch_stats, devices.spread(batch), key)

    return spread_loss


def _recorded(train_step: Any, has_plan: bool) -> Any:
    """The same step, which also writes a row of ``state.record``."""

    def recorded_step(state: RunState, batch: Any) -> tuple[RunState, None]:
        new, aux = train_step(state, batch)
        numbers = aux | (vsam_jax.metrics(new.opt_state) if has_plan else {})
        row = [jnp.asarray(numbers.get(name, jnp.nan), jnp.float32) for name in COLUMNS]
        index = state.step % state.record.shape[0]
        return new.replace(record=state.record.at[index].set(jnp.stack(row))), None

    return recorded_step


@functools.partial(jax.jit, static_argnames=('model', 'length'))
def _evaluate_part(
    model: nn.Module,
    variables: PyTree,
    split: examples.Split,
    mean: jax.Array,
    std: jax.Array,
    start: jax.Array | int,
    length: int,
) -> jax.Array:
    """How many examples from ``start`` on are right, and the sum of their losses."""
    rows = start + jnp.arange(length)
    counts = rows < split.size
    images, labels = split.take(jnp.minimum(rows, split.size - 1))
    images = augmentation.normalize(images, mean, std)
    logits = jnp.asarray(model.apply(variables, images, train=False))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = logits.argmax(-1) == labels
    return jnp.stack([jnp.sum(right * counts), jnp.sum(losses * counts)])


def _seconds(program: Any, state: RunState, batch: PyTree) -> float:
    """The time of one call on a copy of the state, which the call consumes."""
    copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    start = time.perf_counter()
    jax.block_until_ready(program(copy, batch))
    return time.perf_counter() - start
