"""One row of a prompt set: its fields, and the checks it must pass before anything runs.

Fields: {clean, corrupt?, answer, wrong_answer, roles?, id?, group?, fact?}; a field that is None counts as
absent and unknown fields are ignored. Every error names the row (in a JSONL file: the line).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mediation.errors import MediationError

Message = dict[str, str]
Text = str | list[Message]
Span = str | tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """One row. `clean` and `corrupt` are text, or chat messages that the model's template renders.

    `roles` names parts of the rendered clean prompt: a character span (start, end), or a substring that
    occurs once. `group` says which question this is, `fact` which fact is expected (used in evaluation only),
    `row` is the line it stands on.
    """

    id: str
    row: int
    clean: Text
    answer: str
    wrong_answer: str
    corrupt: Text | None = None
    roles: Mapping[str, Span] = field(default_factory=dict)
    group: str = "all"
    fact: str | None = None


def parse_line(line: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MediationError(f"Row {number} is not valid JSON ({error}); write one object a line.") from error
    return parse_row(row, number)


def parse_row(row: Any, number: int) -> Prompt:
    """A checked Prompt. MediationError names the row and the field at fault."""
    if not isinstance(row, Mapping):
        raise MediationError(f"Row {number} is not an object; write {{clean, answer, wrong_answer, ...}}.")
    fields = {name: value for name, value in row.items() if value is not None}
    for name in ("clean", "answer", "wrong_answer"):
        if name not in fields:
            raise MediationError(f"Row {number} has no {name!r}; add it.")
    for name in ("answer", "wrong_answer", "fact"):
        if name in fields:
            _check_string(fields[name], name, number)
    for name in ("clean", "corrupt"):
        if name in fields:
            _check_text(fields[name], name, number)
    for name in ("id", "group"):
        if name in fields and (not isinstance(fields[name], str | int) or isinstance(fields[name], bool)):
            raise MediationError(f"Row {number}: {name!r} must be a string; it is {fields[name]!r}.")
    if fields["answer"] == fields["wrong_answer"]:
        raise MediationError(f"Row {number}: answer and wrong_answer are both {fields['answer']!r}; change one.")
    prompt = Prompt(
        id=str(fields.get("id", f"row-{number}")),
        row=number,
        clean=fields["clean"],
        answer=fields["answer"],
        wrong_answer=fields["wrong_answer"],
        corrupt=fields.get("corrupt"),
        roles=_parse_roles(fields.get("roles", {}), number),
        group=str(fields.get("group", "all")),
        fact=fields.get("fact"),
    )
    if isinstance(prompt.clean, str):  # messages wait until the model's template has rendered them
        role_spans(prompt, prompt.clean)
    return prompt


def _check_string(value: Any, name: str, number: int) -> None:
    if not isinstance(value, str) or not value:
        raise MediationError(f"Row {number}: {name!r} must be a non-empty string; it is {value!r}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MediationError(f"Row {number}: {name!r} holds half a surrogate pair; mend the text.") from error


def _check_text(value: Any, name: str, number: int) -> None:
    if not isinstance(value, list):
        return _check_string(value, name, number)
    if not value:
        raise MediationError(f"Row {number}: {name!r} has no messages; write [{{role, content}}, ...].")
    for message in value:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise MediationError(f"Row {number}: {name!r} needs messages {{role, content}}; one is {message!r}.")
        _check_string(message["role"], f"{name}.role", number)
        _check_string(message["content"], f"{name}.content", number)


def _parse_roles(roles: Any, number: int) -> dict[str, Span]:
    if not isinstance(roles, Mapping):
        raise MediationError(f"Row {number}: 'roles' must be {{name: [start, end]}}; it is {roles!r}.")
    spans: dict[str, Span] = {}
    for name, span in roles.items():
        if span is None:  # a dataset fills the names a row lacks with None
            continue
        if isinstance(span, str) and span:
            spans[name] = span
        elif isinstance(span, list | tuple) and len(span) == 2 and all(type(edge) is int for edge in span):
            spans[name] = (span[0], span[1])
        else:
            raise MediationError(f"Row {number}: role {name!r} must be [start, end] or a substring; it is {span!r}.")
    return spans


def role_spans(prompt: Prompt, text: str) -> dict[str, tuple[int, int]]:
    """Character span (start, end) of each role in `text`, the rendered clean prompt."""
    spans = {}
    for name, span in prompt.roles.items():
        if isinstance(span, str):
            if text.count(span) != 1:
                raise MediationError(
                    f"Row {prompt.row}: role {name!r} must occur once in the clean prompt; {span!r} occurs "
                    f"{text.count(span)} times."
                )
            start = text.index(span)
            span = (start, start + len(span))
        if not 0 <= span[0] < span[1] <= len(text):
            raise MediationError(
                f"Row {prompt.row}: role {name!r} spans {list(span)}; it must lie inside the clean prompt of "
                f"{len(text)} characters."
            )
        spans[name] = span
    return spans
