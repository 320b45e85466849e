"""Rows in, token sequences out: a malformed row names itself, and nothing is lost on the way to a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mediation.behaviours import Behaviour
from mediation.errors import MediationError
from mediation.prompts import (
    Baseline,
    DiscoverySet,
    EvaluationSet,
    Example,
    Half,
    PromptSet,
    batches,
    collate,
    tokenize,
)
from mediation.subject import SubjectModel
from tests.tiny_models import save_tiny

ROW: dict[str, Any] = {"clean": "w1 w2", "corrupt": "w1 w3", "answer": " w4", "wrong_answer": " w5"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    """One token a word, BOS first: w{i} is id i + 3."""
    return SubjectModel.load(save_tiny("llama", tmp_path_factory.mktemp("words"), add_bos=True), device="cpu")


@pytest.fixture(scope="module")
def bpe_model(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    """Byte-level BPE without BOS, whose tokens carry their leading space as GPT-2's do."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("bpe"), tokenizer=False, vocab_size=300)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat the cats ca"] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return SubjectModel.load(folder, device="cpu")


def w(*words: int) -> list[int]:
    return [word + 3 for word in words]


def bos_of(model: SubjectModel) -> int:
    assert model.bos_id is not None
    return model.bos_id


def one(**changes: Any) -> PromptSet:
    return PromptSet.from_rows([ROW | changes])


# Reading ---------------------------------------------------------------------------------------------------


def test_jsonl_rows_keep_their_fields_and_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    second = ROW | {"id": "b", "group": "capital", "fact": "w4", "roles": {"claim": [0, 2], "rest": "w2"}}
    file.write_text("\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(second) + "\r\n", encoding="utf-8")
    first, last = PromptSet.from_jsonl(file)
    assert (first.id, first.row, first.group, first.fact, first.roles) == ("row-1", 1, "all", None, {})
    assert (last.id, last.row, last.group, last.fact) == ("b", 3, "capital", "w4")
    assert last.roles == {"claim": (0, 2), "rest": "w2"}
    assert (last.clean, last.corrupt, last.answer, last.wrong_answer) == ("w1 w2", "w1 w3", " w4", " w5")


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(ROW | {"clean": "w1\u2028w2"}, ensure_ascii=False), encoding="utf-8")
    assert PromptSet.from_jsonl(file)[0].clean == "w1\u2028w2"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"clean": "w1"', "not valid JSON"),
        ("[1, 2]", "not an object"),
        ("null", "not an object"),
        ({"clean": "w1", "wrong_answer": " w2"}, "no 'answer'"),
        ({"clean": "w1", "answer": " w2"}, "no 'wrong_answer'"),
        ({"answer": " w1", "wrong_answer": " w2"}, "no 'clean'"),
        (ROW | {"clean": 7}, "'clean' must be a non-empty string"),
        (ROW | {"clean": ""}, "'clean' must be a non-empty string"),
        (ROW | {"corrupt": ["w1"]}, "'corrupt' needs messages"),
        (ROW | {"clean": []}, "'clean' has no messages"),
        (ROW | {"clean": [{"role": "user"}]}, "'clean' needs messages"),
        (ROW | {"clean": [{"role": "user", "content": 3}]}, "'clean.content' must be"),
        (ROW | {"answer": ""}, "'answer' must be a non-empty string"),
        (ROW | {"answer": "\ud800"}, "surrogate"),
        (ROW | {"answer": " w5"}, "both ' w5'"),
        (ROW | {"id": ["a"]}, "'id' must be a string"),
        (ROW | {"group": True}, "'group' must be a string"),
        (ROW | {"fact": 3}, "'fact' must be"),
        (ROW | {"roles": [0, 2]}, "'roles' must be"),
        (ROW | {"roles": {"claim": [0]}}, "role 'claim' must be"),
        (ROW | {"roles": {"claim": [0, 1.5]}}, "role 'claim' must be"),
        (ROW | {"roles": {"claim": [2, 2]}}, "role 'claim' spans"),
        (ROW | {"roles": {"claim": [-1, 2]}}, "role 'claim' spans"),
        (ROW | {"roles": {"claim": [0, 6]}}, "role 'claim' spans"),
        (ROW | {"roles": {"claim": "w9"}}, "occurs 0 times"),
        (ROW | {"roles": {"claim": "w"}}, "occurs 2 times"),
    ],
)
def test_a_malformed_row_names_its_line(row: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(ROW) + "\n\n" + (row if isinstance(row, str) else json.dumps(row)))
    with pytest.raises(MediationError, match=r"^Row 3") as caught:
        PromptSet.from_jsonl(file)
    assert said in str(caught.value)


