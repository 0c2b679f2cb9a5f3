"""What is wrong with a text that a person has written (study, settings, policy), in words that say what would be right.

pydantic's own name regular expressions and Python's types.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

WORDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "path_type": "a path",
    "string_type": "text (in quotes where it looks like a number)",
    "greater_than": "above {gt:.10g}",
    "greater_than_equal": "at least {ge:.10g}",
    "less_than": "below {lt:.10g}",
    "less_than_equal": "at most {le:.10g}",
}
"""What a value must be, by the type of pydantic's error."""


def faults(error: ValidationError, model: type[BaseModel], patterns: Mapping[str, str]) -> list[str]:
    """What is wrong with a person's text: `KEY: what it must be`; a rule between keys stands alone.

    Parameters
    ----------
    error : ValidationError
        What pydantic found.
    model : type
        What was to be made of the text; its fields' `examples` are shown.
    patterns : Mapping[str, str]
        What text of a pattern is, in words, for the patterns of the model.
    """
    found: dict[str, str] = {}
    for fault in error.errors():
        place, words = fault["loc"], _in_words(fault, model, patterns)
        if place[-1:] == ("[key]",):  # a key that is no text: the mapping is the wrong way round
            place, words = place[:-2], f"must be a mapping{_such_as(_field(model, place)[1])}"
        for tag in {"int", "list[int]"}.intersection(place[2:]):  # one fault for each half of `int | list[int]`
            place, words = place[: place.index(tag, 2)], "must be a whole number, or a list of whole numbers"
        place = tuple(part for part in place if "[" not in str(part))  # which half of a union was tried
        found.setdefault(".".join(map(str, place)), words)
    return [f"{place}: {words}" if place else words for place, words in found.items()]


def _in_words(fault: ErrorDetails, model: type[BaseModel], patterns: Mapping[str, str]) -> str:
    owner, field = _field(model, fault["loc"])
    context, given = fault.get("ctx", {}), f", not {_short(fault['input'])}"
    match fault["type"]:
        case "missing":
            return f"this key is needed{_such_as(field)}"
        case "extra_forbidden" | "invalid_key":
            near = difflib.get_close_matches(str(fault["loc"][-1]), owner.model_fields, 1)
            return "this key is not known" + (f"; did you mean {near[0]}?" if near else "")
        case "string_pattern_mismatch" if context["pattern"] in patterns:
            return f"{_short(fault['input'])} is not a {patterns[context['pattern']]}{_such_as(field)}"
        case "too_short":
            return f"has too few entries, needs {context['min_length']} or more{_such_as(field)}"
        case "literal_error":
            return f"must be {context['expected']}{given}"
        case "dict_type" | "model_type" | "list_type":
            return f"must be a {'list' if fault['type'] == 'list_type' else 'mapping'}{_such_as(field)}{given}"
        case kind if kind in WORDS:
            return f"must be {WORDS[kind].format(**context)}{given}"
    return re.sub("^Input should be ", "must be ", fault["msg"].removeprefix("Value error, "))


def _field(model: type[BaseModel], place: Sequence[int | str]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The model that the last key of a place is looked up in, and the field that it lies in, where one is known."""
    field = None
    for part in place:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model, field


def _such_as(field: FieldInfo | None) -> str:
    return f", such as {field.examples[0]}" if field is not None and field.examples else ""


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 50 else f"{text[:47]}..."
