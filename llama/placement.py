"""`Placement`: which device has which part of a model, and `plan`, which finds one. Arithmetic only, without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from llama.device_map import BALANCED, DISK, EMBEDDINGS, OUTPUT, layers_in_words, layers_of, on_host
from llama.errors import DeviceError, ParameterError
from llama.wording import in_units

CPU = "cpu"
AT_ONCE = 2  # parts of the disk that are in memory: the one that is computed, and the next


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each part of a model lives: devices by name, "disk" for what stays in the files."""

    embeddings: str
    layers: tuple[str, ...]  # the device of each layer; those of one device follow one another
    output: str  # of the last norm and the output matrix

    @property
    def stages(self) -> tuple[tuple[str, range], ...]:
        """The runs of layers on one device, in order: (("cuda:0", range(0, 20)), ("cpu", range(20, 32)))."""
        found: list[tuple[str, range]] = []
        for layer, device in enumerate(self.layers):
            if found and found[-1][0] == device:
                found[-1] = (device, range(found[-1][1].start, layer + 1))
            else:
                found.append((device, range(layer, layer + 1)))
        return tuple(found)

    @property
    def devices(self) -> tuple[str, ...]:
        """Each device once, in the order in which a token comes to it."""
        return tuple(dict.fromkeys((self.embeddings, *self.layers, self.output)))

    @property
    def words(self) -> str:
        """Such as "cuda:0 (embeddings, layers 0-19) and cpu (layers 20-31, output)"."""
        said = [f"{device} ({self.parts_on(device)})" for device in self.devices]
        return " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))

    def parts_on(self, device: str) -> str:
        """Such as "embeddings, layers 0-15"."""
        layers = next((layers_in_words(layers) for stage, layers in self.stages if stage == device), "")
        ends = (EMBEDDINGS * (device == self.embeddings), layers, OUTPUT * (device == self.output))
        return ", ".join(filter(None, ends))


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of a model's parts, and of what a run needs beside them."""

    n_layers: int
    embeddings: int
    layer: int
    output: int  # the last norm and the output matrix
    cache: int  # the keys and values of one layer, for all sequences
    activations: int  # of a step, wherever something is computed
    logits: int  # of a step, where the output is


@dataclass(frozen=True, slots=True)
class Share:
    """What one device has of a model, in bytes."""

    device: str
    memory_of: str  # the device whose limit counts
    parts: str  # in words
    layers: int
    weights: int  # of the disk: those in the files
    cache: int
    workspace: int

    @property
    def memory(self) -> int:
        return self.cache + self.workspace + (0 if self.device == DISK else self.weights)


def memory_of(device: str, limits: Mapping[str, int]) -> str:
    """The device whose limit counts: that of the CPU for the disk, and for its parts that have none of their own."""
    return CPU if on_host(device) and device not in limits else device


def shares(parts: Parts, placement: Placement, limits: Mapping[str, int]) -> tuple[Share, ...]:
    """What each device of a placement has, in the order in which a token comes to it.

    Stages that share one memory run one after another, so their activations count once.
    """
    computing, found = set(), []
    for device in placement.devices:
        layers, owner = placement.layers.count(device), memory_of(device, limits)
        embeddings, output = device == placement.embeddings, device == placement.output
        weights = embeddings * parts.embeddings + layers * parts.layer + output * parts.output
        workspace = output * parts.logits + (0 if owner in computing else parts.activations)
        if device == DISK:
            read = (embeddings * parts.embeddings, parts.layer if layers else 0, output * parts.output)
            workspace += AT_ONCE * max(read)
        computing.add(owner)
        in_words, cache = placement.parts_on(device), layers * parts.cache
        found.append(Share(device, owner, in_words, layers, weights, cache, workspace))
    return tuple(found)


def check(parts: Parts, placement: Placement, limits: Mapping[str, int]) -> None:
    """Raise DeviceError, which says what does not fit and by how much, unless each share is within its limit."""
    found = shares(parts, placement, limits)
    for owner in dict.fromkeys(share.memory_of for share in found):
        own = [share for share in found if share.memory_of == owner]
        if sum(share.memory for share in own) > limits[owner]:
            raise DeviceError(_lacks(owner, own, limits[owner]))


def _lacks(owner: str, own: Sequence[Share], limit: int) -> str:
    """That those shares do not fit into the device's memory."""
    where = {owner: "", DISK: " on the disk"}
    what = " and ".join(share.parts + where.get(share.device, f" on {share.device}") for share in own)
    sizes = {
        "weights": sum(share.weights for share in own if share.device != DISK),
        "KV cache": sum(share.cache for share in own),
        "workspace": sum(share.workspace for share in own),
    }
    needs = " + ".join(f"{name} {in_units(size)}" for name, size in sizes.items())
    return (
        f"not enough memory on {owner} for {what}: {needs} are {in_units(sum(sizes.values()) - limit)} more than its"
        f" {in_units(limit)}: choose a smaller max_seq_len or max_batch_size, or another max_memory or device_map"
    )


def plan(parts: Parts, device_map: str | Mapping[str, str], limits: Mapping[str, int]) -> Placement:
    """The placement that `device_map` asks for, within `limits`: the most bytes of each device, the CPU's among them.

    A table says where all is. Else layers go to the devices in order: accelerators, the CPU, the disk. "auto" fills
    them one after another; "balanced" has the accelerators filled to about the same part. Embeddings and output are
    where a step then reads the fewest bytes from the disk, and after that on the CPU; where that makes no difference,
    beside the first and the last layer. Raises ParameterError for a table that is none of this model's, and DeviceError
    where there is no room.
    """
    placement = arrange(parts, device_map, limits)
    check(parts, placement, limits)
    return placement