def test_deeply_nested_json_is_a_malformed_row(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("[" * 100_000)
    with pytest.raises(MediationError, match="Row 1 is not"):
        PromptSet.from_jsonl(file)


def test_unreadable_files_are_errors_of_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MediationError, match="Cannot read"):
        PromptSet.from_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(MediationError, match="Cannot read"):
        PromptSet.from_jsonl(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"clean": "\xe9"}')
    with pytest.raises(MediationError, match="not UTF-8"):
        PromptSet.from_jsonl(tmp_path / "latin.jsonl")


def test_empty_sets_and_duplicate_ids_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(MediationError, match="empty"):
        PromptSet.from_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(MediationError, match="Rows 1 and 3 both have the id 'a'"):
        PromptSet.from_rows([ROW | {"id": "a"}, ROW, ROW | {"id": "a"}])


def test_a_hugging_face_dataset_gives_the_same_prompts_as_its_rows() -> None:
    datasets = pytest.importorskip("datasets")
    rows: list[dict[str, Any]] = [
        ROW | {"roles": {"claim": [0, 2]}, "group": None, "other": 1},
        ROW | {"roles": {"rest": [3, 5]}, "group": "g"},
    ]
    from_dataset = PromptSet.from_dataset(datasets.Dataset.from_list(rows))
    assert from_dataset.prompts == PromptSet.from_rows(rows).prompts
    assert len(PromptSet.from_dataset(datasets.Dataset.from_list(rows), limit=1)) == 1


def test_slices_are_prompt_sets_of_the_same_type() -> None:
    prompts = EvaluationSet.from_rows([ROW, ROW, ROW])
    assert isinstance(prompts[1:], EvaluationSet)
    assert [prompt.row for prompt in prompts[1:]] == [2, 3]
    with pytest.raises(MediationError, match="empty"):
        prompts[3:]


def test_content_hash_follows_the_content_and_not_the_place() -> None:
    one_row, moved = one(id="a"), PromptSet.from_rows([ROW, ROW | {"id": "a"}])[1:]
    assert one_row.content_hash == moved.content_hash
    for change in (
        {"clean": "w1 w4"},
        {"corrupt": None},
        {"roles": {"x": [0, 1]}},
        {"group": "g"},
        {"id": "b"},
    ):
        assert one(**{"id": "a"} | change).content_hash != one_row.content_hash


# Splitting -------------------------------------------------------------------------------------------------


