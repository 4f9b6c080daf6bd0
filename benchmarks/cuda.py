"""This runner on one GPU, beside what the GPU can do and Hugging Face transformers: one command, under 8 minutes.

python cuda.py              # Llama-2-7B's shape, random weights made on the device
python cuda.py --tiny       # a tiny model, and few of the sizes, on a CPU: whether this script works

First the paths are checked against the float32 reference of the tests. Then bandwidth and matrix products are measured,
and what a step is compared with is the greater of the times that its bytes and its products take at those rates.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fire
import torch
from models import VOCABULARY
from report import header, table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference
from checkpoints import random_weights, save

from llama import Llama, SamplingParams, parallel
from llama.checkpoint import memory
from llama.checkpoint.find import DEMO
from llama.checkpoint.layout import format_of, stored_names
from llama.engine.decode_loop import as_it_is
from llama.engine.engine import Engine
from llama.kernels.quantized import can_pack, pack
from llama.model.step import Step
from llama.model.transformer import ModelArgs, Transformer
from llama.quantization.quantize import DEQUANTIZE, QUANTIZE
from llama.request import Request

SEVEN_B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5}
TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
CHECKED = {
    "dim": 512,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 64,
    "norm_eps": 1e-5,
}  # heads of 128
KINDS = {"bf16": {}, "int8": {"quantize": "int8"}, "int4": {"quantize": "int4"}, "fp8 cache": {"kv_dtype": "fp8"}}
MOST_ERROR = {"bf16": 0.02, "int8": 0.03, "int4": 0.03, "fp8 cache": 0.1}  # of logits; int8 and int4: as dequantised
STEPS = 32  # that are timed, three times over
WARM = 16  # before them: graphs are captured in these
GOALS = {("bf16", 1): 0.9, ("bf16", 32): 0.75, ("int8", 1): 0.8, ("int4", 1): 0.7}  # of the limit, by batch
PREFILL_GOAL, REQUESTS_GOAL = 0.7, 3  # of the limit; times transformers' tokens/s
Size = tuple[int, int]  # batch, context


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    shape: dict
    decode: dict[str, list[Size]]  # by kind
    prompt: int
    requests: int
    lengths: tuple[int, int]
    slots: int
    copied: int  # bytes
    product: int  # n of n × n


FULL = Sizes(
    SEVEN_B,
    {
        "bf16": [(batch, context) for context in (128, 1024, 3900) for batch in (1, 8, 32, 128)],
        "int8": [(1, 128), (1, 1024), (32, 1024)],
        "int4": [(1, 128), (1, 1024), (32, 1024)],
        "fp8 cache": [(32, 3900), (128, 1024)],
    },
    2048, 256, (100, 1024), 64, 1 << 31, 8192,
)  # fmt: skip
SMALL = Sizes(TINY, {kind: [(1, 8), (2, 20)] for kind in KINDS}, 64, 6, (4, 12), 3, 1 << 22, 256)


# ------------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Rates:
    bandwidth: float  # bytes/s read and written by a copy
    products: float  # FLOP/s of a bf16 matrix product

    def limit(self, size: float, flops: float) -> float:
        """The least seconds for so many bytes and floating-point operations."""
        return max(size / self.bandwidth, flops / self.products)


def seconds(device: torch.device, work: Callable[[], object], repeats: int = 10) -> float:
    """The median time of a call on the device."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        begun = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device, sizes: Sizes) -> Rates:
    a, b = (torch.empty(sizes.copied // 2, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    copied = seconds(device, lambda: a.copy_(b))
    x, y = (torch.randn(sizes.product, sizes.product, device=device).bfloat16() for _ in range(2))
    return Rates(2 * b.nbytes / copied, 2 * sizes.product**3 / seconds(device, lambda: x @ y))


# ------------------------------------------------------------------------------------------------- the checks


def check(device: torch.device) -> list[list[str]]:
    """Relative errors of logits against the float32 reference, over a prompt in chunks and single tokens after it."""
    params = {**CHECKED, "vocab_size": 1024}
    weights = {name: tensor.float() for name, tensor in random_weights(params, torch.bfloat16).items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), params, {name: tensor.bfloat16() for name, tensor in weights.items()})
        for kind, options in KINDS.items():
            llama = Llama.build(
                folder, str(DEMO / "tokenizer.model"), 256, 4, device=device, dtype="bfloat16", **options
            )
            found, tokens = chunks_and_singles(llama)
            held = {name: as_held(name, tensor, options.get("quantize")) for name, tensor in weights.items()}
            expected = reference.forward(held, params, tokens)[-len(found) :]
            error = ((found - expected).norm() / expected.norm()).item()
            assert error < MOST_ERROR[kind], f"{kind}: the logits are off by {error:.3f}"
            rows.append([kind, f"{error:.4f}", f"{MOST_ERROR[kind]}", graphs_agree(llama)])
    return rows


def as_held(name: str, weight: torch.Tensor, quantize: str | None) -> torch.Tensor:
    """A parameter as the quantised model has it."""
    form = format_of(name, quantize)
    return DEQUANTIZE[form](*QUANTIZE[form](weight)) if form else weight


def chunks_and_singles(llama: Llama) -> tuple[torch.Tensor, list[int]]:
    """The logits (9, vocab) of a prompt's last token and 8 after it, and all the tokens; 5 beside another sequence."""
    tokens = torch.randint(3, 1024, (108,), generator=torch.Generator().manual_seed(0)).tolist()
    model, cache, device = llama.model, llama.engine.cache, llama.model.device
    model(Step.pack([(2, 0, tokens[:60]), (0, 0, tokens[:7])], [], device), cache)
    rows = [model(Step.pack([(2, 60, tokens[60:100]), (0, 7, [5])], [39], device), cache)[0]]
    for at in range(100, 105):
        rows.append(model(Step.pack([(2, at, [tokens[at]]), (0, at - 92, [5])], [0, 1], device), cache)[0])
    for at in range(105, 108):
        rows.append(model(Step.pack([(2, at, [tokens[at]])], [0], device), cache)[0])
    return torch.stack(rows).cpu(), tokens


def graphs_agree(llama: Llama) -> str:
    """Whether steps from CUDA graphs give the tokens and the cache that the same steps give without; bit by bit."""
    if llama.engine.loop is None:
        return "no graphs here"
    for lengths in ((5, 9, 70), (7,)):
        found = []
        for capture in (llama.engine.loop._capture, as_it_is):
            engine = Engine(llama.model, 4, 256, 64)
            engine.loop._capture = capture
            tokens = [r.tokens for r in run(engine, [([7] * n, 60, 0.8) for n in lengths])]
            held = [t[:, : len(lengths), :64].contiguous().view(torch.uint8) for t in engine.cache.keys]
            found.append((tokens, held))
        (tokens, keys), (other_tokens, other_keys) = found
        same = tokens == other_tokens and all(a.equal(b) for a, b in zip(keys, other_keys, strict=True))
        assert same, "a CUDA graph computes something else"
    return "equal"


# ------------------------------------------------------------------------------------------------- this runner


def random_model(
    shape: dict, device: torch.device, quantize: str | None = None, kv_dtype: str | None = None
) -> Transformer:
    """A model of random weights, made and quantised on the device."""
    model = Transformer(ModelArgs(**shape, vocab_size=VOCABULARY), weight_format=quantize, kv_dtype=kv_dtype)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        if weight.dim() == 2:
            weight.normal_(0, weight.shape[1] ** -0.5)
            if form := format_of(stored_names(name)[0], quantize):
                weight, module.scales = QUANTIZE[form](weight)
            if hasattr(module, "scales") and can_pack(weight, torch.bfloat16):
                weight, module.scales = pack(weight, module.scales)
        setattr(module, leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()


def run(engine: Engine, wanted: list[tuple[list[int], int, float]]) -> list[Request]:
    """Run requests (prompt, new tokens, temperature) to their end."""
    requests = make_requests(wanted)
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    return requests


def make_requests(wanted: list[tuple[list[int], int, float]]) -> list[Request]:
    return [
        Request(prompt, SamplingParams(temperature=temperature, max_gen_len=new), seed, frozenset())
        for seed, (prompt, new, temperature) in enumerate(wanted)
    ]


def random_prompt(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(n)]


def extra_tokens(batch: int, context: int) -> int:
    """How far `decoding` may get: while the last prompts are computed, the first sequences grow."""
    return WARM + 4 * STEPS + batch * context // memory.STEP_TOKENS + batch + 2


@contextmanager
def decoding(model: Transformer, batch: int, context: int) -> Iterator[Engine]:
    """An engine in which `batch` sequences of about `context` tokens decode, as fast as it gets."""
    extra = extra_tokens(batch, context)
    engine = Engine(model, batch, context + extra, memory.STEP_TOKENS)
    requests = make_requests([(random_prompt(context, seed), extra - 1, 0) for seed in range(batch)])
    for request in requests:
        engine.add(request)
    while any(request.first_token is None for request in requests):
        engine.step()
    for _ in range(WARM):
        engine.step()
    yield engine
    for request in requests:
        engine.finish(request, "cancelled")


def measure_decode(model: Transformer, rates: Rates, size: Size) -> tuple[float, float] | None:
    """Tokens/s, and the most that are possible; None where the cache does not fit."""
    device, args, (batch, context) = model.device, model.params, size
    needed = need_of(model)
    room = memory.free_bytes(device) - needed.workspace
    if needed.cache_per_token * batch * (context + extra_tokens(batch, context)) > room:
        return None
    times = []
    with decoding(model, batch, context) as engine:
        for _ in range(3):
            wait(device)
            begun = time.perf_counter()
            for _ in range(STEPS):
                engine.step()
            wait(device)
            times.append((time.perf_counter() - begun) / STEPS)
        cached = sum(sequence.cached for sequence in engine.scheduler.running) - batch * 3 * STEPS // 2
    read = weights_read(model) + cached * needed.cache_per_token
    return batch / statistics.median(times), batch / rates.limit(read, 2 * matrix_weights(args) * batch)


def decode_rows(kind: str, found: dict[Size, tuple[float, float] | None]) -> list[list[str]]:
    rows = []
    for (batch, context), speed in found.items():
        row = [str(batch), str(context)]
        if speed is None:
            rows.append([*row, "does not fit", "", "", ""])
        else:
            goal = GOALS.get((kind, batch), "")
            rows.append([*row, f"{speed[0]:.0f}", f"{speed[1]:.0f}", f"{speed[0] / speed[1]:.2f}", str(goal)])
    return rows


def need_of(model: Transformer) -> memory.Need:
    """What the model and the cache of each of its tokens take."""
    return memory.need(
        model.params, model.dtype, 1, memory.STEP_TOKENS, weight_format=model.weight_format, kv_dtype=model.kv_dtype
    )


def weights_read(model: Transformer) -> int:
    """Bytes of weights that a step reads: all but the embedding's, of which it reads a few rows."""
    args = model.params
    table_bytes = args.vocab_size * args.dim * model.dtype.itemsize
    return need_of(model).weights - table_bytes


def matrix_weights(args: ModelArgs) -> int:
    """Weights of the matrices that each token is multiplied with."""
    attention = 2 * args.dim * (args.n_heads + args.kv_heads) * args.head_dim
    return args.n_layers * (attention + 3 * args.dim * args.hidden_dim) + args.vocab_size * args.dim


def measure_prefill(model: Transformer, prompt: int) -> float:
    """Seconds from a prompt to its first token."""
    engine = Engine(model, 1, prompt + 1, memory.STEP_TOKENS)

    def first_token() -> None:
        engine.clear_prefix_cache()
        run(engine, [(random_prompt(prompt, 0), 1, 0)])

    return seconds(model.device, first_token, 5)


def prefill_flops(args: ModelArgs, prompt: int) -> int:
    """The products of a prompt's tokens, scores and their sums (half of them masked); but one token's logits."""
    weights = matrix_weights(args) - args.vocab_size * args.dim
    return 2 * weights * prompt + 2 * prompt**2 * args.dim * args.n_layers


def wanted_requests(sizes: Sizes) -> list[tuple[list[int], int, float]]:
    rng = random.Random(0)
    return [
        (random_prompt(rng.randint(*sizes.lengths), i), rng.randint(*sizes.lengths), 0.0) for i in range(sizes.requests)
    ]


def measure_requests(model: Transformer, sizes: Sizes) -> float:
    """New tokens/s of all requests."""
    wanted = wanted_requests(sizes)
    engine = Engine(model, sizes.slots, 2 * sizes.lengths[1], memory.STEP_TOKENS)
    run(engine, [(prompt, min(new, 40), t) for prompt, new, t in wanted[: sizes.slots]])  # compiled and captured once
    engine.clear_prefix_cache()
    wait(model.device)
    begun = time.perf_counter()
    run(engine, wanted)
    return sum(new for _, new, _ in wanted) / (time.perf_counter() - begun)


def requests_limit(model: Transformer, rates: Rates, sizes: Sizes) -> float:
    """The most new tokens/s of all requests: full steps, which read the weights and each sequence's own cache."""
    wanted, args, per_token = wanted_requests(sizes), model.params, need_of(model).cache_per_token
    new = sum(n for _, n, _ in wanted)
    cached = sum(len(prompt) * n + n * n // 2 for prompt, n, _ in wanted)
    read = rates.limit(new / sizes.slots * weights_read(model) + cached * per_token, 2 * matrix_weights(args) * new)
    return new / (read + rates.limit(0, sum(prefill_flops(args, len(prompt)) for prompt, *_ in wanted)))


def count_waits(model: Transformer, batch: int, context: int) -> str:
    """What a profile of decode steps says about the host's waiting for the device."""
    from torch.profiler import ProfilerActivity, profile

    with decoding(model, batch, context) as engine:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
        with profile(activities=kinds) as measured:
            for _ in range(STEPS):
                engine.step()
    calls = {event.key: event.count for event in measured.key_averages() if "ynchronize" in event.key}
    return f"calls that wait for the device in {STEPS} decode steps: {calls or 'none'}"


# ------------------------------------------------------------------------------------------------- transformers


class Peer:
    """Hugging Face transformers: static cache, compiled where it is on CUDA; random weights of the same shape."""

    def __init__(self, shape: dict, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        args = ModelArgs(**shape, vocab_size=VOCABULARY)
        config = LlamaConfig(
            hidden_size=args.dim, intermediate_size=args.hidden_dim, num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads, num_key_value_heads=args.kv_heads, vocab_size=VOCABULARY,
            rms_norm_eps=args.norm_eps, max_position_embeddings=4096, dtype=torch.bfloat16,
        )  # fmt: skip
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        self.device = device

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int, longest: int = 0) -> None:
        """`new` tokens after each prompt, all padded to `longest`, or to the longest of them."""
        longest = longest or max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
            pad_token_id=0, cache_implementation="static",
        )  # fmt: skip
        wait(self.device)

    def decode(self, batch: int, context: int) -> float:
        """Tokens/s: of the second half of a run, since each run records its graphs anew."""
        prompts = [random_prompt(context, seed) for seed in range(batch)]
        self.generate(prompts, 2 * STEPS)  # compiled for the longest cache
        times = []
        for new in (STEPS, 2 * STEPS):
            begun = time.perf_counter()
            self.generate(prompts, new)
            times.append(time.perf_counter() - begun)
        return batch * STEPS / (times[1] - times[0])

    def first_token(self, prompt: int) -> float:
        """Seconds."""
        return seconds(self.device, lambda: self.generate([random_prompt(prompt, 0)], 1), 5)

    def requests(self, sizes: Sizes) -> float:
        """New tokens/s that were wanted, in batches of as many slots as ours: of which one is run, for all are alike.

        Each is padded to the longest prompt and runs to the longest answer; it is compiled before.
        """
        wanted = wanted_requests(sizes)
        batch, longest = [prompt for prompt, *_ in wanted[: sizes.slots]], sizes.lengths[1]
        self.generate(batch, 4, 2 * longest - 4)
        begun = time.perf_counter()
        self.generate(batch, longest, longest)
        batches = -(-len(wanted) // sizes.slots)
        return sum(new for _, new, _ in wanted) / (time.perf_counter() - begun) / batches


# ------------------------------------------------------------------------------------------------- the command


@dataclass
class Found:
    """What this runner reached in bf16."""

    decode: dict[Size, tuple[float, float] | None]
    first_token: float
    requests: float


@torch.inference_mode()
def main(tiny: bool = False, peers: bool = True, minutes: float = 7.5) -> None:
    """Check, measure, print; without `peers` only this runner. After so many minutes no new size of theirs is begun."""
    begun = time.perf_counter()
    if not tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --tiny tries this script on a CPU")
    device, sizes = torch.device("cpu") if tiny else torch.device("cuda", 0), SMALL if tiny else FULL
    parallel.initialize(device, 1)
    print(header())
    print(f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}\n", flush=True)
    print(table(["path", "relative logit error", "at most", "graphs and plain steps"], check(device)), "\n", flush=True)
    rates = measure_rates(device, sizes)
    print(f"copy: {rates.bandwidth / 1e9:.0f} GB/s; bf16 products: {rates.products / 1e12:.2f} TFLOP/s\n", flush=True)
    for kind, options in KINDS.items():
        model = random_model(sizes.shape, device, **options)
        decode = {size: measure_decode(model, rates, size) for size in sizes.decode[kind]}
        print(f"{kind}, decode\n")
        head = ["batch", "context", "tokens/s", "limit", "of the limit", "goal"]
        print(table(head, decode_rows(kind, decode)), "\n", flush=True)
        if kind == "bf16":
            ours = Found(decode, measure_prefill(model, sizes.prompt), measure_requests(model, sizes))
            show_rest(model, rates, sizes, ours)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if peers:
        beside(sizes, device, ours, begun + 60 * minutes)
    print(f"({time.perf_counter() - begun:.0f} s)")


def show_rest(model: Transformer, rates: Rates, sizes: Sizes, ours: Found) -> None:
    """Prefill, waiting, and many requests."""
    taken, limit = ours.first_token, rates.limit(0, prefill_flops(model.params, sizes.prompt))
    head = ["prompt", "tokens/s", "first token (ms)", "limit (ms)", "of the limit", "goal"]
    row = [str(sizes.prompt), f"{sizes.prompt / taken:.0f}", f"{taken * 1e3:.1f}", f"{limit * 1e3:.1f}"]
    print(table(head, [[*row, f"{limit / taken:.2f}", str(PREFILL_GOAL)]]), "\n")
    print(count_waits(model, *sizes.decode["bf16"][1]), "\n")
    most = requests_limit(model, rates, sizes)
    said = f"{ours.requests:.0f} new tokens/s, {ours.requests / most:.2f} of the limit of {most:.0f}"
    print(f"{sizes.requests} requests, {sizes.slots} at once: {said}\n", flush=True)


def beside(sizes: Sizes, device: torch.device, ours: Found, end: float) -> None:
    """What transformers reaches, and our multiple of it."""
    try:
        peer = Peer(sizes.shape, device)
    except ImportError:
        print("transformers is not installed: left out", file=sys.stderr)
        return
    print("transformers, bf16\n")
    taken = peer.first_token(sizes.prompt)
    print(f"first token of {sizes.prompt}: {taken * 1e3:.1f} ms; ours {taken / ours.first_token:.2f} ×\n", flush=True)
    theirs = peer.requests(sizes)
    multiple = f"ours {ours.requests / theirs:.2f} × (goal {REQUESTS_GOAL})"
    print(f"{sizes.requests} requests: {theirs:.0f} new tokens/s; {multiple}\n", flush=True)
    rows = []
    for (batch, context), speed in ours.decode.items():
        if speed and time.perf_counter() < end:
            theirs = peer.decode(batch, context)
            rows.append([str(batch), str(context), f"{theirs:.0f}", f"{speed[0] / theirs:.2f}"])
            print(f"decode of {batch} at {context}: {theirs:.0f} tokens/s", file=sys.stderr, flush=True)
        else:
            rows.append([str(batch), str(context), "no time" if speed else "does not fit", ""])
    print(table(["batch", "context", "tokens/s", "ours ×"], rows), "\n", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
