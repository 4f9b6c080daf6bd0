"""How OpenAI's bodies ask for a form of the text: `response_format`, and vLLM's `guided_…` fields."""

import json
from typing import Any

from llama.errors import ParameterError

_GUIDED = {"guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choices",
           "guided_grammar": "grammar"}  # fmt: skip
_EXPECTED = (
    'expected {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": {…}}}'
)


def form_of(body: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields of the form that a body asks for, whose own fields are taken out of it.

    Raises ParameterError for a `response_format` that is none.
    """
    fields = {ours: body.pop(theirs) for theirs, ours in _GUIDED.items() if theirs in body}
    if isinstance(schema := fields.get("json_schema"), str):
        fields["json_schema"] = parse_object(schema, "guided_json")
    if "response_format" in body:
        schema = _schema(body.pop("response_format"))
        if schema is not None and fields:
            raise ParameterError("body has both response_format and a guided_ field: give one of them")
        fields |= {} if schema is None else {"json_schema": schema}
    return fields


def parse_object(text: str, name: str) -> dict[str, Any]:
    """The JSON object of a text. Raises ParameterError, which calls it `name`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{name} is not JSON ({error}): expected a JSON schema, which is an object") from None
    if not isinstance(value, dict):
        raise ParameterError(f"{name} is a JSON {type(value).__name__}: expected a JSON schema, which is an object")
    return value


def _schema(asked: Any) -> dict[str, Any] | None:
    """The JSON schema of a `response_format`; None where any text will do."""
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = asked.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise ParameterError(f"response_format is {asked!r:.60}: {_EXPECTED}")
    return schema
