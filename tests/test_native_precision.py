"""What bfloat16, int8 and int4 cost in accuracy, on the demo model, against an error budget that is written down here.

The text was not trained on: it is this project's own, in the manner of the demo model's corpus.
"""

import pytest
import torch

from engine.llm import LLM

pytest.importorskip("engine.backends._native", reason="the C++ extension is not built")

# Mean over positions, in nats: KL divergence from float32, and how much worse the negative log-likelihood may be.
BUDGET = {
    "bfloat16": (1e-3, 2e-3),
    "int8": (5e-3, 1e-2),
    "int4": (5e-2, 5e-2),
    "int4-g64": (5e-2, 5e-2),
    "int4-g128": (5e-2, 5e-2),
}
TEXT = (
    "Mr. Harding had been so long accustomed to the quiet of his own library, that the arrival of three young ladies "
    "and their mother, upon a wet Thursday in October, was felt by him as a very serious evil. He received them with "
    "civility, however, and even with some degree of warmth; for the eldest was handsome, and the second had sense, "
    "and the youngest, though she had neither, was so perfectly satisfied with every thing about her, that it was "
    "impossible to be out of humour in her company. Their mother talked a great deal. She was persuaded that no house "
    "in the county could be so well situated, nor any gentleman so happy in his neighbours; and before the tea was "
    "brought in, she had settled it in her own mind which of her daughters he should marry."
)


def logprobs(dtype: str) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities [T, V] after every token of the text, and its ids."""
    llm = LLM(backend="native", dtype=dtype, threads=2, max_num_seqs=1)
    assert llm.tokenizer is not None
    ids = list(llm.tokenizer.encode(TEXT))[: llm.max_model_len]
    return torch.log_softmax(llm.logits(ids).double(), dim=1), ids


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, list[int]]:
    return logprobs("float32")


def costs(got: torch.Tensor, exact: tuple[torch.Tensor, list[int]]) -> tuple[float, float]:
    """Mean KL divergence and mean increase of the negative log-likelihood of the text."""
    wanted, ids = exact
    targets = torch.tensor(ids[1:])[:, None]
    likelihood = (wanted[:-1].gather(1, targets) - got[:-1].gather(1, targets)).mean()
    return float((wanted.exp() * (wanted - got)).sum(1).mean()), float(likelihood)


@pytest.mark.parametrize("dtype", BUDGET)
def test_within_the_budget(dtype: str, exact: tuple[torch.Tensor, list[int]]) -> None:
    divergence, likelihood = costs(logprobs(dtype)[0], exact)
    assert 0 < divergence <= BUDGET[dtype][0]
    assert likelihood <= BUDGET[dtype][1]


def test_the_budget_can_be_missed(exact: tuple[torch.Tensor, list[int]]) -> None:
    """The negative control: int4 does not fit int8's budget, nor logits 5% too flat the budget of bfloat16."""
    assert costs(logprobs("int4")[0], exact)[0] > BUDGET["int8"][0]
    assert costs(torch.log_softmax(exact[0] * 0.95, dim=1), exact)[0] > BUDGET["bfloat16"][0]
