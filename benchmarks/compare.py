"""The native backend beside other engines and beside what the machine can do at most: ``python -m benchmarks.compare``.

One random GPT-2 is made in memory and given to every engine. The engines take turns within each repetition, and the
machine's limits (bytes read per second, multiply-accumulates per second with operands in registers) are measured in
every repetition too, so that a neighbour's load hits all alike; medians are reported. A decode step's time is that of
a generation with many tokens less that of one with a single token. The float32 engines must agree on the greedy tokens
before anything is reported. Peers that are not installed are skipped and named. The last line of the output is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.backends.native_backend import chosen_isa, load_extension
from engine.bench.measure import ITEM_BYTES
from engine.bench.presets import preset_config, random_weights
from engine.checkpoints.canonical import Checkpoint
from engine.config import ModelConfig
from engine.llm import LLM
from engine.machine import processor_name, usable_cpus
from engine.messages import SamplingParams

PRESETS = {
    "gpt2": preset_config("gpt2"),
    "tiny": ModelConfig(307, 128, 64, 4, 2, 256, tied_head=True),
}
STORAGE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 2}  # int4 multiplies as int8 does
NO_ADAPTER = ("openvino_genai", "ctranslate2", "llama_cpp", "vllm")

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of tokens to the greedy continuations."""


@dataclass(frozen=True, slots=True)
class Case:
    """``seqs`` sequences: a prompt of ``prompt`` tokens each, then ``tokens`` decoded; a prefill has tokens == 1."""

    name: str
    seqs: int
    prompt: int
    tokens: int


def ours(config: ModelConfig, weights: dict[str, torch.Tensor], dtype: str, threads: int) -> Generate:
    """This engine's native backend behind its public door."""
    llm = LLM(
        Checkpoint(config, weights, "random weights"), backend="native", dtype=dtype, threads=threads, max_num_seqs=32
    )

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]

    return generate


def transformers(config: ModelConfig, weights: dict[str, torch.Tensor], dtype: str, threads: int) -> Generate:
    """Hugging Face's GPT-2 with its own cache and greedy loop."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.embed_dim,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.hidden_dim,
        )
    )
    state = {"transformer.wte.weight": weights["tok_emb"], "transformer.wpe.weight": weights["pos_emb"]}
    state["lm_head.weight"] = weights["head"]
    names = {"norm1": "ln_1", "qkv": "attn.c_attn", "proj": "attn.c_proj", "norm2": "ln_2", "fc": "mlp.c_fc"}
    names["fc2"] = "mlp.c_proj"
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = weights[f"final_norm.{kind}"]
        for i in range(config.n_layers):
            for name, theirs in names.items():
                tensor = weights[f"blocks.{i}.{name}.{kind}"]  # a Conv1D keeps [in, out]
                state[f"transformer.h.{i}.{theirs}.{kind}"] = tensor.t() if tensor.dim() == 2 else tensor
    model.load_state_dict(state, strict=False)
    model = model.to(getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    return generate


def engines(args: argparse.Namespace) -> tuple[dict[str, Generate], list[str]]:
    """The engines by name, and a line for each that is skipped."""
    config = PRESETS[args.preset]
    weights = random_weights(config)
    found = {f"ours {dtype}": ours(config, weights, dtype, args.threads) for dtype in args.dtypes}
    skipped = []
    if not args.peers:
        return found, ["all peers: --no-peers"]
    if importlib.util.find_spec("transformers") is None:
        skipped.append("transformers: not installed")
    else:
        for dtype in ("float32", "bfloat16"):
            if dtype in args.dtypes:
                found[f"transformers {dtype}"] = transformers(config, weights, dtype, args.threads)
    for peer in NO_ADAPTER:
        state = "not installed" if importlib.util.find_spec(peer) is None else "installed"
        skipped.append(f"{peer}: {state}, and this script has no adapter for it yet")
    return found, skipped


def check_agreement(found: dict[str, Generate], prompt: list[int]) -> None:
    """Refuse to time engines that compute different things: float32 means the same greedy tokens."""
    answers = {name: generate([prompt], 8) for name, generate in found.items() if name.endswith("float32")}
    if len({json.dumps(answer) for answer in answers.values()}) > 1:
        raise SystemExit(f"the float32 engines disagree on the greedy tokens: {answers}")


def floor_seconds(config: ModelConfig, dtype: str, case: Case, read_rate: float, mac_rate: float) -> float:
    """The least time of one step: every weight and cached value read once, or every product, whichever is more."""
    width, hidden = config.embed_dim, config.hidden_dim
    block = 4 * width * width + 2 * width * hidden
    head = config.vocab_size * width
    rows = case.seqs if case.tokens > 1 else case.seqs * case.prompt
    cached = case.seqs * (case.prompt + case.tokens / 2) * 2 * width * config.n_layers * max(2, ITEM_BYTES[dtype])
    read = (config.n_layers * block + head) * ITEM_BYTES[dtype] + (cached if case.tokens > 1 else 0)
    macs = rows * config.n_layers * block + case.seqs * head
    return max(read / read_rate, macs / mac_rate)


def measure_limits(threads: int, dtypes: list[str], megabytes: int) -> dict[str, float]:
    """Bytes per second, and multiply-accumulates per second by dtype."""
    native = load_extension()
    size = megabytes << 20
    limits = {"read": size / statistics.median(native.time_reads("", threads, size, 3))}
    for dtype in dtypes:
        limits[dtype] = statistics.median(native.time_products("", threads, STORAGE_CODES[dtype], 2))
    return limits


def timed(generate: Generate, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of one generation."""
    start = time.perf_counter()
    generate(prompts, tokens)
    return time.perf_counter() - start


