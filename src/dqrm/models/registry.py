"""The register of models, and how one is built: from a configuration, or from the packed tensors of an artifact.

For a model of your own, subclass `ClickModel` and set `MODELS["its name"] = ItsClass` before it is trained or loaded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dqrm.config import Config, ModelConfig
from dqrm.errors import UserError
from dqrm.models.base import ClickModel, Layer, Plan, build_tables
from dqrm.models.dcn import DCN
from dqrm.models.dlrm import DLRM
from dqrm.options import build, did_you_mean
from dqrm.quant.config import STORAGES, registered, rows_per_scale
from dqrm.quant.linear import QuantLinear
from dqrm.quant.mixed import packed_collection
from dqrm.quant.mlp import QuantMLP
from dqrm.quant.packed import PackedLinear
from dqrm.quant.storage import Storage

MODELS: dict[str, type[ClickModel]] = {"dlrm": DLRM, "dcn": DCN}


def model_class(config: ModelConfig) -> type[ClickModel]:
    """The class that a configuration names.

    Raises:
        UserError: there is no model of that name.
    """
    if config.model not in MODELS:
        raise UserError(f"model is {config.model!r}{did_you_mean(config.model, MODELS)}")
    return MODELS[config.model]


def build_model(
    config: Config,
    num_dense: int,
    table_rows: Sequence[int],
    multi: Sequence[bool] | None = None,
    table_weight: Tensor | None = None,
) -> ClickModel:
    """The model of a configuration for data of these columns, with its initial weights.

    Args:
        num_dense, table_rows, multi: as of `ClickModel`.
        table_weight: the tables' initial weights [sum(table_rows), embedding_dim], not copied.

    Raises:
        UserError, ValueError: as `model_class` and `ClickModel`.
    """
    training, kind = config.training, model_class(config.model)
    given: Any = table_rows
    if table_weight is not None:
        given, multi = build_tables(table_rows, config.model, config.quantization, multi, weight=table_weight), None
    return kind(
        num_dense, given, multi=multi, config=config.model, qat=config.quantization, seed=training.seed,
        precision=training.precision, table_dtype=table_storage(config),
    )  # fmt: skip


def table_storage(config: Config) -> type[Storage]:
    """How the tables' master weights are stored."""
    storage: type[Storage] = registered(config.training.table_dtype, STORAGES)
    return storage.with_hot_rows(config.training.hot_rows)


# Models as the header of an artifact describes them.


def describe_model(
    model: ClickModel, table_bits: int | list[int], mlp_bits: int, granularity: str = "table",
    qscheme: str = "symmetric",
) -> dict[str, Any]:  # fmt: skip
    """What `packed_model` needs to know of a trained model besides its tensors, which have the given bits.

    Args:
        table_bits: of all tables, or a list with those of each where they differ.
        granularity, qscheme: of the tables' scales, as `QATConfig` names them.

    Raises:
        ValueError: the model is not of the class that its configuration names, so the artifact would load another one.
    """
    if not isinstance(model, model_class(model.config)):
        raise ValueError(f"model is '{model.config.model}' in the configuration of a {type(model).__name__}")
    layers = (layer for stack in model.stacks().values() for layer in stack.children())
    return {
        "config": model.config.header(),
        "num_dense": model.num_dense,
        "table_rows": list(model.tables.table_rows),
        "multi": model.tables.multi,
        "table_bits": table_bits,
        "table_granularity": granularity,
        "table_qscheme": qscheme,
        "mlp_bits": mlp_bits,
        "activation_bits": next(layer.activation_bits for layer in layers if isinstance(layer, QuantLinear)),
    }


def described_config(described: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a described model.

    Raises:
        KeyError: a field of its model is missing. UserError, ValueError: an unknown one, or an invalid value.
    """
    config: ModelConfig = build(ModelConfig, described["config"], "model")
    _ = [described["config"][name] for name in config.header()]
    return config


def described_plan(described: Mapping[str, Any]) -> Plan:
    """The stacks of a described model.

    Raises:
        KeyError, UserError, ValueError: as `described_config`, `model_class` and `ClickModel.plan`.
    """
    config = described_config(described)
    return model_class(config).plan(config, described["num_dense"], len(described["table_rows"]))


def weight_count(described: Mapping[str, Any]) -> int:
    """The number of parameters of a described model: rows of tables, weights and biases."""
    count: int = sum(described["table_rows"]) * described["config"]["embedding_dim"]
    layers = (layer for stack in described_plan(described).values() for layer in stack)
    return count + sum((layer.inputs + (layer.bias or layer.batch_norm)) * layer.outputs for layer in layers)


def table_groups(described: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Of a described model, the rows of a table that share a scale (None: all), and whether it has zero points.

    Older descriptions do not have the first where it is 1.

    Raises:
        ValueError: an unknown granularity or scheme.
    """
    qscheme = described.get("table_qscheme", "symmetric")
    if qscheme not in ("symmetric", "affine"):
        raise ValueError(f"table_qscheme {str(qscheme)[:40]!r}")
    return rows_per_scale(described.get("table_granularity", "table")), qscheme == "affine"


def packed_model(described: Mapping[str, Any], tensors: dict[str, Tensor]) -> ClickModel:
    """The described model, in eval mode, of packed tensors by module path: those of `tables`, and for each linear layer
    of a stack those of `PackedLinear`.

    Raises:
        KeyError: a tensor is missing. ValueError: one has the wrong shape, or belongs to no module. Or as
            `described_plan`.
    """
    config, tensors = described_config(described), dict(tensors)
    stacks = {
        path: _packed_stack(path, layers, described, tensors) for path, layers in described_plan(described).items()
    }
    scaled: dict[str, Any] = {}
    if table_groups(described)[0] not in (None, 1):  # else the number of scales says it, as in older files
        scaled["rows_per_scale"] = table_groups(described)[0]
    names = ("codes", "scale", "zero_point") if table_groups(described)[1] else ("codes", "scale")
    tables = packed_collection(
        described["table_rows"],
        config.embedding_dim,
        described["table_bits"],
        lambda prefix, bits, numbers: {name: tensors.pop(f"tables.{prefix}{name}") for name in names} | scaled,
        multi=described["multi"],
        pooling=config.pooling,
    )
    if tensors:
        raise ValueError(f"'{next(iter(tensors))}' is not part of the model")
    return model_class(config).from_parts(config, described["num_dense"], tables, stacks)


def _packed_stack(
    path: str, layers: Sequence[Layer], described: Mapping[str, Any], tensors: dict[str, Tensor]
) -> QuantMLP:
    modules: list[nn.Module] = []
    for layer in layers:
        prefix = f"{path}.{len(modules)}."
        modules.append(
            PackedLinear(
                layer.inputs,
                layer.outputs,
                bits=described["mlp_bits"],
                codes=tensors.pop(prefix + "codes"),
                scale=tensors.pop(prefix + "scale"),
                bias=tensors.pop(prefix + "bias", None),
                activation_bits=described["activation_bits"],
                activation_scale=tensors.pop(prefix + "activation_scale", None),
            )
        )
        if layer.relu:
            modules.append(nn.ReLU())
    return QuantMLP(*modules)
