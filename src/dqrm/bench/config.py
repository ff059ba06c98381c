"""What `dqrm bench` measures: its flags and the architectures. Importing this module imports no torch."""

from dataclasses import dataclass
from typing import Literal

from dqrm.options import at_least, check_device, did_you_mean
from dqrm.quant.config import BITS, STORAGES, QATConfig

NUM_DENSE = 13
BASELINE = "baseline"
DEFAULT = "default"


@dataclass(frozen=True)
class Architecture:
    """Layer widths and table sizes of the DQRM paper's model for one dataset."""

    embedding_dim: int
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]
    table_rows: tuple[int, ...]

    def scaled(self, factor: float) -> tuple[int, ...]:
        """Rows of each table times `factor`; no table falls below 3 rows, unless it has fewer."""
        return tuple(min(rows, max(3, round(rows * factor))) for rows in self.table_rows)


ARCHITECTURES = {
    "kaggle": Architecture(
        16, (512, 256, 64, 16), (512, 256, 1),
        (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10,
         5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
    ),
    "terabyte": Architecture(
        64, (512, 256, 64), (512, 512, 256, 1),
        (9980200, 26095, 17224, 7383, 20152, 3, 7112, 1435, 62, 9756762, 1332128, 314263, 10, 2208, 11168, 122, 4,
         971, 14, 9994101, 7267918, 9946670, 415284, 12422, 102, 36),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """One way to train: what the name of a variant says."""

    bits: int
    refresh: Literal["periodic", "running_max"] | None = None
    bf16: bool = False
    table_dtype: str = "fp32"
    """Of the tables' master weights, as in `TrainingConfig`."""
    recipe: bool = False
    """Whether the bits are those of the default recipe: INT8 for small tables and the MLP, `bits` for the others."""

    @property
    def own_tables(self) -> bool:
        """Whether it cannot train the tables of other variants: their updates would outgrow its scales in each step."""
        return self.table_dtype != "fp32" or (self.bits != 32 and self.refresh != "periodic")

    @property
    def reference(self) -> str:
        """The name of the unquantized variant with the same arithmetic."""
        return "fp32_bf16" if self.bf16 else "fp32"


def _schemes() -> dict[str, Scheme]:
    schemes: dict[str, Scheme] = {}
    for bits in (32, *BITS[:-1]):
        rules: tuple[Literal["periodic", "running_max"] | None, ...] = (None, "periodic", "running_max")
        for refresh in rules[:1] if bits == 32 else rules:
            for bf16 in (False, True):
                for dtype in STORAGES:
                    name = "fp32" if bits == 32 else f"int{bits}"
                    name += f"_{refresh}" * (refresh is not None) + "_bf16" * bf16
                    schemes[name + f"_{dtype}_tables" * (dtype != "fp32")] = Scheme(bits, refresh, bf16, dtype)
    schemes[DEFAULT] = Scheme(QATConfig().bits, recipe=True)
    return schemes


SCHEMES = _schemes()
"""Every variant of our own by name: fp32 or int<bits>, then what differs from `dqrm train`'s defaults; or 'default'."""

EMBEDDING_VARIANTS = ("ours", "collection", "fp32", "whole_table", "torch_ao", "torchao")


@dataclass(frozen=True)
class BenchStepConfig:
    """What `dqrm bench step` measures."""

    arch: Literal["kaggle", "terabyte"] = "kaggle"
    """Architecture and table sizes of the DQRM paper."""
    rows_scale: float = 1.0
    """Factor on the rows of every table, above 0 and at most 1."""
    batch_size: tuple[int, ...] = (128, 2048)
    """Samples per step; several are measured one after the other."""
    steps: int = 100
    """Measured steps of each variant."""
    warmup: int = 20
    """Steps of each variant before the measured ones."""
    scale_period: int = 200
    """Training steps between two refreshes of the tables' scales in the _periodic variants."""
    variants: tuple[str, ...] = ("baseline", "fp32", "int4", "int4_periodic", "fp32_bf16", "int4_bf16")
    """What to measure: baseline (nn.EmbeddingBag and nn.Linear), default (bits as dqrm train sets them), or
    fp32|int2|int4|int8|int16 (of all weights) followed by _periodic or _running_max (scales; neither: as dqrm train),
    _bf16 (arithmetic), _bf16_tables or _int8_tables (weights of the tables), in this order."""
    optimizer: str = "sgd"
    """Update rule, as in dqrm train; the baseline always has plain SGD."""
    samples: int = 262_144
    """Rows of generated data that the steps read; at least 16 batches."""
    shuffle: Literal["global", "block"] = "global"
    """Order in which the data is read, as in training."""
    threads: int = 0
    """CPU threads for arithmetic; 0: torch's default, printed with the machine."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1', ...; auto: CUDA where there is one."""
    seed: int = 0
    """Seed of weights, data and the order of variants."""

    def __post_init__(self) -> None:
        at_least(self, steps=1, warmup=1, scale_period=1, samples=1, threads=0, seed=0)
        _check_scale(self.rows_scale)
        _check_sizes("batch_size", self.batch_size, "sizes of 1 or more, as 128-2048")
        _check_names(self.variants, (BASELINE, *SCHEMES))
        check_device(self.device)


@dataclass(frozen=True)
class BenchEmbeddingConfig:
    """What `dqrm bench embedding` measures."""

    rows: int = 1_000_000
    """Rows of the table."""
    dim: int = 16
    """Values per row."""
    batch_size: int = 2048
    """Ids looked up per step, one per sample."""
    bits: int = 4
    """Bits of the table in every quantized variant; torch.ao and torchao know 4 and 8."""
    repeats: int = 200
    """Measured steps of each variant; those that touch the whole table take a tenth, but at least 10."""
    scale_period: int = 200
    """Training steps between two refreshes of our scale."""
    variants: tuple[str, ...] = EMBEDDING_VARIANTS
    """What to measure: ours (QuantEmbeddingBag), collection (a QuantEmbeddingBagCollection of one table), fp32
    (nn.EmbeddingBag), whole_table (QAT of the whole table), torch_ao, torchao (skipped where not installed)."""
    threads: int = 0
    """CPU threads for arithmetic; 0: torch's default, printed with the machine."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1', ...; auto: CUDA where there is one."""
    seed: int = 0
    """Decides weights, ids and the order of variants."""

    def __post_init__(self) -> None:
        at_least(self, rows=1, dim=1, batch_size=1, repeats=1, scale_period=1, threads=0, seed=0)
        if self.bits not in BITS or self.bits == 32:
            raise ValueError(f"bits is {self.bits}, expected 2, 4, 8 or 16")
        _check_names(self.variants, EMBEDDING_VARIANTS)
        check_device(self.device)


INFERENCE_VARIANTS = ("packed", "onnx", "fp32")


@dataclass(frozen=True)
class BenchInferenceConfig:
    """What `dqrm bench inference` measures."""

    arch: Literal["kaggle", "terabyte"] = "kaggle"
    """Architecture and table sizes of the DQRM paper."""
    rows_scale: float = 1.0
    """Factor on the rows of every table, above 0 and at most 1."""
    bits: Literal[2, 4, 8] = 4
    """Bits of the codes of tables and MLP weights."""
    batch_size: tuple[int, ...] = (1, 128, 2048)
    """Rows per call; several are measured one after the other."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads per call; several are measured one after the other."""
    repeats: int = 300
    """Measured calls of each variant; ten times as many at batch sizes of 128 and less."""
    warmup: int = 30
    """Calls of each variant before the measured ones."""
    variants: tuple[str, ...] = INFERENCE_VARIANTS
    """What to measure: packed (the artifact), onnx (ONNX Runtime, skipped where not installed), fp32 (our FP32 model
    of the same values, tables in memory)."""
    folder: str | None = None
    """Existing folder in which to keep the measured files; none: a temporary one."""
    seed: int = 0
    """Seed of weights, data and the order of variants."""

    def __post_init__(self) -> None:
        at_least(self, repeats=1, warmup=1, seed=0)
        _check_scale(self.rows_scale)
        _check_sizes("batch_size", self.batch_size, "sizes of 1 or more, as 128-2048")
        _check_sizes("threads", self.threads, "numbers from 1 to 1024, as 1-2", highest=1024)
        _check_names(self.variants, INFERENCE_VARIANTS)


EXCHANGE_VARIANTS = ("dense", "fp32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class BenchExchangeConfig:
    """What `dqrm bench exchange` measures."""

    ranks: int = 4
    """Processes that train together, one per rank."""
    arch: Literal["kaggle", "terabyte"] = "kaggle"
    """Architecture and table sizes of the DQRM paper."""
    rows_scale: float = 0.1
    """Factor on the rows of every table, above 0 and at most 1; every rank holds all tables."""
    batch_size: int = 128
    """Samples per step and rank."""
    steps: int = 60
    """Measured steps of each variant."""
    dense_steps: int = 3
    """Measured steps of the variant 'dense', whose gradients are as large as the tables."""
    warmup: int = 10
    """Steps of each variant before the measured ones (dense: one)."""
    scale_period: int = 200
    """Training steps between two refreshes of the tables' scales."""
    variants: tuple[str, ...] = ("dense", "fp32", "int8", "int4")
    """What to measure: dense (torch's DistributedDataParallel, dense gradients of the tables), and our exchange in
    fp32, bf16, int8 (error compensation), int4 (the same, bucket:512, a scale per row)."""
    table_exchange: Literal["auto", "all_gather", "all_to_all"] = "auto"
    """How our variants sum the tables' gradients, as in training."""
    threads: int = 1
    """CPU threads of each rank."""
    seed: int = 0
    """Seed of weights, data and the order of variants."""

    def __post_init__(self) -> None:
        at_least(self, ranks=2, batch_size=1, steps=1, dense_steps=1, warmup=1, scale_period=1, threads=1, seed=0)
        _check_scale(self.rows_scale)
        _check_names(self.variants, EXCHANGE_VARIANTS)


SHARDED_VARIANTS = ("fp32", "int2", "int4", "int8")


@dataclass(frozen=True)
class BenchShardedConfig:
    """What `dqrm bench sharded` measures."""

    ranks: int = 2
    """Processes that train together, one per rank."""
    dim: tuple[int, ...] = (16, 64)
    """Values per row, multiples of 4; several are measured one after the other."""
    tables: int = 26
    """Tables, one id each per sample."""
    rows: int = 100_000
    """Rows of each table."""
    sharding: Literal["row_wise", "table_wise"] = "row_wise"
    """How the tables are spread over the ranks."""
    batch_size: int = 512
    """Samples per step and rank."""
    steps: int = 40
    """Measured steps of each variant."""
    warmup: int = 5
    """Steps of each variant before the measured ones."""
    variants: tuple[str, ...] = ("fp32", "int4")
    """What to measure: fp32 (TorchRec without codecs), or int2, int4, int8 (rows forward; gradients INT8,
    stochastically rounded)."""
    threads: int = 1
    """CPU threads of each rank."""
    seed: int = 0
    """Seed of weights, ids, rounding and the order of variants."""

    def __post_init__(self) -> None:
        at_least(self, ranks=2, tables=1, rows=1, batch_size=1, steps=1, warmup=1, threads=1, seed=0)
        _check_sizes("dim", self.dim, "multiples of 4, as 16-64")
        if any(dim % 4 for dim in self.dim):
            raise ValueError(f"dim is {'-'.join(map(str, self.dim))!r}, expected multiples of 4, as 16-64 (FBGEMM)")
        _check_names(self.variants, SHARDED_VARIANTS)


def _check_scale(factor: float) -> None:
    if not 0 < factor <= 1:
        raise ValueError(f"rows_scale is {factor}, expected above 0 and at most 1")


def _check_sizes(name: str, sizes: tuple[int, ...], expected: str, highest: int | None = None) -> None:
    if not sizes or min(sizes) < 1 or (highest is not None and max(sizes) > highest):
        raise ValueError(f"{name} is {'-'.join(map(str, sizes))!r}, expected {expected}")


def _check_names(names: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not names:
        raise ValueError(f"variants is empty; known are {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"variants has '{name}'{did_you_mean(name, known)}")
        if names.count(name) > 1:
            raise ValueError(f"variants has '{name}' twice")
