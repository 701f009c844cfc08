"""The sections of gpu.py. Each prints its figures as JSON lines, in a process of its own."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_model import NOMINAL, random_lengths

if TYPE_CHECKING:
    from millicent.engine.cuda.ahead import AheadRunner
    from millicent.engine.weights import ModelSpec

ROOT = Path(__file__).parent.parent
CEILINGS = "GPU_CEILINGS"  # names the file in which they go from section to section of one run


@dataclass(frozen=True)
class Settings:
    rehearsal: bool
    usd_per_hour: str

    def sized(self, real: int, tiny: int) -> int:
        return tiny if self.rehearsal else real

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @cached_property
    def ceilings(self) -> dict[str, float]:
        try:
            found: dict[str, float] = json.loads(Path(os.environ[CEILINGS]).read_text())
        except (KeyError, OSError):
            return NOMINAL  # only where they couldn't be measured
        return NOMINAL | found

    def shape(self, name: str) -> ModelSpec:
        from support import random_weights

        if self.rehearsal:
            return random_weights.spec(layers=1, heads=2, kv_heads=1)
        found: ModelSpec = getattr(random_weights, name)
        return found


def tell(figure: str, value: float, unit: str, **more: Any) -> None:
    shown = round(value) if abs(value) >= 1000 else float(f"{value:.4g}")
    print(json.dumps({"figure": figure, "value": shown, "unit": unit, **more}), flush=True)


def seconds(settings: Settings, *runs: Callable[[], object], repeats: int = 10) -> float:
    """The median time of one of `runs`, which do the same, each in memory of its own where a cache would serve it. They
    are played from a graph: what the host takes to launch them isn't counted."""
    import torch

    if settings.rehearsal:
        start = time.perf_counter()
        runs[0]()
        return time.perf_counter() - start
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(3 + repeats)]
    for first, last in pairs:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return float(statistics.median(first.elapsed_time(last) for first, last in pairs[3:])) / 1000 / len(runs)


