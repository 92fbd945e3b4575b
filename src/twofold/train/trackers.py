"""A run's figures, sent to where a team keeps those of all its runs: TensorBoard, Weights & Biases or MLflow.

What is sent is what the log says, line by line. Each library is an extra of its own, and imported when it is asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twofold.errors import UsageError, unknown
from twofold.progress import TERMINAL

Tell = Callable[[Mapping[str, Any]], None]
KINDS = ("tensorboard", "wandb", "mlflow")


@contextmanager
def tracked(where: str | None, name: str, config: Mapping[str, Any]) -> Iterator[Tell]:
    """Gives what a line of the log is told to; `where` is tensorboard:DIR, wandb:PROJECT or mlflow:URI, or None.

    The run is called `name`, and `config` says how it was asked for. A run that is resumed goes on under its name
    (TensorBoard drops what a killed run had written beyond the checkpoint; W&B and MLflow start a further run). A place
    that cannot be opened raises UsageError; one that fails later is told nothing more, and the training goes on.
    """
    if where is None:
        yield lambda line: None
        return
    kind, _, place = where.partition(":")
    if kind not in KINDS:
        raise unknown("tracker", kind, KINDS)
    if not place:
        raise UsageError(f"--log-to takes {kind}:PLACE, such as tensorboard:runs/board, wandb:PROJECT or mlflow:URI.")
    opened = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[kind]
    try:
        tell, close = opened(place, name, config)
    except ImportError as error:
        raise UsageError(f"{where} takes the package {kind}: pip install 'twofold[{kind}]'.") from error
    except Exception as error:  # each library has errors of its own
        raise UsageError(f"{where} could not be opened: {_first_line(error)}") from error
    lost = False

    def told(line: Mapping[str, Any]) -> None:
        nonlocal lost
        if lost:
            return
        try:
            tell(line)
        except Exception as error:
            lost = True
            said = f"  {where} is told nothing more (from step {line['step']} on): {_first_line(error)}"
            TERMINAL.print(said, highlight=False, markup=False)

    try:
        yield told
    finally:
        with suppress(Exception):
            close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, without its step."""
    return {key: float(value) for key, value in line.items() if key != "step" and isinstance(value, int | float)}


def _tensorboard(place: str, name: str, config: Mapping[str, Any]) -> tuple[Tell, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer: list[Any] = []

    def tell(line: Mapping[str, Any]) -> None:
        if not writer:  # what lies beyond this step was written by a run that was killed
            writer.append(SummaryWriter(str(Path(place) / name), purge_step=line["step"]))
            writer[0].add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))
        for key, value in figures(line).items():
            writer[0].add_scalar(key, value, line["step"])

    def close() -> None:
        for each in writer:
            each.close()

    return tell, close


def _wandb(place: str, name: str, config: Mapping[str, Any]) -> tuple[Tell, Callable[[], None]]:
    import wandb

    run = wandb.init(project=place, name=name, config=dict(config))
    return lambda line: run.log(figures(line), step=line["step"]), run.finish


def _mlflow(place: str, name: str, config: Mapping[str, Any]) -> tuple[Tell, Callable[[], None]]:
    from mlflow import MlflowClient

    client = MlflowClient(place)
    found = client.get_experiment_by_name("twofold")
    run = client.create_run(found.experiment_id if found else client.create_experiment("twofold"), run_name=name).info
    for key, value in config.items():
        client.log_param(run.run_id, key, str(value)[:6000])

    def tell(line: Mapping[str, Any]) -> None:
        for key, value in figures(line).items():
            client.log_metric(run.run_id, key, value, step=line["step"])

    return tell, lambda: client.set_terminated(run.run_id)
