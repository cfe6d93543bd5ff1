"""``--plan``: an estimate from counted bytes and published rates, which says that it is one."""

import json

import pytest
from test_command_lines import run

from engine.bench.__main__ import main
from engine.bench.plan import CARDS, SECONDS_FROM_PYTHON, SECONDS_IN_GRAPH, estimate
from engine.bench.presets import PRESETS, preset_config

GPT2 = preset_config("gpt2")


def test_a_decode_step_is_its_bytes_over_the_bandwidth() -> None:
    found = estimate(GPT2, CARDS["h100"], [(511, 1)])
    weights = 2 * (GPT2.num_parameters - GPT2.context_length * GPT2.embed_dim)
    cache = 2 * GPT2.n_layers * 2 * 512 * GPT2.embed_dim
    assert weights + cache < found.bytes < 1.05 * (weights + cache)
    assert found.floor == pytest.approx(found.bytes / 3.35e12)
    assert found.launches == 2 + 5 * GPT2.n_layers
    assert found.in_graph == pytest.approx(found.floor + 62 * SECONDS_IN_GRAPH)
    assert found.from_python == pytest.approx(62 * SECONDS_FROM_PYTHON)  # longer than the card takes
    numbers = found.numbers()
    assert numbers["launch_share_in_graph"] == pytest.approx(62 * SECONDS_IN_GRAPH / found.in_graph)
    assert numbers["tokens_per_second_from_python"] == pytest.approx(1 / (62 * SECONDS_FROM_PYTHON))


def test_prefill_is_arithmetic() -> None:
    card, length = CARDS["l4"], 1024
    found = estimate(GPT2, card, [(0, length)])
    linears = 2 * length * GPT2.n_layers * (4 * 768 * 768 + 2 * 768 * 3072)
    assert linears < found.flops < 1.25 * linears  # attention, and the head of one row
    assert found.flops / card.half < found.floor < found.flops / card.half + found.bytes / card.bandwidth
    assert found.from_python == found.in_graph  # Python queues faster than the card works
    assert card.float32 == pytest.approx(20e12)
    assert estimate(GPT2, card, [(0, length)], "float32").floor > found.flops / card.float32 > 2 * found.floor


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 1.9, 2.1), ("int8", 0.5, 0.6), ("int4", 0.25, 0.4)])
def test_lighter_weights_move_fewer_bytes(dtype: str, low: float, high: float) -> None:
    base, other = (estimate(GPT2, CARDS["a100"], [(63, 1)], d) for d in ("bfloat16", dtype))
    assert low < other.bytes / base.bytes < high
    assert other.flops == base.flops


def test_a_larger_model_or_batch_takes_longer() -> None:
    for card in CARDS.values():
        floors = [estimate(preset_config(name), card, [(99, 1)]).floor for name in PRESETS]
        assert floors == sorted(floors)
        floors = [estimate(GPT2, card, [(99, 1)] * batch).floor for batch in (1, 16, 256)]
        assert floors == sorted(floors)
    with pytest.raises(ValueError, match="no dtype 'float64'"):
        estimate(GPT2, CARDS["l4"], [(99, 1)], "float64")


@pytest.mark.slow
def test_command_line() -> None:
    done = run("engine.bench", "--plan", "rtx4090", "--preset", "gpt2-medium", "--dtype", "int8", "--batch", "1,256")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ESTIMATE, not a measurement: gpt2-medium, int8 weights, bfloat16 activations")
    assert "estimated decode step, 160 positions each" in done.stdout
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["estimate"] is True
    assert [step["sequences"] for step in document["decode"]] == [1, 256]
    assert [step["tokens"] for step in document["prefill"]] == [128, 512, 1024]
    assert document["decode"][0]["tokens_per_second_in_graph"] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x.pth"], "--plan and --model exclude each other"),
        (["--dtype", "float64"], "--plan has no dtype 'float64'"),
        (["--plot", "x.png"], "--plan measures nothing and has no use for --plot; it reads --batch, --dtype"),
        (["--quick", "--threads", "2"], "no use for --quick, --threads"),
        (["--prompt-len", "2000"], "do not fit a context of 1024"),
    ],
)
def test_command_line_refuses(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--plan", "h100", *arguments])
    with pytest.raises(ValueError, match=message):
        main()
