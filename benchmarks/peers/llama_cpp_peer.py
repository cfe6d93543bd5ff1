"""llama.cpp through llama-cpp-python: GGUF files, and the library's own calls for many sequences at once."""

import json
import time
from pathlib import Path

import gguf
import llama_cpp as llama
import numpy as np
from safetensors.numpy import load_file

FILES = {
    "float32": llama.LLAMA_FTYPE_ALL_F32,
    "bfloat16": llama.LLAMA_FTYPE_MOSTLY_BF16,
    "int8": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
}
_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def versions() -> dict[str, str]:
    return {"llama-cpp-python": llama.__version__}


def convert(checkpoint: Path, folder: Path, precision: str) -> None:
    """Write float32 as GGUF, then let llama.cpp's quantiser make every matrix of it the wanted type."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(checkpoint, folder / "float32.gguf")
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure = FILES[precision], True
    if llama.llama_model_quantize(str(folder / "float32.gguf").encode(), str(folder / "model.gguf").encode(), params):
        raise ValueError(f"llama_model_quantize could not write {precision}")
    (folder / "float32.gguf").unlink()


def write_gguf(checkpoint: Path, path: Path) -> None:
    """A Hugging Face GPT-2 folder as a float32 GGUF file without a vocabulary."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(checkpoint / "model.safetensors")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    named = {"token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight"}
    for kind in ("weight", "bias"):
        named[f"output_norm.{kind}"] = f"ln_f.{kind}"
        for i in range(config["n_layer"]):
            named |= {f"blk.{i}.{ours}.{kind}": f"h.{i}.{theirs}.{kind}" for theirs, ours in _NAMES.items()}
    for name, theirs in named.items():
        tensor = tensors[f"transformer.{theirs}"]
        turned = name.startswith("blk.") and tensor.ndim == 2  # [in, out] there, [out, in] here
        writer.add_tensor(name, np.ascontiguousarray(tensor.T if turned else tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    """One context with room for ``max_seqs`` sequences; a context with room for one, for one."""

    def __init__(self, folder: Path, threads: int, max_seqs: int) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(str(folder / "model.gguf").encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {folder}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.threads, self.max_seqs = threads, max_seqs
        self.contexts: dict[int, object] = {}
        self.facts: dict[str, str] = {}

    def context(self, seqs: int) -> object:
        """A context for this many sequences, its memory empty."""
        if seqs not in self.contexts:
            params = llama.llama_context_default_params()
            each = llama.llama_model_n_ctx_train(self.model)
            params.n_ctx, params.n_seq_max = each * seqs, seqs
            params.n_batch = max(512, min(2048, each * seqs))
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[seqs] = llama.llama_init_from_model(self.model, params)
        llama.llama_memory_clear(llama.llama_get_memory(self.contexts[seqs]), True)
        return self.contexts[seqs]

    def step(self, context: object, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows of (token, position, sequence, whether its logits are wanted); the greedy token of each wanted."""
        batch = llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, seq, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = seq
        code = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode failed with {code}")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (self.vocab_size,))
                found.append(int(logits.argmax()))
        return found

    def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
        context = self.context(len(prompts))
        start = time.perf_counter()
        rows = [
            (token, i, seq, i == len(prompt) - 1)
            for seq, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        answers = [[token] for token in self.step(context, rows)]
        first = time.perf_counter() - start
        for _ in range(tokens - 1):
            rows = [
                (answer[-1], len(prompt) + len(answer) - 1, seq, True)
                for seq, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
            for answer, token in zip(answers, self.step(context, rows), strict=True):
                answer.append(token)
        return answers, first, time.perf_counter() - start


def load(checkpoint: Path, folder: Path, precision: str, threads: int, max_seqs: int) -> Engine:
    return Engine(folder, threads, max_seqs)
