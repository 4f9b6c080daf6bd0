"""PTX, the assembly of CUDA, run one instruction at a time: Triton's interpreter has none."""

import re

import torch


class PTX:
    """Runs a list of the few instructions that weights are unpacked with; registers are integers."""

    def run(self, code: str, registers: dict[str, int]) -> dict[str, int]:
        self.registers = dict(registers)
        for instruction in re.sub(r"^{ .reg[^;]*;|}$", "", code.strip()).split(";"):
            if words := instruction.replace(",", " ").split():
                name, to, *operands = words
                self.registers[to] = getattr(self, name.replace(".", "_"))(*map(self.value, operands))
        return self.registers

    def value(self, operand: str) -> int:
        return self.registers[operand] if operand in self.registers else int(operand, 0)

    def mov_b32(self, a: int) -> int:
        return a

    def shl_b32(self, a: int, by: int) -> int:
        return a << by & 0xFFFFFFFF

    def xor_b32(self, a: int, b: int) -> int:
        return a ^ b

    def shr_b32(self, a: int, n: int) -> int:
        return a >> n

    def lop3_b32(self, a: int, b: int, c: int, table: int) -> int:
        """Bit by bit what the table says of bits of a, b, c: its bit 4 a + 2 b + c."""
        bits = (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
        return sum(bit << i for i, bit in enumerate(bits))

    def prmt_b32(self, a: int, b: int, chosen: int) -> int:
        """Byte i is that byte of b and a together which nibble i of `chosen` names."""
        both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        assert all(nibble < 8 for nibble in (chosen >> 4 * i & 15 for i in range(4)))
        return int.from_bytes(bytes(both[chosen >> 4 * i & 15] for i in range(4)), "little")

    def fma_rn_f32(self, a: int, b: int, c: int) -> int:
        x, y, z = (bits_to(torch.float32, n).double() for n in (a, b, c))
        return to_bits((x * y + z).float())

    def cvt_rn_bf16x2_f32(self, high: int, low: int) -> int:
        return to_bits(bits_to(torch.float32, low).bfloat16()) | to_bits(bits_to(torch.float32, high).bfloat16()) << 16

    def fma_rn_bf16x2(self, *operands: int) -> int:
        return self.halves(torch.bfloat16, *operands)

    def fma_rn_f16x2(self, *operands: int) -> int:
        return self.halves(torch.float16, *operands)

    def mul_f16x2(self, a: int, b: int) -> int:
        return self.halves(torch.float16, a, b, 0x80008000)

    def halves(self, dtype: torch.dtype, *operands: int) -> int:
        found = 0
        for shift in (0, 16):
            x, y, z = (bits_to(dtype, n >> shift & 0xFFFF).double() for n in operands)
            found |= to_bits((x * y + z).to(dtype)) << shift
        return found


def bits_to(dtype: torch.dtype, bits: int) -> torch.Tensor:
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    size = 1 << 8 * dtype.itemsize
    return torch.tensor(bits - size if bits >= size // 2 else bits, dtype=whole).view(dtype)


def to_bits(number: torch.Tensor) -> int:
    whole = torch.int32 if number.dtype.itemsize == 4 else torch.int16
    return number.view(whole).item() % (1 << 8 * number.dtype.itemsize)
