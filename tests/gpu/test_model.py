"""The 21B model at full width through our kernels, beside XLA, on a GPU: decoding, prefill, long contexts."""

import dataclasses

import jax
import pytest

from ernie_jax.config import QUANTIZED_FORMS, ModelConfig
from ernie_jax.sharding import single
from tests.kernels.whole_model import Case, check, compare, models

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

CONFIG = dataclasses.replace(
    ModelConfig.from_file("configs/ernie-4.5-21b-a3b.json"), num_hidden_layers=3, num_nextn_predict_layers=0
)
CASES = [
    Case(((200, 1),)),
    Case(((131000, 1),)),
    Case(tuple((37 * i + 5, 1) for i in range(8))),
    Case(tuple((31 * i, 1) for i in range(17))),
    Case(tuple((97 * i + 3, 1) for i in range(64))),
    Case((*((7 * i, 1) for i in range(255)), (6000, 1))),
    Case(((0, 2048),)),
    Case(((128000, 1024),)),
    Case(((0, 300), (77, 1), (640, 513), (1000, 129))),
]


@pytest.fixture(scope="module")
def pair():
    return models(CONFIG, single())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_is_as_near_to_float32_as_xlas(case, pair, rng):
    print(check(compare(CONFIG, case, rng, pair)))


@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_quantised_weights(form, rng):
    config = dataclasses.replace(CONFIG, quantize=form)
    pair = models(config, single())
    # A prompt in fp8 is less exact than XLA's, whose tokens stay bfloat16.
    for case in (CASES[0], CASES[2], CASES[4], *CASES[6:7] * (form != "fp8")):
        print(check(compare(config, case, rng, pair)))
