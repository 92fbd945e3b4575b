"""Tasks on a Ray cluster: one CPU each, or one GPU where there are any, begun again where a machine is lost."""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from twofold.errors import TwofoldError, UsageError

Key = TypeVar("Key", bound=Hashable)

TRIES = 3  # again, of a task whose process or machine was lost
PATIENCE = 60  # seconds for tasks that are called off to write what they have


def on_ray(
    function: Callable[..., Any],
    calls: Mapping[Key, tuple[Any, ...]],
    *,
    shared: tuple[Any, ...] = (),
    address: str = "local",
) -> Iterator[tuple[Key, Any]]:
    """Yields the key of a call and `function(*shared, *call)`, as each ends, in whatever order.

    `address` is "local" (this machine's cores), "auto" (the cluster that this machine is in) or "ray://host:10001".
    `shared` goes to each machine once. In place of a result comes the TwofoldError that a task raised, or one that says
    that its worker was lost `TRIES` times and once more; other errors are raised. Where iteration ends early, by Ctrl-C
    or an error, tasks that run are interrupted as by Ctrl-C and have `PATIENCE` seconds to end. Raises UsageError
    without Ray, or without a cluster at `address`.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed: pip install 'twofold[ray]'.") from error
    with _connected(ray, address):
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(function).options(num_cpus=1, num_gpus=gpus, max_retries=TRIES)
        held = [ray.put(each) for each in shared]
        running = {task.remote(*held, *call): key for key, call in calls.items()}
        try:
            while running:
                for ended in ray.wait(list(running))[0]:
                    yield running.pop(ended), _outcome(ray, ended)
        finally:
            for left in running:
                ray.cancel(left)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=PATIENCE)


def _outcome(ray: Any, ended: Any) -> Any:
    try:
        return ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TwofoldError):
            return error.cause
        raise error.cause from error
    except ray.exceptions.RayError as error:
        return TwofoldError(f"The worker was lost, {TRIES + 1} times ({str(error).strip().splitlines()[0]}).")


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection to the cluster, if there is none yet; one that was made here ends here."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"No Ray cluster answers at {address!r} ({error}). `ray start --head` starts one.") from error
    try:
        yield
    finally:
        ray.shutdown()
