"""A model by its name on the Hugging Face hub: download what is needed, then it is a folder."""

from pathlib import Path

CONFIGS = ("config.json", "generation_config.json")
VOCABULARIES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "*.tiktoken",
)
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


def download(name: str, revision: str | None) -> Path:
    """The folder with the files of the model ``name``: its config, vocabulary and weights (safetensors if it has them).

    Raises:
        ValueError: huggingface_hub is not installed, the hub has no such model or cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download  # an optional dependency
    except ImportError as error:
        raise ValueError(
            f"{name!r} is neither a file nor a folder here; to take it from the Hugging Face hub, "
            "pip install huggingface_hub"
        ) from error
    try:
        patterns = [*CONFIGS, *VOCABULARIES, *SAFETENSORS]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, *PICKLED]))
    except Exception as error:  # the hub's, its HTTP library's and the system's errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        at = "" if revision is None else f" at revision {revision!r}"
        raise ValueError(
            f"{name!r} is neither a file nor a folder here, and could not be taken from the Hugging Face hub{at}: "
            f"{reason} ({type(error).__name__}). Without network, download the folder elsewhere and give its path"
        ) from error
    return folder
