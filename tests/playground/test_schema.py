"""Requests made up from /openapi.json, right and wrong ones: each answer is one that it names."""

import pytest
from hypothesis import HealthCheck, given, settings

from lora_gpt2.playground.server import application

HOST = {"Host": "localhost"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [("/about", "GET", "POSITIVE"), ("/decode", "POST", "POSITIVE"), ("/decode", "POST", "NEGATIVE")],
)
def test_every_answer_is_one_that_is_described(playground, path, method, mode):
    schemathesis = pytest.importorskip("schemathesis", reason='pip install "lora-gpt2[fuzz]"')
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    described = schemathesis.openapi.from_asgi("/openapi.json", application(playground), headers=HOST)
    asked = described[path][method].as_strategy(generation_mode=schemathesis.GenerationMode[mode])

    @settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(asked)
    def check(case):
        # What is too long for the model is refused, which a schema cannot say.
        case.call_and_validate(headers=HOST, excluded_checks=[positive_data_acceptance])

    check()