@given(
    groups=st.lists(st.sampled_from("abc"), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_is_a_partition_with_its_share_of_every_group(groups: list[str], fraction: float, seed: int) -> None:
    rows = [ROW | {"id": str(k), "clean": f"w{k}", "group": group} for k, group in enumerate(groups)]
    prompts = PromptSet.from_rows(rows)
    discovery, evaluation = prompts.split(fraction, seed)
    assert isinstance(discovery, DiscoverySet)
    assert isinstance(evaluation, EvaluationSet)
    assert len(discovery) + len(evaluation) == len(groups)
    assert {p.id for p in discovery} | {p.id for p in evaluation} == {p.id for p in prompts}
    assert abs(len(discovery) - fraction * len(groups)) <= 1
    share = len(discovery) / len(groups)
    for group in set(groups):
        assert abs(sum(p.group == group for p in discovery) - share * groups.count(group)) <= 1

    shuffled = PromptSet.from_rows(rows[::-1]).split(fraction, seed)
    assert {p.id for p in shuffled[0]} == {p.id for p in discovery}


def test_halves_are_the_split_by_id_and_a_single_text_has_none() -> None:
    prompts = PromptSet.from_rows(ROW | {"id": f"p{k}", "clean": f"w1 w{k}"} for k in range(9))
    discovery, evaluation = prompts.split(seed=3)
    assert prompts.halves(3) == {p.id: Half.DISCOVERY for p in discovery} | {p.id: Half.EVALUATION for p in evaluation}
    alike = PromptSet.from_rows(ROW | {"id": f"p{k}"} for k in range(3))
    assert alike.halves() == {"p0": None, "p1": None, "p2": None}


def test_split_keeps_equal_texts_together_and_moves_with_the_seed() -> None:
    prompts = PromptSet.from_rows([ROW | {"id": str(k), "clean": f"w{k // 3}"} for k in range(60)])
    sides = [prompts.split(0.5, seed) for seed in range(4)]
    for discovery, evaluation in sides:
        assert {p.clean for p in discovery}.isdisjoint(p.clean for p in evaluation)
        assert len(discovery) == len(evaluation) == 30
    assert len({discovery.content_hash for discovery, _ in sides}) > 1


def test_what_cannot_be_split_is_an_error() -> None:
    with pytest.raises(MediationError, match="single clean text"):
        PromptSet.from_rows([ROW, ROW]).split()
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(MediationError, match="between 0 and 1"):
            PromptSet.from_rows([ROW, ROW | {"clean": "w9"}]).split(fraction)


# Tokens ----------------------------------------------------------------------------------------------------


def test_single_token_answers_share_one_example(model: SubjectModel) -> None:
    (example,) = tokenize(one(roles={"second": [3, 5]}), model)
    bos = bos_of(model)
    assert example == Example(
        prompt=0,
        clean=[bos, *w(1, 2)],
        corrupt=[bos, *w(1, 3)],
        targets=[(2, w(4)[0], 1), (2, w(5)[0], -1)],
        roles=["", "", "second"],
    )


def test_longer_answers_have_an_example_each(model: SubjectModel) -> None:
    prompts = PromptSet.from_rows([ROW, ROW | {"answer": " w4 w6", "wrong_answer": " w5 w7 w8"}])
    _, right, wrong = tokenize(prompts, model)
    bos = bos_of(model)
    assert (right.prompt, right.clean, right.corrupt) == (1, [bos, *w(1, 2, 4)], [bos, *w(1, 3, 4)])
    assert right.targets == [(2, w(4)[0], 1), (3, w(6)[0], 1)]
    assert (wrong.prompt, wrong.clean, wrong.corrupt) == (1, [bos, *w(1, 2, 5, 7)], [bos, *w(1, 3, 5, 7)])
    assert wrong.targets == [(2, w(5)[0], -1), (3, w(7)[0], -1), (4, w(8)[0], -1)]
    assert [len(e.roles) for e in (right, wrong)] == [4, 5]


def test_logprob_reads_the_answer_alone(model: SubjectModel) -> None:
    (example,) = tokenize(one(), model, behaviour=Behaviour.LOGPROB)
    assert example.targets == [(2, w(4)[0], 1)]


@pytest.mark.parametrize("baseline", [Baseline.ZERO, Baseline.MEAN])
def test_zero_and_mean_need_no_corrupt_prompt(model: SubjectModel, baseline: Baseline) -> None:
    for prompts in (one(corrupt=None), one(corrupt="w1 w2 w3")):
        (example,) = tokenize(prompts, model, baseline=baseline)
        assert example.corrupt is None


def test_corrupt_baseline_names_the_row_without_a_corrupt_prompt(model: SubjectModel) -> None:
    prompts = PromptSet.from_rows([ROW, ROW | {"corrupt": None}])
    with pytest.raises(MediationError, match=r"Row 2 has no corrupt prompt.*--baseline zero or mean"):
        tokenize(prompts, model)


def test_pairs_of_unequal_length_show_both_tokenisations(model: SubjectModel) -> None:
    prompts = PromptSet.from_rows([ROW, ROW | {"corrupt": "w1 w2 w3"}])
    with pytest.raises(MediationError, match="Row 2") as caught:
        tokenize(prompts, model)
    message = str(caught.value)
    assert "3 tokens ['<s>', 'w1', 'w2']" in message
    assert "4 tokens ['<s>', 'w1', 'w2', 'w3']" in message
    assert "--baseline zero or mean" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": "4"}, "answer '4' merges"),
        ({"wrong_answer": "4"}, "wrong_answer '4' merges"),
        ({"answer": "  "}, "answer '  ' has no tokens"),
        ({"answer": "  w5"}, "the same tokens"),
        ({"clean": "  ", "corrupt": None}, None),
    ],
)
def test_answers_must_be_tokens_of_their_own(model: SubjectModel, changes: dict[str, Any], said: str | None) -> None:
    if said is None:  # BOS alone is a prompt
        assert tokenize(one(**changes), model, baseline=Baseline.ZERO)[0].clean == [model.bos_id]
        return
    with pytest.raises(MediationError, match=r"^Row 1") as caught:
        tokenize(one(**changes), model)
    assert said in str(caught.value)


