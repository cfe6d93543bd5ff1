"""``python -m engine.generate "prompt"``: text from a model, as it comes."""

import argparse
import sys
import time

from engine.cli import add_fields, add_model_options, chosen, model_options, run
from engine.llm import LLM
from engine.messages import RequestOutput, SamplingParams

COMMAND = "python -m engine.generate"
SAMPLING = (  # logprobs and what is given by token ids are for programs
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "include_stop_str_in_output",
    "ignore_eos",
)
EXAMPLES = """examples:
  python -m engine.generate "It was a truth"                         the demo model
  python -m engine.generate "Once" --temperature 0                   greedy
  python -m engine.generate "Once" --temperature 0.8 --top-p 0.95 --seed 7 --max-tokens 200
  python -m engine.generate "Once" --n 3 --stop . --stop "!"         three samples, each a sentence
  python -m engine.generate "Once" --max-tokens none                 up to the context length
  python -m engine.generate "Hello" --model gpt2                     from the hub, when online
  python -m engine.generate "Hello" --model model.pth --config '{"n_heads": 12}'
  echo "A long prompt" | python -m engine.generate -
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("prompt", help="the text to go on from; - reads it from standard input")
    add_fields(made.add_argument_group("sampling"), SamplingParams, SAMPLING)
    made.set_defaults(max_tokens=100)
    add_model_options(made)
    return made


def main() -> None:
    """Stream a continuation to standard output, or print several when all are there; the speed to standard error."""
    args = parser().parse_args()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    params = SamplingParams(**chosen(args, SamplingParams, SAMPLING))
    llm = LLM(**model_options(args))
    started = time.perf_counter()
    request = llm.submit(prompt, params)
    if params.n == 1:
        print(prompt, end="", flush=True)
    first = 0.0
    while not request.finished:
        llm.step()
        first = first or time.perf_counter() - started
        if params.n == 1:
            print(request.take_text(), end="", flush=True)
    seconds = time.perf_counter() - started
    if params.n == 1:
        print(flush=True)
    else:
        _print_samples(prompt, request.output())
    if request.error:
        raise ValueError(request.error)
    _print_speed(request.output(), first, seconds)


def _print_samples(prompt: str, output: RequestOutput) -> None:
    """Every sample after a line with its number."""
    for sample in output.outputs:
        print(f"--- {sample.index + 1} of {len(output.outputs)}", f"{prompt}{sample.text}", sep="\n", flush=True)


def _print_speed(output: RequestOutput, first: float, seconds: float) -> None:
    count = sum(len(sample.token_ids) for sample in output.outputs)
    reasons = ", ".join(str(sample.finish_reason) for sample in output.outputs)
    print(
        f"[{len(output.prompt_token_ids)} + {count} tokens, {count / seconds:.1f} tokens/s, first after "
        f"{first * 1e3:.0f} ms, finished by {reasons}, seed {output.seed}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(COMMAND, main)
