r"""Trains one network with one method and one seed.

Use it so, ``--config.x=1`` overrides a field of the configuration:

    python -m experiments.train --config=experiments/configs/digits.py \
        --config.method=vsam --workdir=runs/vsam

It trains on all devices that jax finds, or on ``--num_devices`` of them; the batch
size must be a multiple of their number. On several hosts start it on each, with
``--distributed`` and a workdir that all of them see: on TPU pods and under Slurm,
Open MPI or Kubernetes jax finds out who takes part; elsewhere say so, with another
``--process_id`` on each host, 0 on the one that is named:

    --coordinator=HOST:PORT --num_processes=2 --process_id=0

The run is the same, to rounding, on any number of devices.
"""

import pathlib

from absl import flags

from experiments.common import processes, program
from experiments.training import run_files
from experiments.training.loop import train


def main() -> None:
    """Runs what the flags say."""
    options = flags.FLAGS
    cluster = (options.coordinator, options.num_processes, options.process_id)
    if options.distributed or any(value is not None for value in cluster):
        processes.start(*cluster)
    result = train(options.config, options.workdir, num_devices=options.num_devices)
    if not processes.is_first():
        return
    print(
        f'{result["name"]} {result["method"]} seed {result["seed"]}:'
        f' test accuracy {result["test_accuracy"]:.2%} after {result["steps"]} steps'
        f' (best on {result["best"]["on"]}: {result["best"]["test_accuracy"]:.2%}),'
        f' {result["step_seconds"] * 1e3:.2f} ms per step,'
        f' {result["images_per_second"]:,.0f} images/s,'
        f' sampling rate {result["sampling_rate"]:.2f}'
    )
    print(f'written to {pathlib.Path(options.workdir) / run_files.RESULT}')


def define_flags() -> None:
    """Which devices and processes take part."""
    flags.DEFINE_integer('num_devices', 0, 'How many devices are used; 0 for all.')
    flags.DEFINE_bool('distributed', False, 'Join the other processes of the run.')
    unknown = ', where jax does not know the cluster.'
    flags.DEFINE_string('coordinator', None, f'HOST:PORT of process 0{unknown}')
    flags.DEFINE_integer('num_processes', None, f'How many there are{unknown}')
    flags.DEFINE_integer('process_id', None, f'Which one this is, from 0 on{unknown}')


if __name__ == '__main__':
    program.run(main, define_flags, configured=True)