def test_the_answer_is_the_same_tokens_after_both_prompts(bpe_model: SubjectModel) -> None:
    """After an apostrophe GPT-2's rule splits off a "t", as in "don't", and "the" gets other tokens."""
    prompts = one(clean="the'", corrupt="thex", answer="the", wrong_answer=" sat")
    with pytest.raises(MediationError, match="Row 1: answer 'the' has other tokens after the corrupt prompt"):
        tokenize(prompts, bpe_model)


def test_a_merge_across_the_boundary_says_to_start_with_a_space(bpe_model: SubjectModel) -> None:
    with pytest.raises(MediationError, match="start the answer with a space"):
        tokenize(
            one(clean="the ca", corrupt=None, answer="t", wrong_answer=" sat"),
            bpe_model,
            baseline=Baseline.ZERO,
        )


def test_a_prompt_of_no_tokens_is_an_error(tmp_path: Path) -> None:
    words = SubjectModel.load(save_tiny("gpt2", tmp_path / "words"), device="cpu")
    with pytest.raises(MediationError, match="Row 1: the clean prompt has no tokens"):
        tokenize(one(clean=" "), words, baseline=Baseline.ZERO)


def test_a_leading_space_does_not_pull_a_token_into_the_span_before_it(bpe_model: SubjectModel) -> None:
    text = "the cat sat"
    (example,) = tokenize(
        one(clean=text, corrupt=None, answer=" the", wrong_answer=" cat", roles={"animal": [4, 8]}),
        bpe_model,
        baseline=Baseline.ZERO,
    )
    pieces = [text[a:b].strip() for a, b in bpe_model.offsets(text)]
    assert pieces == ["the", "cat", "sat"]
    assert example.roles == ["", "animal", ""]


def test_every_byte_of_a_character_has_its_role(bpe_model: SubjectModel) -> None:
    (example,) = tokenize(
        one(clean="the 🦊", corrupt=None, answer=" the", wrong_answer=" cat", roles={"fox": "🦊"}),
        bpe_model,
        baseline=Baseline.ZERO,
    )
    assert example.roles.count("fox") >= 4
    assert example.roles[0] == ""


@given(spans=st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(0, 13), st.integers(1, 14))))
def test_roles_follow_the_characters(model: SubjectModel, spans: dict[str, tuple[int, int]]) -> None:
    """Oracle: paint characters, longest span first; a token has the last colour on any of its characters."""
    text = "w1 w22 w3 w4w5"
    spans = {name: (a, b) for name, (a, b) in spans.items() if a < b}
    (example,) = tokenize(one(clean=text, corrupt=None, roles=spans), model, baseline=Baseline.ZERO)
    ordered = sorted(spans, key=lambda name: spans[name][1] - spans[name][0], reverse=True)
    expected = [""]
    for start, word in ((0, "w1"), (3, "w22"), (7, "w3"), (10, "w4w5")):
        inside = [n for n in ordered if set(range(*spans[n])) & set(range(start, start + len(word)))]
        expected.append(inside[-1] if inside else "")
    assert example.roles == expected


