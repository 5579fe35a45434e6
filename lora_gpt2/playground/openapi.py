"""What the server takes and answers, said to programs as OpenAPI 3.1."""

from importlib.metadata import version
from typing import Any

from lora_gpt2.playground.models import Playground

_REFUSALS = {
    400: "No JSON",
    403: "A page of another site asks",
    408: "Sent too slowly",
    413: "Too long",
    415: "Not said to be JSON",
    422: "Something in it is wrong",
    503: "Others are waiting already, or it took too long",
}


def described(playground: Playground) -> dict[str, Any]:
    """Both requests, with the answers to each."""
    offered = playground.about()
    numbers = {
        name: {
            "type": "integer" if one["step"] == 1 else "number",
            "minimum": one["min"],
            "maximum": one["max"],
        }
        for name, one in offered["decoding"].items()
    }
    asked = {
        "type": "object",
        "required": ["input", "adapter"],
        "properties": {
            "input": {"type": "string", "minLength": 1},
            "adapter": {"enum": offered["adapters"]},
            "decoding": {"type": "object", "properties": numbers, "additionalProperties": False},
        },
        "additionalProperties": False,
    }
    answers = {"200": ("Outputs, best first", ["outputs", "tree", "seconds"])}
    answers |= {str(status): (why, ["error"]) for status, why in _REFUSALS.items()}
    about = {"200": ("What can be asked", list(offered))}
    decode = {"requestBody": {"required": True, **_json(asked)}, "responses": _responses(answers)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lora-gpt2", "version": version("lora-gpt2")},
        "paths": {"/about": {"get": {"responses": _responses(about)}}, "/decode": {"post": decode}},
    }


def _responses(told: dict[str, tuple[str, list[str]]]) -> dict[str, Any]:
    return {
        status: {"description": what, **_json({"type": "object", "required": keys})}
        for status, (what, keys) in told.items()
    }


def _json(described: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": described}}}