def copies(settings: Settings, nbytes: int) -> range:
    """As many as don't fit into the chip's cache together."""
    return range(1 if settings.rehearsal else max(1, min(64, -(-(256 << 20) // nbytes))))


# What the machine can do.


def machine(settings: Settings) -> None:
    import torch

    versions: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if not settings.rehearsal:
        import triton

        properties = torch.cuda.get_device_properties(0)
        versions |= {"triton": triton.__version__, "gpu": properties.name, "memory": properties.total_memory}
    print(json.dumps({"versions": versions}), flush=True)
    count = settings.sized(1 << 30, 1 << 20)
    source = torch.randn(count, device=settings.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds(settings, partial(target.copy_, source))
    tell("copy, bytes read and written", copied / 1e12, "TB/s")
    read = source.nbytes / seconds(settings, partial(torch.amax, source.view(settings.sized(4096, 16), -1), dim=1))
    tell("read", read / 1e12, "TB/s")
    del source, target
    side = settings.sized(8192, 64)
    left, right = (torch.randn(side, side, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * side**3 / seconds(settings, lambda: left @ right)
    tell("matrix product, bf16", bf16 / 1e12, "TFLOP/s")
    found = {"bytes_per_s": max(copied, read), "bf16_flops": bf16}
    keep(settings, found)
    small = torch.zeros(64, device=settings.device)
    tell("floor of a graph's node", seconds(settings, *[lambda: small.add_(1)] * 300) * 1e6, "us")
    scale = torch.ones(side, 1, device=settings.device)
    left8, right8 = (each.to(torch.float8_e4m3fn) for each in (left, right))
    multiply = partial(
        torch._scaled_mm,  # noqa: SLF001 - private in name, and the only door to it
        scale_a=scale,
        scale_b=scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    fp8 = 2 * side**3 / seconds(settings, lambda: multiply(left8, right8.t()))
    tell("matrix product, fp8 with a scale for each row and column", fp8 / 1e12, "TFLOP/s")
    keep(settings, found | {"fp8_flops": fp8})


def keep(settings: Settings, ceilings: dict[str, float]) -> None:
    if not settings.rehearsal:
        Path(os.environ[CEILINGS]).write_text(json.dumps(ceilings))


# Is it right?


def tests(settings: Settings) -> None:
    """Those that need a GPU."""
    run_tests("tests/engine_cuda/" + ("test_ahead_runner.py" if settings.rehearsal else "test_on_device.py"))


def kernel_tests(settings: Settings) -> None:
    """Those that run on a processor too, several at a time: the more so as each shape is compiled first."""
    import importlib.util

    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    chosen = "tests/engine_cuda/test_device_passes.py" if settings.rehearsal else "tests/engine_cuda"
    run_tests(chosen, "--ignore=tests/engine_cuda/test_on_device.py", *several)


def run_tests(*chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *chosen]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  ")) or " in " in line]
    print(json.dumps({"tests": lines[-40:]}), flush=True)
    if done.returncode:
        raise SystemExit(f"tests failed: {done.stdout[-600:]} {done.stderr[-300:]}")


def logits(settings: Settings) -> None:
    """A few layers of each shape, in each precision, beside float64 on the processor."""
    from dataclasses import replace

    import msgspec

    from support.device_decoders import CONFIG, errors, mixed_passes, on_device
    from support.random_weights import KeptCheckpoint

    for name in ("QWEN3_0_6B", "LLAMA_3_1_8B"):
        shape = replace(
            settings.shape(name), layers=1 if settings.rehearsal else 2, vocabulary=1024, context_tokens=512
        )
        checkpoint = KeptCheckpoint(shape)
        config = msgspec.structs.replace(CONFIG, step_tokens=settings.sized(64, 16))
        for label, dtype, fp8 in (("fp32", "fp32", False), ("bf16", "bf16", False), ("fp8", "bf16", True)):
            if settings.rehearsal and dtype == "bf16":
                continue  # the interpreter multiplies bfloat16 wrongly
            model = on_device(checkpoint, config, dtype=dtype, fp8=fp8)  # type: ignore[arg-type]
            worst = max(errors(model, checkpoint, mixed_passes(shape.vocabulary), config))
            tell(f"{name} {label}: logits off float64's, relative", worst, "")
            limit = {"fp32": 1e-4, "bf16": 3e-2, "fp8": 0.15}[label]
            if not worst < limit:
                raise SystemExit(f"{name} {label}: {worst} is more than {limit}")
            del model


# How fast?


@dataclass
class Offline:
    """What a run of the engine, without the gateway, came to."""

    wall_s: float
    output_tokens: int
    steps: int
    device_s: float
    first_s: float

    @property
    def rate(self) -> float:
        return self.output_tokens / self.wall_s


class _Silent:
    """Tokens become no text: what is measured is the engine."""

    stop = ""

    def __init__(self, stops: object) -> None:
        del stops

    def push(self, token: int, *, heed_stops: bool = True) -> str:
        del token, heed_stops
        return ""

    def finish(self) -> str:
        return ""


def runner(settings: Settings, name: str, *, fp8: bool, max_sequences: int, step_tokens: int = 2048) -> AheadRunner:
    import torch

    from millicent.engine.config import EngineConfig
    from millicent.engine.cuda.ahead import AheadRunner
    from millicent.engine.cuda.device import open_device
    from millicent.engine.cuda.opening import open_decoder
    from millicent.engine.runner import OpenModel
    from support.random_weights import RandomCheckpoint

    config = EngineConfig(
        device="cuda:0", max_sequences=max_sequences, step_tokens=settings.sized(step_tokens, 16), prefix_cache="off"
    )
    start = time.perf_counter()
    device = open_device("cuda:0")
    checkpoint = RandomCheckpoint(settings.shape(name), device=settings.device)
    with torch.inference_mode():
        model = open_decoder(
            checkpoint, device, config, name=name, dtype="fp32" if settings.rehearsal else "bf16", fp8=fp8,
            eos_tokens=frozenset(),
        )  # fmt: skip
    opened = OpenModel(model, frozenset(), _Silent)
    room = device.budget_bytes(config) - model.working_bytes
    wanted = max_sequences * settings.sized(2560, 40) // config.block_tokens
    blocks = min(wanted, int(room * 0.9) // (config.block_tokens * model.kv_bytes_per_token))
    found = AheadRunner(model, opened, config, blocks=blocks, wake=lambda: None)
    tell(f"{name}{' fp8' if fp8 else ''}: weights", model.weight_bytes / 1e9, "GB")
    tell(f"{name}{' fp8' if fp8 else ''}: loading, compiling and recording", time.perf_counter() - start, "s")
    return found


def offline(subject: AheadRunner, vocabulary: int, lengths: list[tuple[int, int]], seed: int) -> Offline:
    from millicent.core.clock import SystemClock
    from millicent.core.request import Limits, Sampling
    from millicent.engine.protocol import Submit

    draw = random.Random(seed)
    for number, (given, made) in enumerate(lengths):
        prompt = tuple(draw.randrange(vocabulary) for _ in range(given))
        limits = Limits(max_tokens=made, ignore_eos=True)
        refused = subject.submit(Submit(seed * 10**6 + number, "", prompt, Sampling(temperature=0), limits))
        assert refused is None, refused
    clock = SystemClock()
    start_ns, device_ns, steps, tokens, first_ns = clock.monotonic_ns(), 0, 0, 0, 0
    while subject.busy:
        step = subject.step("cuda:0", steps, clock, ahead=True)
        steps += 1
        device_ns += step.record.wall_ns if step.record else 0
        tokens += sum(output.tokens for output in step.outputs)
        first_ns = first_ns or (clock.monotonic_ns() - start_ns if tokens else 0)
        assert not any(output.error for output in step.outputs), step.outputs
    wall_s = (clock.monotonic_ns() - start_ns) / 1e9
    assert tokens == sum(made for _, made in lengths)
    return Offline(wall_s, tokens, steps, device_ns / 1e9, first_ns / 1e9)


def floor_s(settings: Settings, shape: ModelSpec, lengths: list[tuple[int, int]], batch: int, *, fp8: bool) -> float:
    """Bytes over the rate of memory, plus operations of the prompts over that of the matrix units: weights once per
    step of `batch` sequences, every token's context once, every prompt's rows multiplied."""
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    inner = shape.heads * shape.head_dim
    layer = shape.hidden * (2 * inner + 2 * shape.kv_heads * shape.head_dim + 3 * shape.intermediate)
    layers, head = shape.layers * layer, shape.vocabulary * shape.hidden
    weights = layers * (1 if fp8 else 2) + head * 2
    made = sum(output for _, output in lengths)
    context = sum(given * output + output * (output + 1) // 2 for given, output in lengths)
    rates = settings.ceilings
    reading = (made / batch * weights + context * kv) / rates["bytes_per_s"]
    multiplying = 2 * layers * sum(given for given, _ in lengths) / rates["fp8_flops" if fp8 else "bf16_flops"]
    return reading + multiplying


def measure(
    settings: Settings, name: str, label: str, lengths: list[tuple[int, int]], *, fp8: bool, batch: int, target: int
) -> None:
    subject = runner(settings, name, fp8=fp8, max_sequences=batch)
    vocabulary = settings.shape(name).vocabulary
    offline(subject, vocabulary, lengths[: max(1, len(lengths) // 8)], seed=1)  # warms up
    found = offline(subject, vocabulary, lengths, seed=2)
    floor = floor_s(settings, settings.shape(name), lengths, batch, fp8=fp8)
    tell(label, found.rate, "tokens/s", share=round(floor / found.wall_s, 4), target=target)
    tell(f"{label}: a step", found.device_s / found.steps * 1e6, "us", steps=found.steps)
    tell(f"{label}: records' share of the time that passed", found.device_s / found.wall_s, "")
    tell(f"{label}: first token", found.first_s * 1000, "ms")


def qwen_single(settings: Settings) -> None:
    lengths = [(settings.sized(128, 6), settings.sized(512, 5))]
    measure(
        settings, "QWEN3_0_6B", "Qwen3-0.6B bf16, batch 1, 128 in 512 out", lengths, fp8=False, batch=1, target=1200
    )


def lengths_of_many(settings: Settings) -> list[tuple[int, int]]:
    return random_lengths(2, 6, 3) if settings.rehearsal else random_lengths()


def qwen_many(settings: Settings) -> None:
    label = "Qwen3-0.6B bf16, 256 requests of 100 to 1,024 in and out"
    batch = settings.sized(256, 3)
    measure(settings, "QWEN3_0_6B", label, lengths_of_many(settings), fp8=False, batch=batch, target=30_000)


def llama_single(settings: Settings) -> None:
    lengths = [(settings.sized(128, 6), settings.sized(256, 3))]
    for label, fp8, target in (("bf16", False, 240), ("FP8", True, 420)):
        measure(settings, "LLAMA_3_1_8B", f"Llama-3.1-8B {label}, batch 1", lengths, fp8=fp8, batch=1, target=target)


def llama_many(settings: Settings) -> None:
    lengths = [(settings.sized(128, 4), settings.sized(128, 3))] * settings.sized(1024, 3)
    label = "Llama-3.1-8B FP8, 128 in 128 out, offline"
    batch = settings.sized(512, 3)
    measure(settings, "LLAMA_3_1_8B", label, lengths, fp8=True, batch=batch, target=20_000)


def host(settings: Settings) -> None:
    """What a step costs the host: hidden while the device's takes longer."""
    import gpu_host

    del settings
    for sequences, temperature, label in ((1, 0.0, "greedy"), (256, 0.0, "greedy"), (256, 1.0, "drawn")):
        tell(f"host's part of a step, {sequences} sequences, {label}", gpu_host.step_ms(sequences, temperature), "ms")


# Kernel by kernel.


def attention(settings: Settings) -> None:
    import gpu_kernels

    gpu_kernels.attention(settings)


def linears(settings: Settings) -> None:
    import gpu_kernels

    gpu_kernels.linears(settings)


def profile(settings: Settings) -> None:
    """Where a step's time goes, kernel by kernel."""
    import gpu_kernels

    for name, fp8, sequences in (("QWEN3_0_6B", False, 1), ("QWEN3_0_6B", False, 256), ("LLAMA_3_1_8B", True, 1)):
        count = settings.sized(sequences, min(sequences, 2))
        subject = runner(settings, name, fp8=fp8, max_sequences=count)
        gpu_kernels.profile(settings, f"{name}{' fp8' if fp8 else ''}, {sequences} sequences", subject, count)
        del subject


def expected(settings: Settings) -> None:
    """What is to be measured, foretold from counts and from the ceilings that section `machine` found."""
    import gpu_model

    for label, rate, target in gpu_model.expected(settings.ceilings):
        tell(f"expected: {label}", rate, "tokens/s", target=target)


def transformers(settings: Settings) -> None:
    """The same shapes and lengths in `transformers`' continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    auto: Any = AutoModelForCausalLM
    generation: Any = GenerationConfig

    shape = settings.shape("QWEN3_0_6B")
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=True,
    )
    model = auto.from_config(config, dtype=torch.bfloat16).to(settings.device).eval()
    for label, lengths in (
        ("batch 1, 128 in 512 out", [(settings.sized(128, 6), settings.sized(512, 5))]),
        ("256 requests of 100 to 1,024 in and out", lengths_of_many(settings)),
    ):
        each = round(statistics.mean(made for _, made in lengths))  # it takes one length for all: as much work, no tail
        wanted = generation(max_new_tokens=each, eos_token_id=-1, pad_token_id=0, do_sample=False)
        prompts = [
            [random.Random(i).randrange(shape.vocabulary) for _ in range(given)] for i, (given, _) in enumerate(lengths)
        ]
        start = time.perf_counter()
        with torch.no_grad():
            found = model.generate_batch(inputs=prompts, generation_config=wanted, progress_bar=False)
        wall = time.perf_counter() - start
        made = sum(len(answer.generated_tokens) for answer in found.values())
        assert made == each * len(lengths), f"{made} tokens came of {each * len(lengths)}"
        tell(f"transformers' continuous batching, {label} (each the mean)", made / wall, "tokens/s")


def http(settings: Settings) -> None:
    import gpu_served

    gpu_served.measure(settings)


def _each() -> Iterator[tuple[str, Callable[[Settings], None]]]:
    sections = (
        machine,
        host,
        tests,
        kernel_tests,
        logits,
        qwen_single,
        qwen_many,
        llama_single,
        llama_many,
        http,
        attention,
        linears,
        profile,
        expected,
        transformers,
    )
    for section in sections:
        yield section.__name__, section


SECTIONS = dict(_each())
