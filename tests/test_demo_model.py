"""The demo model that ships: it loads, it is the model that its recipe writes, and its text is text."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine import LLM, SamplingParams
from engine.checkpoints.canonical import to_reference
from engine.checkpoints.load import load_checkpoint
from engine.llm import DEMO_MODEL
from engine.reference import generate_greedy
from engine.text.load import load_tokenizer

ROOT = Path(__file__).parent.parent
COMMON_WORDS = (
    "the to of and a her i was in it she that not be you he his had as for with but have is at mr my so all they "
    "him could were any which no very been on would by from what who me your must an will this there said such "
    "than much do or if more when one are how only them know little miss mrs never think other well now time am "
    "good before every might should did about being some after can lady sister their herself into out up has made "
    "first own man great might two most may our us then over without day"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    pytest.importorskip("tokenizers")
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "examples" / "train_demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_greedy_is_the_references(llm: LLM, steps: int) -> None:
    checkpoint = load_checkpoint(DEMO_MODEL)
    reference = to_reference(checkpoint.config, checkpoint.weights)
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    (output,) = llm.generate("It is a truth universally acknowledged, that", params, use_tqdm=False)
    ids = torch.tensor([output.prompt_token_ids])
    with torch.no_grad():
        expected = generate_greedy(reference, ids, steps)[0, ids.shape[1] :].tolist()
    assert list(output.outputs[0].token_ids) == expected


def test_greedy_text_is_the_references(llm: LLM) -> None:
    assert_greedy_is_the_references(llm, 48)


@pytest.mark.slow
def test_the_triton_kernels_give_the_references_text() -> None:
    """The kernels at the demo model's real size, interpreted."""
    pytest.importorskip("triton")
    assert_greedy_is_the_references(LLM(backend="triton-interpret", dtype="float32"), 3)


def test_it_reads_as_english(llm: LLM) -> None:
    """Most of the words that it samples are words of English; letter soup would not pass."""
    common = set(COMMON_WORDS.split())
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=200, seed=1)
    text = llm.generate("She had been", params, use_tqdm=False)[0].outputs[0].text
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 100
    assert sum(word in common for word in words) / len(words) > 0.5


def test_vocabulary_covers_every_byte(llm: LLM) -> None:
    assert llm.tokenizer is not None
    for text in ("It is a truth", "naïve – “déjà vu” 日本 🎉\n\n\tx", "<|endoftext|>"):
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text
    assert llm.tokenizer.eos_token_id == llm.model_config.vocab_size - 1


def test_training_figures_are_shipped() -> None:
    figures = json.loads((DEMO_MODEL / "training.json").read_text())
    assert 2.0 < figures["held_out_loss"] < 3.7
    assert figures["parameters"] == load_checkpoint(DEMO_MODEL).config.num_parameters
    assert {"seed", "corpus", "steps", "seconds", "train_tokens"} <= figures.keys()


def test_the_recipe_writes_what_is_loaded(recipe: ModuleType, tmp_path: Path) -> None:
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 3
    ranks = recipe.train_ranks([text], 300)
    model = recipe.new_model().eval()
    recipe.save(model, ranks, {"steps": 0}, tmp_path)
    loaded = load_checkpoint(tmp_path)
    ids = torch.randint(2048, (1, 30))
    with torch.no_grad():
        difference = (to_reference(loaded.config, loaded.weights)(ids) - model.half().float()(ids)).abs().max()
    assert difference < 1e-5
    codec = load_tokenizer(tmp_path, 2048, loaded.eos_token_id)
    assert codec is not None
    assert codec.decode(codec.encode(text)) == text
    assert len(codec.encode(text)) < len(text) / 2


def test_the_recipe_joins_wrapped_lines(recipe: ModuleType) -> None:
    lines = ["CHAPTER I", "", "  It is _a_ truth", "universally", "", "", "acknowledged. "]
    assert recipe.unwrap(lines) == "CHAPTER I\n\nIt is a truth universally\n\nacknowledged."
