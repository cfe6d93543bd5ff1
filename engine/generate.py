"""``python -m engine.generate "prompt"``: text from a model, as it comes."""

import argparse
import sys
import time

from engine.cli import add_fields, add_model_options, chosen, model_options, run
from engine.llm import LLM
from engine.messages import SamplingParams

COMMAND = "python -m engine.generate"
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos")
EXAMPLES = """examples:
  python -m engine.generate "It was a truth"                         the demo model
  python -m engine.generate "Once" --temperature 0                   greedy
  python -m engine.generate "Once" --temperature 0.8 --top-p 0.95 --seed 7 --max-tokens 200
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
    """Stream a continuation to standard output, and the speed to standard error."""
    args = parser().parse_args()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    params = SamplingParams(**chosen(args, SamplingParams, SAMPLING))
    llm = LLM(**model_options(args))
    started = time.perf_counter()
    request = llm.submit(prompt, params)
    print(prompt, end="", flush=True)
    first = 0.0
    while not request.finished:
        llm.step()
        first = first or time.perf_counter() - started
        print(request.take_text(), end="", flush=True)
    seconds = time.perf_counter() - started
    output = request.output()
    count = len(output.outputs[0].token_ids)
    print(flush=True)
    print(
        f"[{len(output.prompt_token_ids)} + {count} tokens, {count / seconds:.1f} tokens/s, first after "
        f"{first * 1e3:.0f} ms, finished by {output.outputs[0].finish_reason}, seed {output.seed}]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(COMMAND, main)
