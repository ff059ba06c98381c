"""INT4 on the wire and QAT for TorchRec's sharded tables: `pip install 'dqrm[torchrec]'`, then TorchRec itself.

    from dqrm.torchrec import EmbeddingCollectionSharder
    sharders = [EmbeddingCollectionSharder(forward="int4", backward="int8", fused_params=...)]
    model = DistributedModelParallel(model, sharders=sharders)

Raises:
    UserError: on import, where TorchRec or FBGEMM is missing, or FBGEMM is not built for the torch that is installed.
"""

from dqrm.torchrec.pairing import check

check()

from dqrm.quant.row_codec import RowCodec  # noqa: E402
from dqrm.torchrec.codecs import RowCommCodec, codec_registry  # noqa: E402
from dqrm.torchrec.sharder import EmbeddingCollectionSharder  # noqa: E402
from dqrm.torchrec.tables import fake_quantize_rows, gather_tables, row_scales  # noqa: E402

__all__ = [
    "EmbeddingCollectionSharder", "RowCodec", "RowCommCodec", "codec_registry", "fake_quantize_rows", "gather_tables",
    "row_scales",
]  # fmt: skip
