"""The recipe of the demo model: a 5.4M-parameter GPT trained on Jane Austen's six novels (public domain).

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    pip install -e ".[train]"
    python examples/train_demo.py --corpus austen --work build/demo --out engine/data/demo

The corpus is the Debian package r-cran-janeaustenr 1.0.0 (the Project Gutenberg texts, 3.9 MB); a folder of ``.txt``
files works as well, one book a file. The run is seeded, saves its state every few minutes under ``--work`` and goes
on from there when it is started again. About an hour and a half on two cores.

What it writes is a Hugging Face GPT-2 folder (fp16 safetensors) with its vocabulary as tiktoken ranks, and
``training.json`` with the figures of the run, the final held-out loss among them.
"""

import argparse
import base64
import json
import lzma
import math
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from engine.reference import GPTModel, LayerNorm, MultiHeadAttention

SEED = 1813
HELD_OUT = 0.03  # the end of every book is kept from training
END_OF_TEXT = "<|endoftext|>"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's
CONFIG = {
    "vocab_size": 2048,
    "context_length": 512,
    "embed_dim": 256,
    "n_heads": 4,
    "n_layers": 6,
    "drop_rate": 0.1,
    "qkv_bias": True,
    "tie_weights": True,
}
BATCH, WARMUP, DECAY = 8, 100, 0.4  # sequences a step; steps; share of the run over which the rate falls to zero
RATE_MATRICES, RATE_REST, WEIGHT_DECAY = 0.02, 2e-3, 0.1


def read_books(folder: Path) -> list[str]:
    """The books of the Debian package's R database, or of the ``.txt`` files under ``folder``, sorted by name."""
    index = next(iter(folder.rglob("Rdata.rdx")), None)
    if index is None:
        texts = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.rglob("*.txt"))]
    else:
        import rdata  # only this corpus needs it

        def parse(raw: bytes) -> Any:
            return rdata.conversion.convert(rdata.parser.parse_data(raw))

        entries = parse(index.read_bytes())["variables"]
        database = index.with_suffix(".rdb").read_bytes()
        texts = []
        for _, (offset, size) in sorted(entries.items()):
            chunk = database[int(offset) : int(offset) + int(size)]  # four bytes of length, then the stream
            raw = lzma.decompress(chunk[5:]) if chunk[4:5] == b"Z" else zlib.decompress(chunk[4:])
            texts.append([str(line) for line in parse(raw)])
    if not texts:
        raise SystemExit(f"no Rdata.rdx and no .txt file under {folder}")
    return [unwrap(lines) for lines in texts]


def unwrap(lines: list[str]) -> str:
    """Join the hard-wrapped lines of each paragraph; paragraphs stay a blank line apart. Italics lose their marks."""
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    joined = (" ".join(paragraph.replace("_", "").split()) for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph)


def train_ranks(texts: list[str], size: int) -> dict[bytes, int]:
    """``size`` byte-pair ranks: the 256 bytes, then the merges in the order in which they were found."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN.replace("++", "+")), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's stand-ins for the other bytes follow
    stand_ins = printable + [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(b) if i < len(printable) else chr(256 + i - len(printable)): b for i, b in enumerate(stand_ins)}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        ranks.setdefault(bytes(to_byte[char] for char in token), len(ranks))
    return ranks


def attention_for_training(self: MultiHeadAttention, x: torch.Tensor) -> torch.Tensor:
    """The reference's attention by PyTorch's fused operator (twice the speed here); no dropout on its weights."""
    batch, length, width = x.shape
    q, k, v = (
        linear(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        for linear in (self.W_query, self.W_key, self.W_value)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
    result: torch.Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, width))
    return result


def norm_for_training(self: LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.eps)


def new_model() -> GPTModel:
    """The model as GPT-2 initialises it: N(0, 0.02), residual projections smaller by sqrt(2 n_layers)."""
    torch.manual_seed(SEED)
    model = GPTModel(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("out_proj.weight", "layers.2.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * CONFIG["n_layers"]) if residual else 0.02)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum made orthogonal by five Newton-Schulz steps.

    PyTorch has one as well; its steps run in bfloat16, which is very slow on a CPU without the instructions.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                x = x.T if x.shape[0] > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                update = x.T if p.shape[0] > p.shape[1] else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def optimizers(model: GPTModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (Jordan 2024), AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.trf_blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=RATE_MATRICES, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=RATE_REST, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def held_out_loss(model: GPTModel, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per token over consecutive whole windows of ``tokens``."""
    model.eval()
    length = CONFIG["context_length"]
    windows = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)
    losses = [
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in windows.split(BATCH)
    ]
    model.train()
    return sum(losses) / (windows.shape[0] * length)


