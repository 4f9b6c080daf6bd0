"""`Placement`: which device has which part of a model."""

from dataclasses import dataclass

DISK = "disk"  # layers that stay in the mapped files, and are computed on the CPU


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
