"""What of a configuration runs on the device, made of its parts."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import vsam_jax
from experiments.common import configuration
from experiments.common.devices import Devices
from experiments.data import sources
from experiments.data.augmentation import Augmentation
from experiments.data.examples import Dataset
from experiments.methods import registry
from experiments.methods.method import Method, Task
from experiments.models import quantization, zoo
from experiments.training import start
from experiments.training.batches import Batches, stream
from experiments.training.evaluation import evaluate
from experiments.training.loss import loss_of
from experiments.training.state import COLUMNS, RunState
from experiments.training.step import Step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration, made runnable for any number of seeds.

    Everything that depends on the seed is an argument of the programs, so they
    are compiled once, whichever seeds are run.

    Attributes:
        config: the configuration.
        batches: the data set and the mini-batches of a run.
        model: the network.
        method: the optimizer and what goes with it.
        step: a step of a run, compiled.
    """

    config: Any
    batches: Batches
    model: nn.Module
    method: Method
    step: Step

    @property
    def num_steps(self) -> int:
        """Steps of a run."""
        return self.config.epochs * self.batches.steps_per_epoch

    def with_config(self, config: Any) -> 'Experiment':
        """The same programs for a configuration with another seed, rate or ρ.

        Args:
            config: what :func:`build` had, but for ``seed`` and, if it had ``shared``,
                the learning rate and ρ.
        """
        return dataclasses.replace(self, config=config)

    def init(self, seed: int) -> RunState:
        """The state of step 0."""
        batches = self.batches
        epoch = batches.epoch(seed, 0)
        images = batches.take(batches.dataset.train, epoch, 0)['image']
        key = stream(seed, 0)
        variables = start.variables(self.model, key, images, self.config, seed)
        rows = self.config.log_every * batches.steps_per_epoch
        state = RunState.create(
            apply_fn=self.model.apply,
            params=variables['params'],
            batch_stats=variables.get('batch_stats'),
            tx=self.method.tx,
            record=jnp.zeros((rows, len(COLUMNS)), jnp.float32),
            memory=self.method.init_memory(),
        )
        if self.method.shared:
            placed = registry.with_hyperparameters(state.opt_state, self.config)
            state = state.replace(opt_state=placed)
        return batches.devices.replicate(state)

    def variables(self, state: RunState) -> Any:
        """The parameters that are evaluated, and the statistics of BatchNorm."""
        params = state.params
        if self.method.eval_params is not None:
            params = self.method.eval_params(state.opt_state, params)
        return {'params': params, 'batch_stats': state.batch_stats}

    def evaluate(self, state: RunState) -> dict[str, float]:
        """What :func:`.evaluation.evaluate` says of a state."""
        return evaluate(self.model, self.variables(state), self.batches.dataset)

    def counts(self, state: RunState) -> dict[str, int]:
        """How many steps of the run so far were sampled, and how many in vain."""
        counts = {'num_samples': 0, 'num_rejected': 0}
        if optax.tree.get(state.opt_state, 'num_samples') is not None:
            numbers = jax.device_get(vsam_jax.metrics(state.opt_state))
            counts = {name: int(numbers[name]) for name in counts}
        elif self.method.always_samples:
            counts['num_samples'] = int(state.step)
        return counts


def build(
    config: Any,
    dataset: Dataset | None = None,
    num_devices: int = 1,
    shared: bool = False,
) -> Experiment:
    """Makes the parts of an experiment.

    Args:
        config: a configuration, see :mod:`experiments.common.configuration`.
        dataset: the data set of ``config.data``, if it is loaded already.
        num_devices: how many devices are trained on, 0 for all; several processes
            train on all of theirs.
        shared: whether learning rate and ρ are numbers in the state instead of
            constants of the program, see :meth:`Experiment.with_config`.

    Returns:
        The experiment; nothing is compiled yet.

    Raises:
        ConfigError: for settings that cannot be meant.
    """
    configuration.check(config)
    devices = configuration.call(Devices.first, '--num_devices', {}, number=num_devices)
    augmentation = configuration.call(
        Augmentation, 'config.augmentation', config.augmentation
    )
    batches = configuration.call(
        Batches,
        'config',
        {},
        dataset=sources.load(config.data, devices) if dataset is None else dataset,
        augmentation=augmentation,
        batch_size=config.batch_size,
        devices=devices,
    )
    dataset = batches.dataset
    network = zoo.create(config.model, config.models[config.model], dataset.num_classes)
    model = configuration.call(
        quantization.quantize,
        'config.quantization',
        config.quantization,
        network=network,
        image_shape=dataset.image_shape,
    )
    task = Task(
        num_steps=config.epochs * batches.steps_per_epoch,
        steps_per_epoch=batches.steps_per_epoch,
        num_examples=dataset.train.size,
        num_classes=dataset.num_classes,
        last_tensors=functools.partial(zoo.last_tensors, model, dataset.image_shape),
    )
    if shared:
        method = registry.create_shared(config, task)
    else:
        settings = config.methods[config.method]
        method = registry.create(config.method, settings, config.optimizer, task)
    if config.batch_size % method.parts:
        raise configuration.ConfigError(
            f'config.batch_size must be a multiple of {method.parts}, since'
            f' config.methods.{config.method} has a share of 1/{method.parts}, got'
            f' {config.batch_size}.'
        )
    loss_fn = loss_of(model, config.label_smoothing)
    step = Step(method, loss_fn, devices, planned=config.dispatch == 'planned')
    return Experiment(config, batches, model, method, step)