def arrange(parts: Parts, device_map: str | Mapping[str, str], limits: Mapping[str, int]) -> Placement:
    """The same, even where it does not fit: then what lacks least."""
    if not isinstance(device_map, str):
        return explicit(device_map, parts.n_layers)
    order = [*sorted(limits, key=_place), DISK]
    maps = (_filled(parts, ends, limits, spread=device_map == BALANCED) for ends in product(order, order))
    return min(maps, key=lambda found: _cost(parts, found, limits, order))


def _place(device: str) -> tuple[bool, bool, int]:
    """cuda:0, cuda:1, …, mps, cpu:0, cpu:1, …, cpu."""
    kind, numbered, index = device.partition(":")
    return on_host(kind), not numbered, int(index or 0)


def _filled(parts: Parts, ends: tuple[str, str], limits: Mapping[str, int], *, spread: bool) -> Placement:
    """The layers on the devices in order, where embeddings and output are; what has no room is on the disk."""
    embeddings, output = ends
    each, counts = parts.layer + parts.cache, dict.fromkeys(sorted(limits, key=_place), 0)
    room = {
        device: limit - parts.activations - (device == embeddings) * parts.embeddings
        - (device == output) * (parts.output + parts.logits)
        for device, limit in limits.items()
    }  # fmt: skip
    left = parts.n_layers
    if spread:
        while left and (fits := [d for d in counts if not on_host(d) and (counts[d] + 1) * each <= room[d]]):
            fullest = {device: limits[device] - room[device] + (counts[device] + 1) * each for device in fits}
            counts[min(fits, key=lambda device: fullest[device] / limits[device])] += 1
            left -= 1
    for device in counts:
        if device != CPU:
            more = max(0, min(left, room[device] // each - counts[device]))
            counts[device] += more
            left -= more
    if CPU in counts:
        largest = max((embeddings == DISK) * parts.embeddings, (output == DISK) * parts.output)
        counts[CPU] = _on_cpu(parts, left, room[CPU] - (output == DISK) * parts.logits, largest)
    layers = [device for device, count in counts.items() for _ in range(count)]
    return Placement(embeddings, (*layers, *[DISK] * (parts.n_layers - len(layers))), output)


def _on_cpu(parts: Parts, layers: int, room: int, largest: int) -> int:
    """How many of the layers have their weights in the CPU's memory; the cache of all of them is there.

    `largest` is that of the other parts on the disk.
    """
    if layers * (parts.layer + parts.cache) <= room - AT_ONCE * largest:
        return layers
    at_once = AT_ONCE * max(parts.layer, largest)
    return max(0, min(layers - 1, (room - at_once - layers * parts.cache) // parts.layer))


def _cost(parts: Parts, placement: Placement, limits: Mapping[str, int], order: Sequence[str]) -> tuple[int, ...]:
    """Less is better: bytes that do not fit, then what a step reads from the disk, then what it reads on the CPU."""
    used: dict[str, int] = {}
    read = {True: 0, False: 0}  # whether from the disk: bytes; in memory a step needs few rows of the embeddings
    for share in shares(parts, placement, limits):
        used[share.memory_of] = used.get(share.memory_of, 0) + share.memory
        if on_host(share.device):
            looked_up = parts.embeddings if share.device == placement.embeddings != DISK else 0
            read[share.device == DISK] += share.weights - looked_up
    too_much = sum(max(0, needed - limits[device]) for device, needed in used.items())
    apart = (placement.embeddings != placement.layers[0]) + (placement.output != placement.layers[-1])
    return (too_much, read[True], read[False], apart, order.index(placement.embeddings), order.index(placement.output))


def explicit(device_map: Mapping[str, str], n_layers: int) -> Placement:
    """The placement that a table says: {"layers.0-15": "cuda:0", "layers.16-31": "cpu"}.

    What is left out of embeddings and output is beside the first and the last layer. Raises ParameterError unless it
    has each layer once, and those of one device follow one another.
    """
    named: dict[int, str] = {}
    for part in device_map:
        if part not in (EMBEDDINGS, OUTPUT):
            layers = layers_of(part)
            if layers.stop > n_layers:
                raise ParameterError(f"device_map has {part}, but the model has {layers_in_words(range(n_layers))}")
            if twice := named.keys() & set(layers):
                raise ParameterError(
                    f"device_map has layer {min(twice)} twice, in {named[min(twice)]} and {part}: give it one device"
                )
            named |= dict.fromkeys(layers, part)
    if gap := [layer for layer in range(n_layers) if layer not in named]:
        last = next(layer for layer in range(gap[0], n_layers + 1) if layer == n_layers or layer in named)
        raise ParameterError(
            f"device_map says no device for {layers_in_words(range(gap[0], last))}: the model has"
            f" {layers_in_words(range(n_layers))}"
        )
    devices = tuple(device_map[named[layer]] for layer in range(n_layers))
    placement = Placement(device_map.get(EMBEDDINGS, devices[0]), devices, device_map.get(OUTPUT, devices[-1]))
    _check_runs(placement)
    return placement


def _check_runs(placement: Placement) -> None:
    seen: dict[str, range] = {}
    for device, layers in placement.stages:
        if device in seen:
            raise ParameterError(
                f"device_map has {layers_in_words(seen[device])} and {layers_in_words(layers)} on {device}, but others"
                " between them elsewhere: give each device layers that follow one another"
            )
        seen[device] = layers
