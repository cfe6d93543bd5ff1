"""An error budget of lower precisions on the demo model, and how to measure against it.

The text was not trained on: it is this project's own, in the manner of the demo model's corpus.
"""

import torch

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


def costs(got: torch.Tensor, exact: tuple[torch.Tensor, list[int]]) -> tuple[float, float]:
    """Mean KL divergence and mean increase of the negative log-likelihood of the text."""
    wanted, ids = exact
    targets = torch.tensor(ids[1:])[:, None]
    likelihood = (wanted[:-1].gather(1, targets) - got[:-1].gather(1, targets)).mean()
    return float((wanted.exp() * (wanted - got)).sum(1).mean()), float(likelihood)
