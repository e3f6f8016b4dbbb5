"""What tests that start other processes share."""

import pathlib
import socket

# Where the modules of the project are found.
ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])
