"""Several processes for a test, forked from one that has imported torch: it takes longer than most tests do."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["twofold.train.loop", "twofold.models.encoders", "timm"])


def start(function: Callable, *arguments: Any) -> BaseProcess:
    """`function(*arguments)` in a process of its own; both must be importable from where the tests are."""
    process = FORKS.Process(target=_alone, args=(function, arguments))
    process.start()
    return process


def _alone(function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def together(function: Callable, folder: Path, *arguments: Any, world: int = 2) -> None:
    """`function(folder, *arguments)` in `world` processes that are connected by gloo; fails where one of them does."""
    folder.mkdir(exist_ok=True)
    processes = [start(_connected, function, rank, world, folder, arguments) for rank in range(world)]
    for process in processes:
        process.join(120)
    exits = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exits == [0] * world, exits


def _connected(function: Callable, rank: int, world: int, folder: Path, arguments: tuple) -> None:
    # Lightning Fabric reads from LOCAL_RANK that somebody else has started the processes already.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    function(folder, *arguments)
    torch.distributed.destroy_process_group()