def step_seconds(generate: Generate, case: Case, prompts: list[list[int]]) -> float:
    """Seconds of one decode step, or of the prefill with its one token."""
    first = timed(generate, prompts, 1)
    if case.tokens == 1:
        return first
    return (timed(generate, prompts, case.tokens) - first) / (case.tokens - 1)


def compare(args: argparse.Namespace) -> list[dict[str, object]]:
    """Run everything and return a row for every case and engine."""
    config = PRESETS[args.preset]
    found, skipped = engines(args)
    for line in skipped:
        print("skipped", line)
    generator = torch.Generator().manual_seed(1)
    longest = min(512, config.context_length - 1)
    prompts = torch.randint(config.vocab_size, (32, longest), generator=generator).tolist()
    check_agreement(found, prompts[0][:16])
    cases = [Case(f"decode {n}", n, min(64, longest // 2), args.tokens) for n in args.seqs]
    cases.append(Case(f"prefill {longest}", 1, longest, 1))
    rows: list[dict[str, object]] = []
    for case in cases:
        batch = [prompt[: case.prompt] for prompt in prompts[: case.seqs]]
        times: dict[str, list[float]] = {name: [] for name in found}
        shares: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(args.repeats):
            limits = measure_limits(args.threads, args.dtypes, args.megabytes)
            for name, generate in found.items():
                dtype = name.split()[1]
                seconds = step_seconds(generate, case, batch)
                times[name].append(seconds)
                shares[name].append(floor_seconds(config, dtype, case, limits["read"], limits[dtype]) / seconds)
        for name in found:
            seconds = statistics.median(times[name])
            tokens = case.seqs if case.tokens > 1 else case.prompt
            rows.append(
                {
                    "case": case.name,
                    "engine": name,
                    "ms": round(seconds * 1e3, 3),
                    "tokens_per_s": round(tokens / seconds, 1),
                    "share_of_limit": round(statistics.median(shares[name]), 3),
                    "read_GB_s": round(limits["read"] / 1e9, 1),
                    "GMAC_s": round(limits[name.split()[1]] / 1e9, 1),
                }
            )
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Parse the command line, compare, print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=PRESETS, default="gpt2")
    made.add_argument("--threads", type=int, default=usable_cpus())
    made.add_argument("--dtypes", nargs="+", choices=STORAGE_CODES, default=list(STORAGE_CODES))
    made.add_argument("--seqs", nargs="+", type=int, default=[1, 8, 32], help="sequences decoded together, 32 at most")
    made.add_argument("--tokens", type=int, default=24, help="tokens of a decode")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="time other engines too")
    made.add_argument("--megabytes", type=int, default=512, help="memory that the read rate is measured on")
    args = made.parse_args(arguments)
    if args.tokens < 2 or args.repeats < 1 or not all(1 <= n <= 32 for n in args.seqs):
        made.error("--tokens must be at least 2, --repeats at least 1, --seqs from 1 to 32")
    print(f"{processor_name()}, instruction set {chosen_isa()}, {args.threads} threads, preset {args.preset}")
    rows = compare(args)
    print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main()
