"""Which blocks are compiled, and in which epochs they run compiled. The compiler itself takes minutes here: the tests
put torch's backend "eager" in its place, which traces the blocks all the same."""

from pathlib import Path

import pytest
import torch
from launching import events, train
from torch import nn

import cup
from train.errors import ConfigError, TrainError
from train.network.compiling import BlockCompiler, compile_errors, repeated_blocks
from train.network.models import build_model

CIFAR = {"model__name": "resnet20_cifar", "data__channels": 3, "data__image_size": 32, "data__resize_size": 32}


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch):
    """Yields the graphs that were compiled; torch compiles a block anew for evaluation, and for other widths."""
    graphs: list[torch.fx.GraphModule] = []
    compile_module = nn.Module.compile

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    limit = torch._dynamo.config.recompile_limit
    yield graphs
    torch.compiler.set_stance("default")
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = limit


def compiler(enough_steps: int, cuts: set[int] = frozenset(), sides: dict[int, int] | None = None) -> BlockCompiler:
    """Of a run of 6 epochs that may cut at the start of `cuts` and changes its image size in the epochs of `sides`."""
    return BlockCompiler(
        repeated_blocks(build_model("resnet20_cifar", 10)),
        enabled=True,
        enough_steps=enough_steps,
        epochs=6,
        may_cut=cuts.__contains__,
        image_side=lambda epoch: max((side for first, side in (sides or {}).items() if first <= epoch), default=32),
    )


@pytest.mark.parametrize(
    ("name", "number", "kinds"),
    [
        ("resnet50", 16, {"Bottleneck"}),
        ("resnet20_cifar", 9, {"CifarBlock"}),
        ("densenet121", 7, {"_DenseBlock", "_Transition"}),
        ("lenet", 0, set()),
    ],
)
def test_the_outermost_repeated_blocks_are_compiled(name: str, number: int, kinds: set[str]):
    blocks = repeated_blocks(build_model(name, 10))
    assert len(blocks) == number
    assert {type(block).__name__ for block in blocks} == kinds


def test_a_network_without_repeated_blocks_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"train.compile: found blocks, but the network has none .* it: none"):
        BlockCompiler(
            repeated_blocks(build_model("lenet", 10)),
            enabled=True,
            enough_steps=1,
            epochs=1,
            may_cut=lambda epoch: False,
            image_side=lambda epoch: 28,
        )


def test_blocks_are_compiled_only_where_enough_steps_lie_ahead():
    decide = compiler(enough_steps=30, cuts={2, 3})
    # 10 steps an epoch: one epoch ahead is too little, the four from epoch 3 on are enough, and then it stays so.
    found, compiled = [], False
    for epoch in range(1, 7):
        compiled, compiles = decide.at_epoch_start(epoch, 10, just_resized=epoch in (2, 3), was_compiled=compiled)
        found.append((compiled, compiles))
    assert found == [(False, False), (False, False), (True, True), (True, False), (True, False), (True, False)]


def test_a_cut_or_another_image_size_compiles_anew_or_not_at_all():
    decide = compiler(enough_steps=20, cuts={3}, sides={5: 40})
    assert decide.at_epoch_start(1, 10, just_resized=False, was_compiled=False) == (True, True)
    assert decide.at_epoch_start(2, 10, just_resized=False, was_compiled=True) == (True, False)
    assert decide.at_epoch_start(3, 10, just_resized=True, was_compiled=True) == (True, True)
    assert decide.at_epoch_start(4, 10, just_resized=False, was_compiled=True) == (True, False)
    assert decide.at_epoch_start(5, 10, just_resized=False, was_compiled=True) == (True, True)
    too_short = compiler(enough_steps=20, cuts={2, 3})
    assert too_short.at_epoch_start(2, 10, just_resized=True, was_compiled=True) == (False, False)


