"""The optimizer and its learning rate, a pure function of progress."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from train.errors import ConfigError

OptimizerName = Literal["sgd", "apex_sgd", "apex_lamb"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: OptimizerName = "sgd"
    """sgd = PyTorch's fused SGD; apex_sgd and apex_lamb = FusedSGD and FusedLAMB of NVIDIA's apex, where that is
    installed and on a GPU."""
    lr: float = 0.1
    """Learning rate at its highest, for the whole batch of all ranks."""
    momentum: float = 0.9
    """SGD momentum, 0 to 1."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty."""
    decay_norms_and_biases: bool = True
    """Whether weight decay also acts on normalisation layers and biases (the paper's recipe does)."""
    schedule: Literal["step", "cosine"] = "step"
    """step = times gamma at each milestone (the paper's); cosine = down to zero at the last epoch."""
    milestones: tuple[int, ...] = (30, 60)
    """Epochs finished when the step schedule lowers the rate, ascending."""
    gamma: float = 0.1
    """Factor of the step schedule at each milestone."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero, either schedule."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        ascending = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        checks = [
            ("lr", self.lr > 0, "a number above 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("nesterov", not (self.nesterov and self.momentum == 0), "true only with momentum above 0"),
            ("weight_decay", self.weight_decay >= 0, "a number from 0"),
            ("milestones", ascending and min(self.milestones, default=1) > 0, "ascending epochs above 0"),
            ("gamma", 0 < self.gamma <= 1, "above 0, up to 1"),
            ("warmup_epochs", self.warmup_epochs >= 0, "a number from 0"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


def build_optimizer(
    model: nn.Module, config: OptimConfig, head: Collection[str] = (), head_lr: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters; two parameter groups where norms and biases are not decayed.

    head: names of parameters whose learning rate is `head_lr` where the others' is `config.lr`, and follows its
    schedule; they have groups of their own. Raises ConfigError where apex is asked for and missing, or the parameters
    are on no GPU.
    """
    decayed = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if not config.decay_norms_and_biases:
        spared = _norms_and_biases(model)
        groups[0]["params"] = [p for p in decayed if id(p) not in spared]
        groups.append({"params": [p for p in decayed if id(p) in spared], "weight_decay": 0.0})
    if head_lr is not None:
        groups = _with_own_rate(groups, [dict(model.named_parameters())[name] for name in head], head_lr / config.lr)
    settings: dict[str, Any] = {"lr": config.lr}
    if config.name != "apex_lamb":
        settings |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, fused=True, **settings)
    else:
        if not all(_is_on_gpu(parameter) for group in groups for parameter in group["params"]):
            raise ConfigError(f"optim.name: {config.name} needs a GPU, this run has none; allowed here: sgd")
        if config.name == "apex_lamb":
            settings |= {"max_grad_norm": math.inf}  # train.clip_norm clips, for every optimizer alike
        optimizer = _apex_optimizer(config.name)(groups, **settings)
    reset_state(optimizer)
    return optimizer


def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Start momentum at zero, in place, which makes the same first step as none at all.

    Left to itself, fused SGD allocates momentum without filling it; a first step that the gradient scaler skips (an
    overflow in fp16) would then leave garbage in it. apex's FusedSGD overwrites the momentum of a whole group where
    that of its last parameter is missing.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # FusedLAMB counts here, for the correction of averages that began at zero
        if group.get("momentum", 0) > 0:
            for parameter in group["params"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def learning_rate(config: OptimConfig, progress: float, epochs: int) -> float:
    """The learning rate when `progress` epochs (a fraction counts) out of `epochs` are done."""
    if progress < config.warmup_epochs:
        return config.lr * progress / config.warmup_epochs
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(progress >= milestone for milestone in config.milestones)
    share = (progress - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-12)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set it in every group, in place; a group with a factor of its own has that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _with_own_rate(
    groups: list[dict[str, Any]], parameters: list[nn.Parameter], lr_factor: float
) -> list[dict[str, Any]]:
    """The groups without these parameters, and behind them groups of these alone."""
    own = {id(parameter) for parameter in parameters}
    others = [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    theirs = [group | {"params": [p for p in group["params"] if id(p) in own]} for group in groups]
    return [*others, *(group | {"lr_factor": lr_factor} for group in theirs if group["params"])]


def _is_on_gpu(parameter: nn.Parameter) -> bool:
    return parameter.device.type == "cuda"


def _apex_optimizer(name: OptimizerName) -> type[torch.optim.Optimizer]:
    """NVIDIA's apex is built from source or comes in NVIDIA's containers; the apex of PyPI is another project."""
    try:
        import amp_C  # noqa: F401  (its CUDA kernels, which a build may lack)
        from apex import optimizers
    except ImportError as error:
        raise ConfigError(
            f"optim.name: {name} needs NVIDIA's apex with its CUDA extensions, which is not installed ({error}); build "
            "it from github.com/NVIDIA/apex (the package apex on PyPI is another project), or take sgd"
        ) from error
    return {"apex_sgd": optimizers.FusedSGD, "apex_lamb": optimizers.FusedLAMB}[name]


def _norms_and_biases(model: nn.Module) -> set[int]:
    """Identities of the parameters of normalisation layers and of all biases."""
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name == "bias"
    }
