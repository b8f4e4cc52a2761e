"""The processes: one socket, one or more workers over it (uvicorn), stopped by SIGTERM once they have answered."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from serving.metrics import SHARED_FOLDER

IDLE_CONNECTION_S = 75


def serve(application: Callable[[], Any], *, host: str, port: int, workers: int, drain_s: float) -> None:
    """Serve until SIGTERM or SIGINT; requests under way have `drain_s` seconds more.

    `application` makes the ASGI application inside each worker: with several it has to be picklable. A worker that
    dies is replaced.
    """
    config = uvicorn.Config(
        application,
        factory=True,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=round(drain_s) + 1,
    )
    sockets = [config.bind_socket()]
    if workers == 1:
        # uvicorn raises the signal once more when all is answered; to be stopped is this process' regular end.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        uvicorn.Server(config).run(sockets)
        return
    with TemporaryDirectory() as folder:
        os.environ[SHARED_FOLDER] = folder  # before a worker imports prometheus_client
        supervisor = Multiprocess(config, sockets)
        supervisor.run()
        # Then uvicorn stops the others too, and would have it look like a regular end.
        if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
            sys.exit(STARTUP_FAILURE)
