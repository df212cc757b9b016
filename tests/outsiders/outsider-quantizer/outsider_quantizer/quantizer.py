"""int8, of the feed-forward layers alone."""

from zoo.precision.int8 import Int8, Int8Linear
from zoo.precision.quantization import QuantizedLinear


class Outsider(Int8):
    name = "outsider"

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        return Int8Linear if role.startswith("mlp.") else None
