"""The configuration of a training run: one dataclass per concern; that of the model is in `models/config.py`, of the
quantizers in `quant/config.py`, of the communication between ranks in `distributed/config.py`.

The same field names serve in Python, in YAML (under the section's name) and as flags (`--batch-size`); the text below a
field is its help. Impossible values are refused when the dataclass is built. Importing this module imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dqrm import recipe
from dqrm.distributed.config import ExchangeConfig
from dqrm.errors import UserError
from dqrm.models.config import ModelConfig
from dqrm.options import at_least, build, check_device, coerce, did_you_mean, field_types, read_yaml
from dqrm.quant.config import HOT_ROWS, STORAGES, QATConfig, check_registered

PLACEMENTS: dict[str, Any] = {
    "replicated": "dqrm.training.placement.Placement",
    "sharded": "dqrm.torchrec.placement.Sharded",
}
"""What a TrainingConfig can name as `tables`: a `training.placement.Placement`, or where it is."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rule and learning rate schedule."""

    optimizer: str | None = None
    """Update rule, and its state in bytes per weight of the tables: sgd (none), adagrad (4), rowwise_adagrad (4 per
    row; plain Adagrad for the MLP), counter_adagrad (12 per row; with table_l2, rare rows decay more),
    frequency_adagrad (8 per row; rare rows learn more slowly), adam (8; rows of the batch), rowwise_adam (4),
    dense_adam (8; all rows move in each step), or a registered one; none: dense_adam, adagrad for bf16 or sharded
    tables, rowwise_adagrad for int8 or int4 tables."""
    learning_rate: float | None = None
    """Step size; none: 0.1 for sgd, 0.001 for adam; for dense_adam 0.0003, from batch size 256 0.0005, from 1024 0.001;
    for adagrad 0.01, from batch size 256 0.02, from 2048 0.03."""
    table_learning_rate: float | None = None
    """Step size of the tables, under the same schedule; none: learning_rate."""
    adagrad_eps: float = 1e-10
    """Added to Adagrad's root, against division by zero."""
    count_halflife: float = 10_000.0
    """With counter_adagrad: steps after which half of a row's count of updates is forgotten."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay rate of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment, against division by zero; above 0 with dense_adam."""
    clip_norm: float = 0.0
    """Largest norm of the gradients of tables and MLP together, which are scaled down to it; 0: no limit."""
    table_l2: float = 0.0
    """L2 on the tables, added to the gradient as table_l2 * weight: of rows of the batch; dense_adam: of all;
    counter_adagrad: weight decay, larger for rare rows."""
    mlp_l2: float = 0.0
    """L2 (weight decay) on the MLP weights and biases."""
    scale_rate_factor: float = 1.0
    """Factor on the learning rate for what quantizers learn: the scales of lsq, the clipping values of pact."""
    pact_l2: float | None = None
    """L2 on the clipping values of pact; none: mlp_l2, as in the paper. Scales of lsq have none."""
    warmup_steps: int | None = None
    """Steps of linear warm-up of the learning rate from 0; none: 100 with the Adagrads, at most a third of an epoch; 0
    with others, with optimizer state from an earlier run (--from), or with a decay that begins earlier."""
    decay_start_step: int = 0
    """Step at which DLRM's quadratic decay begins; used when decay_steps is above 0."""
    decay_steps: int = 0
    """Steps over which the learning rate decays quadratically to (almost) 0; 0: no decay."""
    plateau_factor: float = 1.0
    """Factor on the learning rate when the validation metric (--select-by) stops improving; 1: off."""
    plateau_patience: int = 1
    """Evaluations without improvement before the learning rate is reduced."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            at_least(self, learning_rate=0)
        at_least(
            self, adagrad_eps=0, adam_beta1=0, adam_beta2=0, adam_eps=0, clip_norm=0, table_l2=0,
            mlp_l2=0, scale_rate_factor=0, decay_start_step=0, decay_steps=0, plateau_patience=1,
        )  # fmt: skip
        if not 0 < self.count_halflife < math.inf:
            raise ValueError(f"count_halflife is {self.count_halflife}, expected a finite number of steps above 0")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if self.optimizer == "dense_adam" and not self.adam_eps:
            raise ValueError(f"adam_eps is {self.adam_eps}, expected above 0 with dense_adam")
        if self.table_learning_rate is not None:
            at_least(self, table_learning_rate=0)
            if self.table_learning_rate and not self.rate:
                own = self.table_learning_rate
                raise ValueError(f"table_learning_rate is {own} but learning_rate is 0, expected it above 0 too")
        if self.pact_l2 is not None:
            at_least(self, pact_l2=0)
        if not 0 < self.plateau_factor <= 1:
            raise ValueError(f"plateau_factor is {self.plateau_factor}, expected above 0 and at most 1")
        if self.warmup_steps is not None:
            at_least(self, warmup_steps=0)
        if self.decay_steps and self.decay_start_step < self.warmup:
            raise ValueError(
                f"decay_start_step is {self.decay_start_step}, before the end of the warm-up at {self.warmup_steps}"
            )

    @property
    def rule(self) -> str:
        """`optimizer`; if it is none (only outside a `Config`), the default with FP32 tables."""
        return recipe.OPTIMIZER if self.optimizer is None else self.optimizer

    @property
    def rate(self) -> float:
        """`learning_rate`; if it is none, the default of the largest batch size."""
        if self.learning_rate is None:
            return recipe.learning_rate(self.rule, recipe.BATCH_SIZES[-1][1])
        return self.learning_rate

    @property
    def warmup(self) -> int:
        """`warmup_steps`; if it is none (only outside a run), 0."""
        return self.warmup_steps or 0

    @property
    def table_rate_factor(self) -> float:
        """The tables' learning rate as a multiple of the MLP's."""
        own = self.table_learning_rate
        return 1.0 if own is None or not self.rate else own / self.rate


@dataclass(frozen=True)
class TrainingConfig:
    """Training loop: length, order of samples, evaluation, checkpoints, device."""

    epochs: int = 0
    """Most passes over the training split; 0: 20, which --patience ends, or 1 without patience or validation figure."""
    batch_size: int = 0
    """Samples per training step; 0: from 64 to 1024 (Adagrad: 2048), by the rows of the training split."""
    max_steps: int = 0
    """Stop after this many steps; 0: all epochs."""
    shuffle: Literal["global", "block", "none"] = "global"
    """Order of samples: a new permutation each epoch, shuffled blocks (files larger than memory), or as stored."""
    eval_every: int = 0
    """Steps between evaluations on validation, besides those at the end of each epoch; 0: only there."""
    eval_batch_size: int = 8192
    """Samples per evaluation step."""
    select_by: str = "auc"
    """Validation metric that chooses the best checkpoint: auc, log_loss, accuracy, ne, gauc (AUC per group; needs data
    prepared with --group), or another that is registered."""
    patience: int = recipe.PATIENCE
    """Epochs without improvement of that metric before training stops; 0: off."""
    early_stopping: int = 0
    """The same in evaluations, of which --eval-every makes several per epoch; 0: off."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides the one at each evaluation; 0: only there."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; 0: no time-based checkpoints."""
    log_every: int = 1000
    """Steps between lines with the training loss in metrics.jsonl; 0: at evaluations only."""
    callbacks: tuple[str, ...] = recipe.CALLBACKS
    """Callbacks by name, each with options, as redraw_tables:min_rows=100000 (redraws large tables at each epoch),
    ema:decay=0.99 (averages the MLP weights) or stage_bits:tables=32:mlp=16-8 (first epochs' bits). A list replaces the
    default one; with + before each name it extends it, as +ema:decay=0.99; '' for none."""
    loggers: tuple[str, ...] = ()
    """Trackers that receive the figures of metrics.jsonl: tensorboard (events in the run folder), mlflow, wandb."""
    tensorboard: bool = False
    """The same as --loggers tensorboard."""
    record_histograms: tuple[str, ...] = ()
    """Columns whose tables' weights evaluations record as histograms, for `dqrm report`; largest: the 3 largest."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1', ...; auto: CUDA where there is one."""
    threads: int = 0
    """CPU threads for arithmetic; 0: the fastest number at the start of the run, at most torch's default."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of MLP and interaction in training; bf16 keeps FP32 weights and evaluates in FP32."""
    table_dtype: str = "fp32"
    """Master weights of the tables: fp32 (4 bytes per weight); bf16 (2), int8 (1, and 2 per row for its scale), or int4
    (half, the same, and --hot-rows in int8), all three updated with stochastic rounding."""
    hot_rows: float = HOT_ROWS
    """With --table-dtype int4: the share of rows, those updated most often, that are kept in int8; 0 to 0.5."""
    tables: str = "replicated"
    """Where the tables are: replicated (whole on each rank), or sharded over the ranks by TorchRec, with INT4 rows and
    INT8 gradients on the wire (`pip install 'dqrm[torchrec]'`; docs/guides/sharded.md)."""
    seed: int = 0
    """Seed of the initial weights and of the order of samples."""

    def __post_init__(self) -> None:
        for each in self.callbacks if isinstance(self.callbacks, (list, tuple)) else ():
            if not isinstance(each, str):
                raise ValueError(
                    f"callbacks: got {each!r}, expected names; `dqrm.train(callbacks=[...])` takes objects"
                )
        at_least(
            self, epochs=0, batch_size=0, max_steps=0, eval_every=0, eval_batch_size=1, patience=0, early_stopping=0,
            checkpoint_every=0, checkpoint_minutes=0, log_every=0, threads=0, seed=0,
        )  # fmt: skip
        object.__setattr__(self, "callbacks", recipe.callbacks(self.callbacks))  # what is stored is the whole list
        check_registered("table_dtype", self.table_dtype, STORAGES)
        check_registered("tables", self.tables, PLACEMENTS)
        if not 0 <= self.hot_rows <= 0.5:
            raise ValueError(f"hot_rows is {self.hot_rows}, expected 0 to 0.5 of the rows")
        if self.hot_rows != HOT_ROWS and self.table_dtype != "int4":
            raise ValueError(f"hot_rows is {self.hot_rows}, but table_dtype is {self.table_dtype!r}, not int4")
        check_device(self.device)


_LEARNED = {
    "scale_rate_factor": "it needs quantizer 'lsq' or activation_quantizer 'pact'",
    "pact_l2": "it needs activation_quantizer 'pact'",
}
"""Fields of `OptimizerConfig` for what quantizers learn, and which of ours do."""


@dataclass(frozen=True)
class Config:
    """Everything that, with the dataset, decides a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QATConfig = field(default_factory=lambda: QATConfig(**recipe.quantization({})))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)

    def __post_init__(self) -> None:
        if self.optimizer.optimizer is None:  # resolved here, so that what is stored says it
            rule = recipe.optimizer(self.training.table_dtype, self.training.tables)
            object.__setattr__(self, "optimizer", replace(self.optimizer, optimizer=rule))
        if 0 < self.training.batch_size < self.exchange.simulate_ranks:
            raise ValueError(
                f"simulate_ranks is {self.exchange.simulate_ranks}, more than the {self.training.batch_size} samples "
                "of a batch (batch_size), which the ranks share"
            )
        for name, default in (("scale_rate_factor", 1.0), ("pact_l2", None)):
            value = getattr(self.optimizer, name)
            learned = self.quantization.learned_fields
            if value != default and name not in learned:
                raise ValueError(f"{name} is {value}, but nothing is learned that it acts on; {_LEARNED[name]}")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values, as YAML and JSON write them."""
        return {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, sections: Mapping[str, Mapping[str, Any]], where: str = "configuration") -> "Config":
        """The inverse of `to_dict`; absent sections and fields take their defaults (bits: see `recipe.quantization`).

        Raises:
            UserError: an unknown section or field, a value of the wrong type, an impossible combination.
        """
        built = {}
        checked: dict[str, dict[str, Any]] = {"quantization": {}, "exchange": {}} | _checked(sections, where)
        tables = checked.get("training", {}).get("tables")
        for section, values in checked.items():
            for name in values:
                if name not in field_types(SECTIONS[section]) and (home := section_of(name)):
                    raise UserError(f"{where}: '{name}' is a field of section '{home}', not of '{section}'")
            left_open = recipe.left_open(section, values, tables)
            built[section] = build(SECTIONS[section], left_open | values, f"{where}, {section}")
        try:
            return cls(**built)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> "Config":
        """Defaults, then the YAML file at `path`, then `overrides` (field name -> value, as flags give them).

        Overriding `bits` overrides table_bits, mlp_bits and small_table_bits of the file too, unless they are given;
        with 32 also table_granularity and table_qscheme. Overriding `scale_refresh` leaves out the file's period of the
        other rule. Callbacks with a '+' are added to those of the file.

        Raises:
            UserError: as `from_dict`; or the file cannot be read.
        """
        where = str(path) if path else "configuration"
        return cls.from_dict(overridden(read_yaml(path) if path else {}, overrides or {}, where), where)


def overridden(sections: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The sections of a configuration with the fields of `overrides` replaced, as `Config.load` says.

    Raises:
        UserError: an unknown section or field.
    """
    sections, overrides = _checked(sections, where), dict(overrides)
    for name in recipe.overridden(overrides):
        sections.get("quantization", {}).pop(name, None)
    if "callbacks" in overrides and "callbacks" in (sections.get("training") or {}):
        overrides["callbacks"] = _added(overrides["callbacks"], sections["training"]["callbacks"], where)
    for name, value in overrides.items():
        section = section_of(name)
        if section is None:
            known = [n for kind in SECTIONS.values() for n in field_types(kind)]
            raise UserError(f"unknown field '{name}'{did_you_mean(name, known)}")
        sections.setdefault(section, {})[name] = value
    return sections


def _checked(sections: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """A copy of the sections; an empty one in YAML is None. Raises UserError unless all are known and hold fields."""
    for section, values in sections.items():
        if section not in SECTIONS:
            raise UserError(f"{where}: {_unknown_section(section)}")
        if values is not None and not isinstance(values, Mapping):
            raise UserError(f"{where}: section '{section}' is {values!r}, expected 'name: value' lines below it")
    return {section: dict(values or {}) for section, values in sections.items()}


def _added(given: Any, of_file: Any, where: str) -> tuple[str, ...]:
    """The callbacks of a flag, where they have a '+' beside those of the file, which may have one themselves."""
    base, named = (coerce("callbacks", value, tuple[str, ...]) for value in (of_file, given))
    try:
        return tuple(recipe.callbacks(named, recipe.callbacks(base)))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def section_of(field_name: str) -> str | None:
    """The section of `Config` that has this field."""
    return next((section for section, kind in SECTIONS.items() if field_name in field_types(kind)), None)


def _unknown_section(name: Any) -> str:
    if home := section_of(name):
        return f"'{name}' is a field of section '{home}' and belongs below it"
    return f"unknown section '{name}'{did_you_mean(str(name), SECTIONS)}"


SECTIONS: dict[str, type] = {section.name: section.type for section in fields(Config)}  # type: ignore[misc]
