"""How a program starts and ends: its flags, and errors that are messages."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.common.configuration import ConfigError

INTERRUPTED = (
    'Interrupted. The same command goes on: finished runs are not made again, and one'
    ' that is not goes on from its last checkpoint (from its start where'
    ' config.checkpoint_every is 0).'
)


def run(
    main: Callable[[], None],
    *define_flags: Callable[[], Any],
    configured: bool = False,
) -> None:
    """Runs a program; wrong settings end it with a message, not with a traceback.

    Args:
        main: the program, called when the flags are known.
        *define_flags: define the flags. They are called here, as two programs may be
            imported by one test.
        configured: whether there are ``--config`` and ``--workdir``.
    """
    if configured:
        config_flags.DEFINE_config_file(
            'config', None, 'The configuration file; --config.x=1 overrides a field.'
        )
        flags.DEFINE_string('workdir', None, 'Where logs and results are written.')
        flags.mark_flags_as_required(['config', 'workdir'])
    for define in define_flags:
        define()
    # --help shows those of the program alone; they may be defined elsewhere.
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith('experiments.'):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(functools.partial(_guarded, main), flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    """What is left of the command line; wrong flags end the program."""
    try:
        rest = flags.FLAGS(arguments)
        if 'config' in flags.FLAGS:
            # A file that is not there is an error once something of it is read.
            _ = 'name' in flags.FLAGS.config
        return rest
    except (AttributeError, KeyError) as error:
        # How ml_collections says that there is no such field, one error in another.
        cause: Any = error
        while isinstance(cause, Exception) and cause.args:
            cause = cause.args[0]
        sys.exit(f'--config has no such field: {cause}')
    except OSError as error:
        sys.exit(f'--config must name a configuration file: {_last_line(error)}')
    except flags.Error as error:
        # Where a configuration refuses its argument all of its traceback is there.
        message = _last_line(error) if 'Traceback' in str(error) else str(error)
        sys.exit(f'{message}\n--help lists the flags.')


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _guarded(main: Callable[[], None], arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        sys.exit(f'unknown arguments: {" ".join(arguments[1:])}')
    # jax tells at this level which devices it did not find.
    logging.set_verbosity(logging.WARNING)
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(f'\n{INTERRUPTED}', file=sys.stderr)
        sys.exit(130)
