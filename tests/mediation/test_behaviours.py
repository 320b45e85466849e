"""`score` against log_softmax by brute force and against a model run token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mediation.behaviours import Behaviour, keep_positions, score
from mediation.prompts import Baseline, Batch, Example, PromptSet, batches, collate, tokenize
from mediation.subject import SubjectModel
from tests.tiny_models import save_tiny

VOCAB = 11


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    return SubjectModel.load(save_tiny("llama", tmp_path_factory.mktemp("llama"), add_bos=True), device="cpu")


def random_batch(sizes: list[tuple[int, int]], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    return collate(
        [
            Example(
                prompt=k,
                clean=[1] * length,
                corrupt=None,
                targets=[(draw(length), draw(VOCAB), 1 - 2 * draw(2)) for _ in range(n_targets)],
                roles=[""] * length,
            )
            for k, (length, n_targets) in enumerate(sizes)
        ]
    )


def brute_force(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    logp = logits.double().log_softmax(-1)
    return torch.stack(
        [
            torch.stack([sign * logp[row, position, token] for position, token, sign in example.targets]).sum()
            for row, example in enumerate(batch.examples)
        ]
    )


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5)


@given(sizes=sizes, seed=st.integers(0, 100))
def test_score_and_its_gradient_are_those_of_log_softmax(sizes: list[tuple[int, int]], seed: int) -> None:
    batch = random_batch(sizes, seed)
    full = torch.randn(len(batch), batch.clean.shape[1], VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    full.requires_grad_()
    kept = keep_positions(batch)
    assert kept.tolist() == sorted({target[0] for example in batch.examples for target in example.targets})

    found, expected = score(full[:, kept], batch, kept), brute_force(full, batch)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-5)
    weights = torch.arange(1, len(batch) + 1)
    by_score = torch.autograd.grad((found * weights).sum(), full)[0]
    by_force = torch.autograd.grad((expected * weights).sum(), full)[0]
    torch.testing.assert_close(by_score, by_force, atol=1e-5, rtol=1e-4)


def test_logit_difference_is_exact_where_the_normaliser_cancels() -> None:
    """At logits near 1e4 fp32 log-probabilities are good to 1e-3 only; a difference of logits is exact."""
    batch = collate([Example(0, [1, 2], None, [(1, 3, 1), (1, 4, -1)], ["", ""])])
    logits = torch.full((1, 1, VOCAB), 1e4)
    logits[0, 0, 3] += 0.25
    assert score(logits, batch, keep_positions(batch)).item() == 0.25
    logits[0, 0, 7] = float("inf")
    assert score(logits, batch, keep_positions(batch)).item() == 0.25


def test_padded_targets_do_not_read_masked_logits() -> None:
    short = Example(0, [1, 2], None, [(1, 3, 1)], ["", ""])
    long = Example(1, [1, 2], None, [(0, 3, 1), (1, 4, 1)], ["", ""])
    logits = torch.randn(2, 2, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, :, 0] = float("-inf")
    logits.requires_grad_()
    batch = collate([short, long])
    found = score(logits, batch, keep_positions(batch))
    torch.testing.assert_close(found, brute_force(logits, batch).float())
    assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_low_precision_logits_are_scored_in_fp32() -> None:
    batch = random_batch([(3, 2)], seed=0)
    logits = torch.randn(1, 3, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = keep_positions(batch)
    found = score(logits[:, kept], batch, kept)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, brute_force(logits, batch).float())


def token_by_token(model: SubjectModel, prompt: str, answer: str) -> float:
    """log p(answer | prompt): run the prompt, read one token's log-probability, append it, and again."""
    ids = model.encode(prompt)
    total = 0.0
    for token in model.encode(prompt + answer)[len(ids) :]:
        with torch.no_grad():
            logits = model.module(torch.tensor([ids])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("behaviour", Behaviour)
def test_a_behaviour_is_the_sum_over_its_examples(model: SubjectModel, behaviour: Behaviour, batch_size: int) -> None:
    prompts = PromptSet.from_rows(
        [
            {"clean": "w1 w2 w3", "answer": " w4", "wrong_answer": " w5"},
            {"clean": "w9", "answer": " w4 w6", "wrong_answer": " w7"},
            {"clean": "w1 w8 w8 w2", "answer": " w4 w6 w5", "wrong_answer": " w4 w6 w6"},
        ]
    )
    examples = tokenize(prompts, model, baseline=Baseline.ZERO, behaviour=behaviour)
    found = torch.zeros(len(prompts))
    for batch in batches(examples, batch_size):
        kept = keep_positions(batch)
        logits = model.forward(batch.clean, batch.mask, positions=kept).logits
        assert logits is not None
        found.index_add_(0, batch.prompt, score(logits, batch, kept))
    for k, prompt in enumerate(prompts):
        assert isinstance(prompt.clean, str)
        expected = token_by_token(model, prompt.clean, prompt.answer)
        if behaviour is Behaviour.LOGIT_DIFF:
            expected -= token_by_token(model, prompt.clean, prompt.wrong_answer)
        assert found[k].item() == pytest.approx(expected, abs=1e-4)