# Chat ------------------------------------------------------------------------------------------------------


def test_messages_are_rendered_and_roles_found_in_them(model: SubjectModel) -> None:
    clean = [{"role": "user", "content": "w7 w8"}]
    corrupt = [{"role": "user", "content": "w7 w9"}]
    (example,) = tokenize(one(clean=clean, corrupt=corrupt, roles={"claim": "w7 w8"}), model)
    assert example.clean == model.encode(model.chat(clean))
    assert example.corrupt == model.encode(model.chat(corrupt))
    assert example.clean.count(bos_of(model)) == 1
    claimed = [token for token, role in zip(example.clean, example.roles, strict=True) if role == "claim"]
    assert claimed == w(7, 8)


def test_roles_of_messages_are_checked_on_the_rendered_prompt(model: SubjectModel) -> None:
    prompts = one(clean=[{"role": "w1", "content": "w1"}], corrupt=None, roles={"claim": "w1"})
    with pytest.raises(MediationError, match=r"Row 1: role 'claim' must occur once.*occurs 2 times"):
        tokenize(prompts, model, baseline=Baseline.ZERO)


def test_a_model_without_a_chat_template_names_the_row(bpe_model: SubjectModel) -> None:
    with pytest.raises(MediationError, match=r"^Row 1: .*chat template"):
        tokenize(one(clean=[{"role": "user", "content": "w1"}]), bpe_model)


# Batches ---------------------------------------------------------------------------------------------------

example_lists = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=12).map(
    lambda sizes: [
        Example(
            prompt=k,
            clean=[k + 1] * length,
            corrupt=[k + 2] * length,
            targets=[(min(t, length - 1), k, 1 - 2 * (t % 2)) for t in range(n_targets)],
            roles=[""] * length,
        )
        for k, (length, n_targets) in enumerate(sizes)
    ]
)


@given(examples=example_lists, batch_size=st.integers(1, 5))
def test_batches_hold_every_example_once_and_padding_nothing(examples: list[Example], batch_size: int) -> None:
    seen: list[int] = []
    for batch in batches(examples, batch_size, pad_id=99):
        assert 1 <= len(batch) <= batch_size
        assert batch.corrupt is not None
        assert batch.clean.shape == batch.corrupt.shape == batch.mask.shape
        assert batch.mask.shape[1] == max(map(len, batch.examples))
        assert (batch.clean[~batch.mask] == 99).all()
        for row, example in enumerate(batch.examples):
            seen.append(int(batch.prompt[row]))
            assert examples[seen[-1]] is example
            n_targets = len(example.targets)
            assert batch.mask[row].tolist() == [k < len(example) for k in range(batch.mask.shape[1])]
            assert batch.clean[row][batch.mask[row]].tolist() == example.clean
            assert batch.corrupt[row][batch.mask[row]].tolist() == example.corrupt
            read = zip(batch.target_positions[row], batch.target_tokens[row], batch.target_signs[row], strict=True)
            targets = [(int(p), int(t), int(s)) for p, t, s in read]
            assert targets[:n_targets] == example.targets
            assert all(sign == 0 for _, _, sign in targets[n_targets:])
    assert sorted(seen) == list(range(len(examples)))
    assert seen == sorted(seen, key=lambda k: (len(examples[k]), k))


def test_batches_without_corrupt_ids_and_on_a_device() -> None:
    batch = collate([Example(0, [1, 2], None, [(1, 3, 1)], ["", ""])]).to("meta")
    assert batch.corrupt is None
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}
    with pytest.raises(MediationError, match="batch size is 0"):
        list(batches(batch.examples, 0))
    with pytest.raises(ValueError, match="one baseline"):
        collate([*batch.examples, Example(0, [1], [1], [(0, 3, 1)], [""])])