def test_a_resumed_run_compiles_where_the_undisturbed_one_did():
    """The epoch before the end has too few steps ahead to begin with, and runs compiled for the ones before it did."""
    undisturbed, resumed = compiler(enough_steps=60), compiler(enough_steps=60)
    decided = False
    for epoch in range(1, 6):
        decided, _ = undisturbed.at_epoch_start(epoch, 10, just_resized=False, was_compiled=decided)
    assert resumed.at_epoch_start(5, 10, just_resized=False, was_compiled=True) == (decided, True) == (True, True)


def kinds_of_blocks(model: nn.Module) -> int:
    """Equal blocks share what was compiled for one of them."""
    return len({repr(block) for block in repeated_blocks(model)})


def test_what_was_compiled_for_other_shapes_is_freed(monkeypatch: pytest.MonkeyPatch):
    decide, resets = compiler(enough_steps=20, cuts={3}), []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(epoch))
    for epoch in range(1, 5):
        decide.at_epoch_start(epoch, 10, just_resized=epoch == 3, was_compiled=epoch > 1)
    assert resets == [3]


def test_an_evaluation_runs_eagerly_and_training_goes_on_compiled(quick_compiler: list):
    model = build_model("resnet20_cifar", 10)
    always = {"enabled": True, "enough_steps": 1, "epochs": 1, "may_cut": bool, "image_side": lambda epoch: 32}
    decide = BlockCompiler(repeated_blocks(model), **always)
    decide.at_epoch_start(1, 10, just_resized=False, was_compiled=False)
    with decide.paused(), torch.no_grad():
        model.eval()(torch.zeros(2, 3, 32, 32))
    assert not quick_compiler
    model.train()(torch.zeros(2, 3, 32, 32))
    assert len(quick_compiler) == kinds_of_blocks(model) == 5


class Breaking(nn.Module):
    """torch can trace it in two pieces only."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return images + 1


def test_a_block_that_is_not_one_graph_is_an_error():
    model = nn.Sequential(Breaking(), Breaking())
    always = {"enabled": True, "enough_steps": 1, "epochs": 1, "may_cut": bool, "image_side": lambda epoch: 32}
    BlockCompiler(repeated_blocks(model), **always).at_epoch_start(1, 10, just_resized=False, was_compiled=False)
    with pytest.raises(TrainError, match=r"torch\.compile failed: .*; take --train.compile none"), compile_errors():
        model(torch.ones(2))


def test_a_run_with_compiled_blocks_computes_what_an_eager_one_does(tmp_path: Path, quick_compiler: list):
    eager = events(train(tmp_path / "eager", **CIFAR, train__epochs=2, prune__last_epoch=2), "epoch")
    options = {"train__compile": "blocks", "train__compile_steps": 1}
    compiled = events(train(tmp_path / "compiled", **CIFAR, **options, train__epochs=2, prune__last_epoch=2), "epoch")
    assert [line["compiled"] for line in compiled] == [True, True]
    cut = [build_model("resnet20_cifar", 10) for _ in compiled]
    for model, line in zip(cut, compiled, strict=True):
        cup.shrink_to(model, line["widths"], torch.empty(1, 3, 32, 32))
    assert len(quick_compiler) == sum(map(kinds_of_blocks, cut)), "in training alone"
    assert all(line["seconds"]["compile"] > 0 for line in compiled), "the first step at new widths is charged to it"
    assert not any(line["seconds"]["compile"] for line in eager)
    for key in ("train_loss", "top1", "widths"):
        assert [line[key] for line in compiled] == [line[key] for line in eager], key


def test_nothing_falls_back_to_eager_silently():
    """More shapes than the limit allows are an error; fullgraph makes one of code that cannot be traced, too."""
    decide = compiler(enough_steps=1)
    decide.at_epoch_start(1, 10, just_resized=False, was_compiled=False)

    class Block(nn.Linear):  # torch 2.11 leaves its own layers, compiled alone, to eager
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs).relu()

    block = Block(2, 2)
    block.compile(fullgraph=True, dynamic=False)
    with pytest.raises(TrainError, match=r"torch\.compile failed: .*; take --train.compile none"), compile_errors():
        for batch in range(1, torch._dynamo.config.recompile_limit + 2):
            block(torch.ones(batch, 2))
