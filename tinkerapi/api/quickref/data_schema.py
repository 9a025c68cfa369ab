"""OpenAPI schemas of the data that ``parse`` accepts."""

from __future__ import annotations

from tinkerapi.api.fields.content import CONTENT_SCHEMA
from tinkerapi.api.fields.field import Schema
from tinkerapi.api.fields.tokens import MAX_TOKEN_ID
from tinkerapi.api.quickref.parse import ROLES

MESSAGE_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": CONTENT_SCHEMA,
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
CONVERSATION_SCHEMA: Schema = {"type": "array", "items": MESSAGE_SCHEMA, "minItems": 1}
TOKENS_SCHEMA: Schema = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
    "minItems": 1,
}
DATUM_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "model_input": TOKENS_SCHEMA,
        "loss_fn_inputs": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"type": "number"}, "minItems": 1},
            "minProperties": 1,
        },
    },
    "required": ["model_input", "loss_fn_inputs"],
    "additionalProperties": False,
}
CONVERSATION_OBJECT_SCHEMA: Schema = {
    "type": "object",
    "properties": {"messages": CONVERSATION_SCHEMA},
    "required": ["messages"],
    "additionalProperties": False,
}
DATA_SCHEMA: Schema = {
    "type": "array",
    "items": {"anyOf": [CONVERSATION_SCHEMA, CONVERSATION_OBJECT_SCHEMA, DATUM_SCHEMA]},
    "minItems": 1,
}
PROMPT_SCHEMA: Schema = {
    "anyOf": [{"type": "string", "minLength": 1}, TOKENS_SCHEMA, CONVERSATION_SCHEMA]
}
