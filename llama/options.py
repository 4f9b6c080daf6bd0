"""What a run chose: `RunOptions`, the parameters of `Llama.build` beside its two paths."""

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from llama.device_map import parse_device_map, parse_max_memory
from llama.errors import ParameterError
from llama.quantization.formats import check_format
from llama.request import plain

if TYPE_CHECKING:
    import torch

KV_DTYPES = ("fp8",)
LOOKUP = "lookup"  # the way to speculate that needs no model
MOST_DRAFT_TOKENS = 15  # with the token before them they are one step of the CPU's kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a checkpoint is run; checked where it is made (raises ParameterError). Numbers may be numpy's or torch's.

    `device` and `dtype` are as they were given, by name or as torch's objects. What they resolved to is the model's:
    `model.device`, `model.dtype`, `model.weight_format`. What only a machine can tell, such as whether it has that
    device, is checked when the model is loaded. The help texts are those of the command's flags.
    """

    max_seq_len: int = field(default=2048, metadata={"help": "the most tokens of one sequence, prompt and completion."})
    max_batch_size: int = field(
        default=8, metadata={"help": "how many sequences are held at once; more than that take turns."}
    )
    model_parallel_size: int | None = field(
        default=None, metadata={"help": "how many of torchrun's processes share one model; all if left out."}
    )
    seed: int | None = field(
        default=1, metadata={"help": "where all noise comes from; None takes another at each start."}
    )
    device: "str | torch.device | None" = field(
        default=None, metadata={"help": "cuda, mps or cpu; the first of these that is there if left out."}
    )
    dtype: "str | torch.dtype | None" = field(
        default=None,
        metadata={"help": "bfloat16, float16 or float32; the checkpoint's if the device is fast in it."},
    )
    quantize: str | None = field(
        default=None, metadata={"help": "hold the matrices in int8 or int4; as they are stored if left out."}
    )
    kv_dtype: str | None = field(
        default=None, metadata={"help": "hold the KV cache in fp8, in half the memory; as the weights if left out."}
    )
    threads: int | None = field(
        default=None,
        metadata={"help": "how many threads a process uses on a CPU; as many as there are cores if left out."},
    )
    compile: bool = field(
        default=False,
        metadata={"help": "run the layers through torch.compile, which takes its time at the first steps."},
    )
    batch_invariant: bool = field(
        default=False,
        metadata={"help": "the same result to the bit in any batch, also where that is slower; on a CPU."},
    )
    verify: bool = field(
        default=False, metadata={"help": "compare the files with the checkpoint's checklist.chk first."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "how dialogs are written: a file with a template, llama2 or none; as the checkpoint says."},
    )
    max_step_tokens: int | None = field(
        default=None, metadata={"help": "the most tokens of one step; long prompts are read in such chunks."}
    )
    speculate: str | None = field(
        default=None,
        metadata={"help": "draft tokens, to be verified together: lookup, or a smaller model's folder; on a CPU."},
    )
    draft_tokens: int = field(
        default=7, metadata={"help": "the most drafts of one step; fewer are made of a text where they fail."}
    )
    max_memory: dict[str, int | str] | None = field(
        default=None, metadata={"help": 'the most memory of each device: {"cuda:0": "5GiB", "cpu": "20GiB"}.'}
    )
    device_map: str | dict[str, str] | None = field(
        default=None,
        metadata={"help": 'layers over devices: auto (so with limits), balanced, or {"layers.0-15": "cuda:0", …}.'},
    )

    def __post_init__(self) -> None:
        for own in fields(self):
            object.__setattr__(self, own.name, plain(getattr(self, own.name)))
        check_seed(self.seed)
        check_sizes(max_seq_len=self.max_seq_len, max_batch_size=self.max_batch_size, draft_tokens=self.draft_tokens)
        optional = {"max_step_tokens": self.max_step_tokens, "threads": self.threads}
        check_sizes(**{name: value for name, value in optional.items() if value is not None})
        if self.draft_tokens > MOST_DRAFT_TOKENS:
            raise ParameterError(
                f"draft_tokens={self.draft_tokens} is out of range: expected an integer from 1 to {MOST_DRAFT_TOKENS}"
            )
        if self.speculate not in (None, LOOKUP) and not os.path.exists(str(self.speculate)):
            raise ParameterError(
                f"speculate={self.speculate!r} is no way to draft tokens: use {LOOKUP} or the folder of a smaller"
                " model, or leave it out"
            )
        check_format(self.quantize)
        self._check_placement()
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ParameterError(
                f"kv_dtype={self.kv_dtype!r} is not a format of the KV cache: use {' or '.join(KV_DTYPES)}, or leave"
                " it out"
            )

    @property
    def places(self) -> bool:
        """Whether the model may be laid over several devices and the disk."""
        return self.max_memory is not None or self.device_map is not None

    def _check_placement(self) -> None:
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", parse_max_memory(self.max_memory))
        if self.device_map is not None:
            object.__setattr__(self, "device_map", parse_device_map(self.device_map))
        if self.places and self.model_parallel_size not in (None, 1):
            raise ParameterError(
                f"model_parallel_size={self.model_parallel_size} splits a model over processes, device_map and"
                " max_memory lay it over the devices of one: leave one of them out"
            )


def check_sizes(**sizes: int) -> None:
    """Raise ParameterError that names the first of the sizes which is not an integer of 1 or more."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ParameterError(f"{name}={value!r} is out of range: expected an integer, 1 or more")


def check_seed(seed: int | None) -> None:
    """Raise ParameterError unless it is an integer of 64 bits without a sign, or None."""
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise ParameterError(f"seed={seed!r} is out of range: expected an integer from 0 to 2**64 - 1, or None")
