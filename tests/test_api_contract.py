"""Whatever the OpenAPI document allows, or nearly allows, is answered as it says, and never with a 5xx."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from twofold.data.sources import open_source
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder
from twofold.retrieve.index import Index
from twofold.serve.app import app

schemathesis = pytest.importorskip("schemathesis")
STEADY = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    home: Path = tmp_path_factory.mktemp("contract")
    (home / "photos").mkdir()
    for n in range(6):
        squares = np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(squares).resize((64, 64), Image.Resampling.NEAREST).save(home / "photos" / f"{n}.png")
    torch.manual_seed(0)
    bundle = Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)})
    Index.build(open_source(home / "photos"), bundle, home / "index")
    return schemathesis.openapi.from_asgi("/openapi.json", app(home / "index", hosts=["*"]))


def conforms(operation) -> None:
    @STEADY
    @given(operation.as_strategy())
    def answered_as_documented(case):
        response = case.call()
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        documented = operation.definition.raw["responses"]
        assert str(response.status_code) in documented, (case.as_curl_command(), response.status_code)
        if operation.path != "/api/v1/facts":  # the validator does not read the pairs (prefixItems) in its columns
            operation.validate_response(response)

    answered_as_documented()


@pytest.mark.filterwarnings("ignore")
def test_every_operation_keeps_to_its_document(schema):
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 7

    for operation in operations:
        conforms(operation)
