"""Prompt sets: what the user writes down, and the token sequences the model runs.

1. Read rows `{clean, corrupt?, answer, wrong_answer, roles?, id?, group?, fact?}` from JSONL, dicts or a
   Hugging Face dataset (`mediation.rows` checks each before anything runs).
2. Split into discovery and evaluation prompts that share no id and no clean text. The two have types of their
   own, so that a function which must not see discovery prompts can say so.
3. `tokenize`: answers are tokens of prompt + answer minus tokens of the prompt. One-token answers give one
   example with two targets at the last position; otherwise one example for each answer, prompt + answer[:-1],
   with a target for every answer token. A prompt's behaviour is the sum over its examples (see
   `mediation.behaviours`).
4. `batches`: sort by length, pad on the right.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor

from mediation.behaviours import Behaviour
from mediation.errors import MediationError
from mediation.rows import Prompt, Text, parse_line, parse_row, role_spans

if TYPE_CHECKING:
    from mediation.subject import SubjectModel


class Baseline(StrEnum):
    """What a latent is set to when it is taken away."""

    CORRUPT = "corrupt"
    """Its value at the same position of the corrupt prompt: keeps everything the pair shares. The default."""
    ZERO = "zero"
    """Zero: the latent is off. Needs no corrupt prompt; can leave the model far from anything it has seen."""
    MEAN = "mean"
    """Its mean over the prompt set: removes what varies over the set, keeps what is always there."""


class Half(StrEnum):
    """Which half of a set a prompt is in."""

    DISCOVERY = "discovery"
    """Latents, facts and thresholds are chosen on these prompts."""
    EVALUATION = "evaluation"
    """What is said of the chosen is measured on these."""


class PromptSet(Sequence[Prompt]):
    """A non-empty sequence of prompts with distinct ids."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self.prompts = tuple(prompts)
        if not self.prompts:
            raise MediationError("The prompt set is empty; give at least one row.")
        first: dict[str, int] = {}
        for prompt in self.prompts:
            if prompt.id in first:
                raise MediationError(
                    f"Rows {first[prompt.id]} and {prompt.row} both have the id {prompt.id!r}; change one."
                )
            first[prompt.id] = prompt.row

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Self:
        """Read one JSON object a line (UTF-8; blank lines are skipped). Row numbers are line numbers."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise MediationError(f"{path} is not UTF-8 text; save it as UTF-8 JSONL.") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise MediationError(f"Cannot read the prompts in {path}: {reason}.") from error
        return cls(parse_line(line, number) for number, line in enumerate(lines, 1) if line.strip())

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Rows as dicts with the JSONL fields; row numbers count from 1."""
        return cls(parse_row(row, number) for number, row in enumerate(rows, 1))

    @classmethod
    def from_dataset(cls, dataset: Iterable[Mapping[str, Any]], limit: int | None = None) -> Self:
        """The first `limit` rows of a Hugging Face dataset whose columns are the JSONL fields."""
        return cls.from_rows(islice(dataset, limit))

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Prompt | Self:
        return type(self)(self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} prompts)"

    @property
    def groups(self) -> list[str]:
        """The distinct groups, in order of first appearance."""
        return list(dict.fromkeys(prompt.group for prompt in self.prompts))

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the prompts in their order, row numbers left out."""
        rows = [asdict(replace(prompt, row=0)) for prompt in self.prompts]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def split(self, discovery_fraction: float = 0.5, seed: int = 0) -> tuple[DiscoverySet, EvaluationSet]:
        """Disjoint discovery and evaluation sets, each with its share of every group, rows in their order.

        Prompts with the same clean text stay together, so that no text is on both sides under two ids. Which
        side an id is on depends on the prompts and the seed, not on the order of the rows. MediationError
        when there are fewer than two different texts or the fraction is not between 0 and 1.
        """
        if not 0 < discovery_fraction < 1:
            raise MediationError(f"The discovery fraction is {discovery_fraction}; give one between 0 and 1.")
        by_text: dict[str, list[Prompt]] = {}
        for prompt in sorted(self.prompts, key=lambda p: p.id):
            by_text.setdefault(json.dumps(prompt.clean, sort_keys=True), []).append(prompt)
        if len(by_text) < 2:
            raise MediationError("A single clean text cannot be split into two sets; give two or more.")
        texts = list(by_text.values())
        random.Random(seed).shuffle(texts)
        texts.sort(key=lambda same: same[0].group)
        wanted = min(max(round(discovery_fraction * len(texts)), 1), len(texts) - 1)
        # Systematic sampling along the list sorted by group: exact in total, within one text in every group.
        chosen = {
            prompt.id
            for k, same in enumerate(texts)
            if (k + 1) * wanted // len(texts) > k * wanted // len(texts)
            for prompt in same
        }
        return (
            DiscoverySet(prompt for prompt in self.prompts if prompt.id in chosen),
            EvaluationSet(prompt for prompt in self.prompts if prompt.id not in chosen),
        )

    def halves(self, seed: int = 0) -> dict[str, Half | None]:
        """By prompt id, the side of `split` it is on; None for all where a single clean text cannot be split."""
        if len({json.dumps(prompt.clean, sort_keys=True) for prompt in self.prompts}) < 2:
            return dict.fromkeys((prompt.id for prompt in self.prompts), None)
        sides = zip(Half, self.split(seed=seed), strict=True)
        return {prompt.id: half for half, side in sides for prompt in side}


class DiscoverySet(PromptSet):
    """Prompts on which latents, facts and thresholds may be chosen."""


class EvaluationSet(PromptSet):
    """Prompts kept aside: claims are tested on these and nothing is chosen on them."""


@dataclass(frozen=True)
class Example:
    """One token sequence to run: `clean` and (same length) `corrupt` ids, and what is read from it.

    targets: (position, token, sign); the logits at `position` predict `token`. roles: one label per token, ""
    where none. `prompt` indexes the prompt set; a prompt's behaviour is the sum over its examples.
    """

    prompt: int
    clean: list[int]
    corrupt: list[int] | None
    targets: list[tuple[int, int, int]]
    roles: list[str]

    def __len__(self) -> int:
        return len(self.clean)


def tokenize(
    prompts: Sequence[Prompt],
    model: SubjectModel,
    *,
    baseline: Baseline = Baseline.CORRUPT,
    behaviour: Behaviour = Behaviour.LOGIT_DIFF,
) -> list[Example]:
    """Examples of the prompts in order. Corrupt prompts are used under `Baseline.CORRUPT` only.

    MediationError, by row: no corrupt prompt, a pair of unequal token length (with both tokenisations), an
    answer of no tokens or one that merges with the end of the prompt, and a role that is not in the prompt.
    """
    return [
        example
        for index, prompt in enumerate(prompts)
        for example in _examples(prompt, index, model, baseline, behaviour)
    ]


def _examples(
    prompt: Prompt, index: int, model: SubjectModel, baseline: Baseline, behaviour: Behaviour
) -> list[Example]:
    texts = [_render(prompt, prompt.clean, model)]
    if baseline is Baseline.CORRUPT:
        if prompt.corrupt is None:
            raise MediationError(f"Row {prompt.row} has no corrupt prompt; add one or use --baseline zero or mean.")
        texts.append(_render(prompt, prompt.corrupt, model))
    ids = [model.encode(text) for text in texts]
    if not ids[0]:
        raise MediationError(f"Row {prompt.row}: the clean prompt has no tokens; give text the tokenizer keeps.")
    if len(ids[0]) != len(ids[-1]):
        clean, corrupt = ([model.tokenizer.decode([token]) for token in side] for side in ids)
        raise MediationError(
            f"Row {prompt.row}: the clean prompt has {len(clean)} tokens {clean} and the corrupt one "
            f"{len(corrupt)} tokens {corrupt}; make them equal in length or use --baseline zero or mean."
        )
    right = _continuation(prompt, "answer", texts, ids, model)
    wrong = _continuation(prompt, "wrong_answer", texts, ids, model)
    if right == wrong:
        raise MediationError(f"Row {prompt.row}: answer and wrong_answer are the same tokens; change one.")
    roles = _token_roles(prompt, texts[0], model)

    def example(given: list[int], targets: list[tuple[int, int, int]]) -> Example:
        clean, corrupt = ids[0] + given, ids[1] + given if len(ids) == 2 else None
        return Example(index, clean, corrupt, targets, roles + [""] * len(given))

    last = len(ids[0]) - 1

    def sequence(answer: list[int], sign: int) -> Example:
        return example(answer[:-1], [(last + k, token, sign) for k, token in enumerate(answer)])

    if behaviour is Behaviour.LOGPROB:
        return [sequence(right, 1)]
    if len(right) == len(wrong) == 1:
        return [example([], [(last, right[0], 1), (last, wrong[0], -1)])]
    return [sequence(right, 1), sequence(wrong, -1)]


def _render(prompt: Prompt, text: Text, model: SubjectModel) -> str:
    try:
        return text if isinstance(text, str) else model.chat(text)
    except MediationError as error:
        raise MediationError(f"Row {prompt.row}: {error}") from error


def _continuation(prompt: Prompt, name: str, texts: list[str], ids: list[list[int]], model: SubjectModel) -> list[int]:
    """Tokens of the answer after the clean prompt; after the corrupt one they must be the same."""
    answer = prompt.answer if name == "answer" else prompt.wrong_answer
    continuations = []
    for text, prefix in zip(texts, ids, strict=True):
        whole = model.encode(text + answer)
        if whole[: len(prefix)] != prefix:
            raise MediationError(
                f"Row {prompt.row}: {name} {answer!r} merges with the last token of the prompt; start the "
                "answer with a space and end the prompt without one."
            )
        continuations.append(whole[len(prefix) :])
    if not continuations[0]:
        raise MediationError(f"Row {prompt.row}: {name} {answer!r} has no tokens; give text that the tokenizer keeps.")
    if continuations[0] != continuations[-1]:
        raise MediationError(
            f"Row {prompt.row}: {name} {answer!r} has other tokens after the corrupt prompt than after the "
            "clean one; end both prompts alike."
        )
    return continuations[0]


def _token_roles(prompt: Prompt, text: str, model: SubjectModel) -> list[str]:
    """Role of each token of the clean prompt; where roles overlap the shorter span wins."""
    offsets = model.offsets(text)
    labels = [""] * len(offsets)
    spans = role_spans(prompt, text)
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1][0] - item[1][1]):
        for k, (left, right) in enumerate(offsets):
            # A token such as " Paris" begins at its word: the space may belong to the span before it.
            left = right - len(text[left:right].lstrip()) if text[left:right].strip() else left
            if max(left, start) < min(right, end):
                labels[k] = name
    return labels


@dataclass(frozen=True)
class Batch:
    """B examples padded on the right to T positions and K targets.

    `mask` is True on tokens; a target of sign 0 is padding.
    """

    examples: tuple[Example, ...]
    clean: Tensor  # long [B, T]
    corrupt: Tensor | None  # long [B, T]
    mask: Tensor  # bool [B, T]
    prompt: Tensor  # long [B], index of the prompt in the set
    target_positions: Tensor  # long [B, K]
    target_tokens: Tensor  # long [B, K]
    target_signs: Tensor  # float [B, K]

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, rows: Tensor) -> Batch:
        """The batch of these examples, long [n] indices into this one; an example may come up many times."""
        chosen = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, examples=tuple(self.examples[row] for row in rows.tolist()), **chosen)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    """Right-padded tensors of the examples, in their order (all with corrupt ids or all without)."""

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.long)

    corrupt = [example.corrupt for example in examples if example.corrupt is not None]
    if corrupt and len(corrupt) != len(examples):
        raise ValueError("Some examples have corrupt ids and some have none; tokenize all with one baseline.")
    positions, tokens, signs = (
        padded([[target[part] for target in example.targets] for example in examples], 0) for part in range(3)
    )
    return Batch(
        examples=tuple(examples),
        clean=padded([example.clean for example in examples], pad_id),
        corrupt=padded(corrupt, pad_id) if corrupt else None,
        mask=padded([[1] * len(example) for example in examples], 0).bool(),
        prompt=torch.tensor([example.prompt for example in examples]),
        target_positions=positions,
        target_tokens=tokens,
        target_signs=signs.float(),
    )


def batches(examples: Sequence[Example], batch_size: int, pad_id: int = 0) -> Iterator[Batch]:
    """Batches of at most `batch_size` examples, shortest first (stable), so that little is padded."""
    if batch_size < 1:
        raise MediationError(f"The batch size is {batch_size}; give 1 or more.")
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], pad_id)