def train(tokens: torch.Tensor, held_out: torch.Tensor, steps: int, work: Path) -> tuple[GPTModel, dict[str, Any]]:
    """Train for ``steps`` steps, going on from ``work/state.pt`` when there is one."""
    model = new_model().train()
    opts = optimizers(model)
    first_rates = [group["lr"] for opt in opts for group in opt.param_groups]
    state_path, step, seconds = work / "state.pt", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
    length, since, loss_sum = CONFIG["context_length"], time.monotonic(), 0.0
    while step < steps:
        rng = np.random.default_rng([SEED, step])  # a step's data and dropout depend on its number alone
        torch.manual_seed(SEED + step)
        starts = rng.integers(0, len(tokens) - length - 1, BATCH)
        batch = torch.stack([tokens[start : start + length + 1] for start in starts])
        factor = min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))
        for group, rate in zip((g for o in opts for g in o.param_groups), first_rates, strict=True):
            group["lr"] = rate * factor
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step, loss_sum = step + 1, loss_sum + loss.item()
        if step % 50 == 0 or step == steps:
            seconds, since = seconds + time.monotonic() - since, time.monotonic()
            report = f"held out {held_out_loss(model, held_out):.4f}" if step % 200 == 0 or step == steps else ""
            print(f"step {step}/{steps}  loss {loss_sum / 50:.4f}  {report}  {seconds:.0f} s", flush=True)
            loss_sum = 0.0
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
            torch.save({**state, "step": step, "seconds": seconds}, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)
    figures = {"steps": steps, "seconds": round(seconds), "held_out_loss": held_out_loss(model, held_out)}
    return model.eval(), figures


def hugging_face_tensors(model: GPTModel) -> dict[str, torch.Tensor]:
    """The model's weights in fp16 under Hugging Face's GPT-2 names; its Conv1D weights are [in, out]."""
    named = {"wte.weight": model.tok_emb.weight, "wpe.weight": model.pos_emb.weight}
    named |= {"ln_f.weight": model.final_norm.scale, "ln_f.bias": model.final_norm.shift}
    for i, block in enumerate(model.trf_blocks):
        att, ff = block.att, block.ff.layers
        qkv = (att.W_query, att.W_key, att.W_value)
        named |= {
            f"h.{i}.ln_1.weight": block.norm1.scale,
            f"h.{i}.ln_1.bias": block.norm1.shift,
            f"h.{i}.attn.c_attn.weight": torch.cat([linear.weight for linear in qkv]).T,
            f"h.{i}.attn.c_attn.bias": torch.cat([linear.bias for linear in qkv]),
            f"h.{i}.attn.c_proj.weight": att.out_proj.weight.T,
            f"h.{i}.attn.c_proj.bias": att.out_proj.bias,
            f"h.{i}.ln_2.weight": block.norm2.scale,
            f"h.{i}.ln_2.bias": block.norm2.shift,
            f"h.{i}.mlp.c_fc.weight": ff[0].weight.T,
            f"h.{i}.mlp.c_fc.bias": ff[0].bias,
            f"h.{i}.mlp.c_proj.weight": ff[2].weight.T,
            f"h.{i}.mlp.c_proj.bias": ff[2].bias,
        }
    return {f"transformer.{name}": tensor.detach().half().contiguous() for name, tensor in named.items()}


def save(model: GPTModel, ranks: dict[bytes, int], figures: dict[str, Any], out: Path) -> None:
    """Write the folder that ``LLM()`` loads."""
    out.mkdir(parents=True, exist_ok=True)
    end = CONFIG["vocab_size"] - 1
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": CONFIG["vocab_size"],
        "n_positions": CONFIG["context_length"],
        "n_embd": CONFIG["embed_dim"],
        "n_head": CONFIG["n_heads"],
        "n_layer": CONFIG["n_layers"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (out / "tokenizer.tiktoken").write_text("".join(lines))
    save_file(hugging_face_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the unpacked Debian package, or a folder of .txt")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where the run keeps its state")
    parser.add_argument("--out", type=Path, default=Path("engine/data/demo"), help="the folder to write the model to")
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    MultiHeadAttention.forward = attention_for_training  # type: ignore[method-assign]
    LayerNorm.forward = norm_for_training  # type: ignore[method-assign]

    books = read_books(args.corpus)
    cuts = [round(len(book) * (1 - HELD_OUT)) for book in books]
    ranks = train_ranks([book[:cut] for book, cut in zip(books, cuts, strict=True)], CONFIG["vocab_size"] - 1)
    encoding = tiktoken.Encoding("demo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    end = [CONFIG["vocab_size"] - 1]
    train_ids = [i for book, cut in zip(books, cuts, strict=True) for i in end + encoding.encode_ordinary(book[:cut])]
    test_ids = [i for book, cut in zip(books, cuts, strict=True) for i in end + encoding.encode_ordinary(book[cut:])]
    print(f"{len(books)} books, {len(train_ids)} tokens to train on, {len(test_ids)} held out", flush=True)
    model, figures = train(torch.tensor(train_ids), torch.tensor(test_ids), args.steps, args.work)
    figures |= {
        "corpus": "Debian r-cran-janeaustenr 1.0.0: Jane Austen's six novels",
        "seed": SEED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train_ids),
        "held_out_tokens": len(test_ids),
        "held_out_bytes_per_token": len("".join(b[c:] for b, c in zip(books, cuts, strict=True)).encode())
        / len(test_ids),
        "tokens_seen": args.steps * BATCH * CONFIG["context_length"],
    }
    save(model, ranks, figures, args.out)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
