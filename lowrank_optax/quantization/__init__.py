"""Codecs: an array as small codes with a scale per block, and back to float32."""

from lowrank_optax.quantization._protocol import Codec as Codec
from lowrank_optax.quantization._protocol import Encoded as Encoded
from lowrank_optax.quantization.affine import affine as affine
from lowrank_optax.quantization.array import QuantizedArray as QuantizedArray
from lowrank_optax.quantization.array import dequantize as dequantize
from lowrank_optax.quantization.array import is_quantized as is_quantized
from lowrank_optax.quantization.array import quantize as quantize
from lowrank_optax.quantization.companded import companded as companded
from lowrank_optax.quantization.float8 import float8 as float8
from lowrank_optax.quantization.int4 import linear_int4 as linear_int4
from lowrank_optax.quantization.int8 import blockwise_int8 as blockwise_int8
from lowrank_optax.quantization.rounding import stochastic_round as stochastic_round
from lowrank_optax.quantization.rounding import (
    stochastic_round_to_bfloat16 as stochastic_round_to_bfloat16,
)
from lowrank_optax.quantization.split import join as join
from lowrank_optax.quantization.split import split as split
from lowrank_optax.quantization.symmetric import symmetric as symmetric
