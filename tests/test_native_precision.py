"""What bfloat16, int8 and int4 cost in accuracy, on the demo model, against the error budget of ``precision.py``."""

import pytest
import torch
from precision import BUDGET, TEXT, costs

from engine.llm import LLM

pytest.importorskip("engine.backends._native", reason="the C++ extension is not built")


def logprobs(dtype: str) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities [T, V] after every token of the text, and its ids."""
    llm = LLM(backend="native", dtype=dtype, threads=2, max_num_seqs=1)
    assert llm.tokenizer is not None
    ids = list(llm.tokenizer.encode(TEXT))[: llm.max_model_len]
    return torch.log_softmax(llm.logits(ids).double(), dim=1), ids


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, list[int]]:
    return logprobs("float32")


@pytest.mark.parametrize("dtype", BUDGET)
def test_within_the_budget(dtype: str, exact: tuple[torch.Tensor, list[int]]) -> None:
    divergence, likelihood = costs(logprobs(dtype)[0], exact)
    assert 0 < divergence <= BUDGET[dtype][0]
    assert likelihood <= BUDGET[dtype][1]


def test_the_budget_can_be_missed(exact: tuple[torch.Tensor, list[int]]) -> None:
    """The negative control: int4 does not fit int8's budget, nor logits 5% too flat the budget of bfloat16."""
    assert costs(logprobs("int4")[0], exact)[0] > BUDGET["int8"][0]
    assert costs(torch.log_softmax(exact[0] * 0.95, dim=1), exact)[0] > BUDGET["bfloat16"][0]
