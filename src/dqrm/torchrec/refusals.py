"""What a configuration must be where its tables are sharded."""

from collections.abc import Iterator
from typing import Any

from dqrm.config import Config
from dqrm.quant.row_codec import CODECS
from dqrm.torchrec.step import FUSED, OURS

_BITS = (*CODECS.values(), 32)


def refusals(config: Config) -> Iterator[tuple[str, Any, str]]:
    """The fields that do not go with sharded tables, as (name, value, what is expected)."""
    for name, value, fits, expected in _requirements(config):
        if not fits:
            yield name, value, expected


def _requirements(config: Config) -> Iterator[tuple[str, Any, bool, str]]:
    qat, optimizer, exchange, training = config.quantization, config.optimizer, config.exchange, config.training
    bits, dim = qat.effective_table_bits, config.model.embedding_dim
    rule, rules = optimizer.rule, (*FUSED, *OURS)
    yield "optimizer", rule, rule in rules, "one of " + ", ".join(map(repr, rules))
    yield "table_bits", bits, bits in _BITS, "2, 4 or 8, which the codecs have, or 32"
    by_row = bits == 32 or qat.table_granularity == "row"
    yield "table_granularity", qat.table_granularity, by_row, "'row': each row is sent with its scale"
    small = qat.small_table_bits
    yield "small_table_bits", small, small is None, "none: all tables pass one codec"
    fresh = bits == 32 or qat.scale_refresh == "running_max"
    yield "scale_refresh", qat.scale_refresh, fresh, "'running_max': the scale of a row follows from it"
    yield "quantizer", qat.quantizer, qat.quantizer == "max", "'max'"
    yield "table_qscheme", qat.table_qscheme, qat.table_qscheme == "symmetric", "'symmetric'"
    yield "forward_rounding", qat.forward_rounding, qat.forward_rounding == "nearest", "'nearest'"
    yield "table_dtype", training.table_dtype, training.table_dtype == "fp32", "'fp32', as FBGEMM stores them"
    yield "embedding_dim", dim, dim % 4 == 0, "a multiple of 4, as FBGEMM needs"
    yield "clip_norm", optimizer.clip_norm, not optimizer.clip_norm, "0: rows are updated in the backward pass"
    yield "table_l2", optimizer.table_l2, not optimizer.table_l2, "0"
    codec, scale = exchange.table_codec, exchange.table_codec_scale
    yield "table_codec", codec, codec != "bf16", "'int8', 'int4' or 'fp32'"
    yield "table_codec_scale", scale, scale == "row" or codec == "fp32", "'row': each row is sent with its scale"
    whole = exchange.table_exchange
    yield "table_exchange", whole, whole != "all_gather", "'auto' or 'all_to_all'"
    yield "shared_scales", exchange.shared_scales, not exchange.shared_scales, "false"
