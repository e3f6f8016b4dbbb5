"""What is said of a finished run, from its log and its last weights."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.ledger import Job
from experiments.studies.proof import rounding
from experiments.training.checkpoints import Checkpoints
from experiments.training.evaluation import evaluate, evaluate_splits
from experiments.training.experiment import Experiment

QUANTITIES = ('accuracy', 'loss', 'calibration_error')
SPLITS = ('validation', 'test')


def of_run(
    job: Job, experiment: Experiment, path: pathlib.Path, result: Mapping[str, Any]
) -> dict[str, Any]:
    """What the line of a run says besides what all lines say.

    Args:
        job: the run; one that settings are chosen with has nothing of it.
        experiment: its network and data.
        path: its workdir, with a checkpoint of the last step.
        result: the content of its ``result.json``.

    Returns:
        ``last`` and ``best``: the epoch, and accuracy, loss (the NLL of an example) and
        calibration error on the validation and test examples; the best epoch is that
        of the validation examples. ``fitted``: accuracy and loss on the examples that
        it was trained on, as they are and with the labels it was given. ``rounded``:
        the same of weights of 8 and 4 bits, by their number, where the network was
        trained in full precision.
    """
    if not job.tests:
        return {}
    evaluated = [entry for entry in result['log'] if 'validation_loss' in entry]
    found = {
        'last': at_epoch(evaluated[-1]),
        'best': at_epoch(best(evaluated, job.notes['judge'])),
    }
    config = experiment.config
    with Checkpoints(path, config) as checkpoints:
        state = checkpoints.restore(experiment.init(config.seed))
    variables = experiment.variables(state)
    data = experiment.batches.dataset
    own = data.with_label_noise(config.label_noise, config.seed)
    scores = evaluate_splits(experiment.model, variables, data, {'fit': own.train})
    found['fitted'] = {name: scores[f'fit_{name}'] for name in QUANTITIES[:2]}
    if not config.quantization.bits:
        found['rounded'] = {
            str(bits): _with_bits(experiment, variables, bits) for bits in rounding.BITS
        }
    return found


def _with_bits(experiment: Experiment, variables: Any, bits: int) -> dict[str, Any]:
    params = rounding.rounded(variables['params'], bits=bits)
    variables = {**variables, 'params': params}
    return _by_split(evaluate(experiment.model, variables, experiment.batches.dataset))


def best(evaluated: Sequence[Mapping[str, Any]], judge: str) -> Mapping[str, Any]:
    """The entry of the log that is best on validation examples, the first of equals.

    Args:
        evaluated: entries of a log.
        judge: ``'accuracy'``, or ``'loss'``, of which less is better. What is not
            finite (None) is worst.
    """
    sign = -1 if judge == 'loss' else 1

    def worth(entry: Mapping[str, Any]) -> float:
        value = entry[f'validation_{judge}']
        return -float('inf') if value is None else sign * value

    return max(evaluated, key=worth)


def at_epoch(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of a log says of the examples held back."""
    return {'epoch': entry['epoch'], **_by_split(entry)}


def _by_split(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {s: {q: entry[f'{s}_{q}'] for q in QUANTITIES} for s in SPLITS}
