"""Every test gets a cache folder of its own, and one thread: the machines that run them have two cores.

What several files of tests build upon is made here: an untrained model, a few emoji, a service on a free port.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from twofold.data.samples import openmoji
from twofold.data.sources import Source
from twofold.models.bundle import Bundle, Tower


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def untrained() -> Bundle:
    """Pictures and words in one space, at random: what is near what means nothing, but it is always the same."""
    from twofold.models.encoders import image_encoder, text_encoder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = image_encoder("timm:resnet18/4", size=32, small_stem=True)
        text = Tower(text_encoder("minilm"), nn.Sequential(nn.Linear(384, image.dim)))
    return Bundle({"image": image, "text": text}, {"data": "openmoji"})


@pytest.fixture(scope="session")
def emoji() -> Source:
    """149 emoji with names and tags."""
    return openmoji().take(range(0, 4450, 30))


@pytest.fixture(scope="session")
def serving() -> Callable[[Path], AbstractContextManager[str]]:
    """Serves an index in a thread; the address of it."""

    @contextmanager
    def at(index: Path) -> Iterator[str]:
        import uvicorn

        from twofold.serve.app import app

        server = uvicorn.Server(uvicorn.Config(app(index), port=0, log_config=None))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join(10)

    return at
