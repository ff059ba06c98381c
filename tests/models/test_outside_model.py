"""A model that somebody else registers trains, resumes, is packed, loaded and described; nothing in dqrm knows it."""

import json

import pytest
import torch

import dqrm
from conftest import tiny
from dqrm import MODELS, ClickModel, Config, ModelConfig, Run, UserError
from dqrm.distributed.simulated import SimulatedRanks
from dqrm.models.base import mlp
from dqrm.models.registry import model_class
from test_cli import run as command


class Sums(ClickModel):
    """The sum of the tables' vectors and a projection of the dense columns, through an MLP."""

    @classmethod
    def plan(cls, config, num_dense, tables):
        dense = {"dense_part": mlp((num_dense, config.embedding_dim), last_relu=False)} if num_dense else {}
        return {**dense, "tower.main": mlp((config.embedding_dim, *config.top_mlp), last_relu=False)}

    def logits(self, dense, vectors):
        x = vectors.sum(1)
        if self.num_dense:
            x = x + self.dense_part(dense)
        return self.tower.main(x).squeeze(1)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS, "sums", Sums)


def config(bits=4, **training):
    base = tiny(bits, **training)
    return Config(ModelConfig(model="sums", embedding_dim=4, top_mlp=(8, 1)), base.quantization, base.optimizer,
                  base.training)  # fmt: skip


@pytest.mark.parametrize("data", ["generated", "bags_data"])
def test_it_trains_and_its_artifact_answers_as_the_run(data, request, tmp_path, capsys):
    dataset = request.getfixturevalue(data)
    dqrm.train(dataset, tmp_path / "run", config(max_steps=20))
    model, _ = Run.open(tmp_path / "run").load_model()
    assert type(model) is Sums
    assert dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm")["largest_difference"] == 0
    loaded = dqrm.load(tmp_path / "m.dqrm")
    assert isinstance(loaded, Sums)
    batch = next(iter(dataset.split("test").batches(50)))
    with torch.no_grad():
        assert torch.equal(loaded(batch.dense, batch.ids, batch.bags), model(batch.dense, batch.ids, batch.bags))
    code, out, _ = command(capsys, "info", tmp_path / "m.dqrm")
    assert code == 0
    assert "Sums of embedding dim 4" in out
    code, out, _ = command(capsys, "info", tmp_path / "m.dqrm", "--json")
    assert json.loads(out)["model"]["config"]["model"] == "sums"


def test_it_is_quantized_after_training_exported_and_refused_by_name_where_no_graph_is_written(generated, tmp_path):
    dqrm.train(generated, tmp_path / "run", config(32, max_steps=20))
    found = dqrm.export_run(tmp_path / "run", tmp_path / "m.dqrm", ptq=dqrm.PTQConfig(bits=8))
    assert found["largest_difference"] < 1e-6
    dqrm.export_run(tmp_path / "m.dqrm", tmp_path / "m.pt2")
    pytest.importorskip("onnx", reason="the extra dqrm[onnx] is not installed")
    with pytest.raises(UserError, match=r"model 'sums' has no ONNX graph, expected one of dlrm, dcn"):
        dqrm.export_run(tmp_path / "m.dqrm", tmp_path / "m.onnx")


def test_its_ranks_exchange_and_its_run_resumes(generated, tmp_path, monkeypatch):
    settings = config(max_steps=12, checkpoint_every=5)
    settings = Config(settings.model, settings.quantization, settings.optimizer, settings.training,
                      dqrm.ExchangeConfig(simulate_ranks=2))  # fmt: skip
    whole = dqrm.train(generated, tmp_path / "whole", settings)
    finish, calls = SimulatedRanks.finish, iter(range(1000))

    def stop(exchange):
        if next(calls) == 8:
            raise RuntimeError("killed")
        return finish(exchange)

    monkeypatch.setattr(SimulatedRanks, "finish", stop)
    with pytest.raises(RuntimeError, match="killed"):
        dqrm.train(generated, tmp_path / "cut", settings)
    cut = dqrm.resume(tmp_path / "cut")
    assert cut["best"] == whole["best"]


def test_redrawn_tables_are_others_and_so_are_their_scales(generated):
    model = Sums(13, generated.table_rows, config=config().model, seed=1)
    first, scale = model.tables.weight.detach().clone(), model.tables.current_scale().clone()
    model.redraw_tables(1, epoch=2)
    assert not torch.equal(model.tables.weight, first)
    assert not torch.equal(model.tables.current_scale(), scale)
    assert torch.equal(model.tables.current_scale(), model.tables.table(0).abs().amax().new_tensor(
        [model.tables.table(number).abs().amax() / 7 for number in range(26)]))  # fmt: skip
    model.redraw_tables(1)
    assert torch.equal(model.tables.weight, first)
    assert torch.equal(model.tables.current_scale(), scale)


def test_unknown_names_are_refused(generated, tmp_path):
    wrong = Config(model=ModelConfig(model="sum"))
    with pytest.raises(UserError, match="model is 'sum'; did you mean 'sums'"):
        dqrm.train(generated, tmp_path / "run", wrong)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="model is 'x'; known are dlrm, dcn"):
        model_class(ModelConfig(model="x"))


def test_a_model_takes_the_tables_that_it_is_given():
    tables = dqrm.QuantEmbeddingBagCollection([5, 3], 4)
    before = tables.weight.detach().clone()
    model = Sums(0, tables, config=config().model, seed=3)
    assert model.tables is tables
    assert torch.equal(tables.weight, before)
