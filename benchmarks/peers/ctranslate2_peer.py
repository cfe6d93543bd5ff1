"""CTranslate2's ``Generator``: float32, and int8 by its own quantisation of the weights."""

import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import ctranslate2
from ctranslate2.converters import TransformersConverter


def versions() -> dict[str, str]:
    return {"ctranslate2": version("ctranslate2")}


class Converter(TransformersConverter):
    """The checkpoint has no vocabulary; token i is named by its number."""

    def load_tokenizer(self, tokenizer_class: type, model_name_or_path: str, **kwargs: object) -> SimpleNamespace:
        import json

        size = json.loads((Path(model_name_or_path) / "config.json").read_text())["vocab_size"]
        names = {str(i): i for i in range(size)}
        return SimpleNamespace(get_vocab=lambda: names, bos_token="0", eos_token="0", unk_token="0")


def convert(checkpoint: Path, folder: Path, precision: str) -> None:
    quantization = None if precision == "float32" else precision
    Converter(str(checkpoint)).convert(str(folder), quantization=quantization, force=True)


class Engine:
    """``generate_batch`` with one result a prompt."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        self.facts: dict[str, str] = {}
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
        times: list[float] = []
        start = time.perf_counter()
        results = self.generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()),  # once a token of each sequence
        )
        seconds = time.perf_counter() - start
        return [result.sequences_ids[0] for result in results], times[len(prompts) - 1] - start, seconds


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(folder, precision, threads)
