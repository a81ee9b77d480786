"""LoRA (Hu et al. 2021, arXiv:2106.09685) over the decoder's fused projections.

An adapter is held as the decoder uses it: for each layer and each fused product (qkv, o, gate_up, down) one
stacked A of all its targets and one B per target. `state` and `from_state` speak PEFT's names. This module
knows no files, no jobs and no requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fortwo.errors import InvalidAdapter
from fortwo.models.functions import dropout as drop
from fortwo.models.products import frozen_product, product
from fortwo.models.tiles import Tiles

if TYPE_CHECKING:
    from fortwo.models.decoder import DecoderConfig
    from fortwo.models.forms import Frozen

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
TARGETS: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)
_PARENT = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in TARGETS}

# PEFT options that change what is computed, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layers_pattern": (None, [], "", "layers"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # the rest change the base
}


@dataclass(frozen=True)
class LoraConfig:
    """r: rank; alpha: the update is scaled by alpha / r; dropout: on the input of A while training;
    layers: which layers have an update (PEFT's layers_to_transform), None for all."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    layers: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def to_peft(self, base_model: str) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "layers_to_transform": None if self.layers is None else list(self.layers),
            "layers_pattern": None if self.layers is None else "layers",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoraConfig:
        """Read adapter_config.json. Raises InvalidAdapter naming an option that cannot be served."""
        if config.get("peft_type") != "LORA":
            raise InvalidAdapter(f"peft_type {config.get('peft_type')!r} is not LORA", param="peft_type")
        for option, neutral in _NEUTRAL.items():
            if config.get(option) not in neutral:
                raise InvalidAdapter(
                    f"{option} = {config[option]!r} is not supported",
                    param=option,
                    hint="Merge the adapter into its base with PEFT, or train it again without this option.",
                )
        targets = config.get("target_modules")
        if targets == "all-linear":
            targets = TARGETS
        if not isinstance(targets, list | tuple | set) or not targets:
            raise InvalidAdapter(f"target_modules = {targets!r} names no module", param="target_modules")
        names = {str(target).rsplit(".", 1)[-1] for target in targets}
        if unknown := sorted(names - set(TARGETS)):
            raise InvalidAdapter(
                f"target_modules {unknown} do not exist in the supported decoders",
                param="target_modules",
                hint=f"Known modules: {', '.join(TARGETS)}.",
            )
        r, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(r, int) or r < 1:
            raise InvalidAdapter(f"r = {r!r} is not a positive whole number", param="r")
        if not isinstance(alpha, int | float):
            raise InvalidAdapter(f"lora_alpha = {alpha!r} is not a number", param="lora_alpha")
        layers = config.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]
        return cls(
            r=r,
            alpha=alpha,
            dropout=float(config.get("lora_dropout") or 0.0),
            layers=tuple(sorted(layers)) if layers else None,
            target_modules=tuple(name for name in TARGETS if name in names),
        )


@dataclass
class LoraGroup:
    """The update of one fused product. A_RI stacks the A of each target (rank r each);
    Bs holds (first, past-last output column of the fused product, B (out, r))."""

    A_RI: Tensor
    Bs: list[tuple[int, int, Tensor]]


class Lora:
    """One adapter's tensors, by layer and fused product."""

    def __init__(self, config: LoraConfig, layers: list[dict[str, LoraGroup]]) -> None:
        self.config = config
        self.layers = layers

    @classmethod
    def init(cls, config: LoraConfig, decoder: DecoderConfig, seed: int, device: torch.device | str = "cpu") -> Lora:
        """A as in PEFT (Kaiming uniform, a = sqrt(5)), B zero: at the start the adapter changes nothing."""
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for index in range(decoder.layers):
            groups = {}
            for group, names in GROUPS.items():
                chosen = [name for name in names if name in config.target_modules]
                if not chosen or (config.layers is not None and index not in config.layers):
                    continue
                in_features = decoder.in_features(group)
                bound = 1 / math.sqrt(in_features)
                A_RI = torch.empty(len(chosen) * config.r, in_features).uniform_(-bound, bound, generator=generator)
                Bs = [
                    (first, last, torch.zeros(last - first, config.r, device=device))
                    for first, last in (decoder.columns(name) for name in chosen)
                ]
                groups[group] = LoraGroup(A_RI.to(device), Bs)
            layers.append(groups)
        return cls(config, layers)

    def parameters(self) -> list[Tensor]:
        return [
            tensor
            for groups in self.layers
            for group in groups.values()
            for tensor in (group.A_RI, *(B for *_, B in group.Bs))
        ]

    def flatten(self) -> Tensor:
        """All parameters end to end (N,), to optimize as one; they become views of it, and their gradients of its."""
        parameters = self.parameters()
        flat_N = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_(True)
        flat_N.grad = torch.zeros_like(flat_N)
        sizes = [parameter.numel() for parameter in parameters]
        parts = zip(parameters, flat_N.detach().split(sizes), flat_N.grad.split(sizes), strict=True)
        for parameter, part, gradient in parts:
            parameter.data = part.view(parameter.shape)
            parameter.requires_grad_(True).grad = gradient.view(parameter.shape)
        return flat_N

    def state(self) -> dict[str, Tensor]:
        """PEFT's names and shapes; A tensors are views of the stacked ones."""
        r, tensors = self.config.r, {}
        for index, groups in enumerate(self.layers):
            for group, names in GROUPS.items():
                if group not in groups:
                    continue
                chosen = [name for name in names if name in self.config.target_modules]
                for place, name in enumerate(chosen):
                    prefix = f"base_model.model.model.layers.{index}.{_PARENT[name]}.{name}"
                    tensors[f"{prefix}.lora_A.weight"] = groups[group].A_RI[place * r : (place + 1) * r].detach()
                    tensors[f"{prefix}.lora_B.weight"] = groups[group].Bs[place][2].detach()
        return tensors

    @classmethod
    def from_state(
        cls,
        config: LoraConfig,
        decoder: DecoderConfig,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
    ) -> Lora:
        """The adapter in PEFT's names, as fp32 on `device`.

        Raises InvalidAdapter naming the first tensor that is missing, foreign or of the wrong shape.
        """
        lora = cls.init(config, decoder, seed=0, device=device)
        wanted = lora.state()
        if foreign := sorted(set(tensors) - set(wanted)):
            raise InvalidAdapter(
                f"tensor {foreign[0]!r} has no place in this base model",
                hint="Check that the adapter was trained on this base and lists every target module.",
            )
        with torch.no_grad():
            for name, place in wanted.items():
                if name not in tensors:
                    raise InvalidAdapter(f"tensor {name!r} is missing from the adapter")
                if tensors[name].shape != place.shape:
                    raise InvalidAdapter(
                        f"tensor {name!r} is {tuple(tensors[name].shape)}, this base needs {tuple(place.shape)}"
                    )
                place.copy_(tensors[name])
        return lora


class Update(Protocol):
    """What adapters add to some rows of a forward, while serving."""

    def changes(self, layer: int, group: str) -> bool:
        """Whether there is anything to add to this fused product."""

    def add_to(self, y_TO: Tensor, x_TI: Tensor, layer: int, group: str) -> None:
        """Add it in place. No gradients."""


@dataclass(frozen=True)
class Segment:
    """The rows of a forward that one adapter answers for; rows None means all of them."""

    lora: Lora
    rows: Tensor | None = None

    def changes(self, layer: int, group: str) -> bool:
        return group in self.lora.layers[layer]

    def add_to(self, y_TO: Tensor, x_TI: Tensor, layer: int, group: str) -> None:
        update, config, rows = self.lora.layers[layer][group], self.lora.config, self.rows
        h_TR = product(x_TI if rows is None else x_TI[rows], update.A_RI)
        for place, (first, last, B_Or) in enumerate(update.Bs):
            h_Tr = h_TR[:, place * config.r : (place + 1) * config.r]
            if rows is None:
                y_TO[:, first:last].addmm_(h_Tr, B_Or.t(), alpha=config.scale)
            else:
                y_TO[rows, first:last] += config.scale * (h_Tr @ B_Or.t())


class _LoraProduct(torch.autograd.Function):
    """y = x W' + (drop(x) scale A') B' for one fused product, with gradients for x, A and every B.

    dropped: (probability, seed) of the dropout, or None. All products are in x's type; the Bs are laid out as one
    matrix (out, all ranks), zero outside their columns, so that each product is one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor | Tiles,
        dropped: tuple[float, int] | None,
        scale: float,
        columns: Any,
        A_RI: Tensor,
        *Bs: Tensor,
    ) -> Tensor:
        r = Bs[0].shape[1]
        ctx.dtype, A_RI = A_RI.dtype, torch.mul(A_RI, scale, out=torch.empty_like(A_RI, dtype=x_TI.dtype))
        B_OR = x_TI.new_zeros(weight_OI.shape[0], len(A_RI))
        for place, ((first, last), B_Or) in enumerate(zip(columns, Bs, strict=True)):
            B_OR[first:last, place * r : (place + 1) * r] = B_Or
        h_TR = product(x_TI if dropped is None else drop(x_TI, *dropped), A_RI)
        y_TO = product(x_TI, weight_OI, (h_TR, B_OR))
        ctx.save_for_backward(x_TI, h_TR, A_RI, B_OR)
        ctx.weight_OI, ctx.dropped, ctx.scale, ctx.columns, ctx.r = weight_OI, dropped, scale, columns, r
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> Any:
        x_TI, h_TR, A_RI, B_OR = ctx.saved_tensors
        grad_h_TR = product(grad_TO, B_OR.t())
        grad_B_RO = product(h_TR.t(), grad_TO.t(), dtype=ctx.dtype)
        grad_Bs = [
            grad_B_RO[place * ctx.r : (place + 1) * ctx.r, first:last].t()
            for place, (first, last) in enumerate(ctx.columns)
        ]
        seen_TI = x_TI if ctx.dropped is None else drop(x_TI, *ctx.dropped)
        grad_A_RI = product(grad_h_TR.t(), seen_TI.t(), dtype=ctx.dtype).mul_(ctx.scale)
        if not ctx.needs_input_grad[0]:
            return (None, None, None, None, None, grad_A_RI, *grad_Bs)
        if ctx.dropped is None:
            grad_x_TI = product(grad_TO, ctx.weight_OI.t(), (grad_h_TR, A_RI.t()))
        else:
            grad_x_TI = product(grad_TO, ctx.weight_OI.t()).add_(drop(grad_h_TR @ A_RI, *ctx.dropped))
        return (grad_x_TI, None, None, None, None, grad_A_RI, *grad_Bs)


def lora_product(
    x_TI: Tensor, weight_OI: Frozen, layer: int, group: str, segments: Iterable[Update], dropout: bool = False
) -> Tensor:
    """One fused product with the updates of the adapters in `segments`.

    Training (gradients enabled) takes exactly one segment over all rows; serving takes any number. `dropout`
    applies the adapter's dropout, one draw for the fused product.
    """
    segments = [segment for segment in segments if segment.changes(layer, group)]
    if torch.is_grad_enabled() and segments:
        (segment,) = segments
        assert isinstance(segment, Segment), "only one adapter over all rows has gradients"
        update, config = segment.lora.layers[layer][group], segment.lora.config
        drawn = (config.dropout, int(torch.randint(2**32, ()))) if dropout and config.dropout else None
        columns = tuple((first, last) for first, last, _ in update.Bs)
        y: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
            x_TI, weight_OI, drawn, config.scale, columns, update.A_RI, *(B for *_, B in update.Bs)
        )
        return y
    y_TO = frozen_product(x_TI, weight_OI)
    for segment in segments:
        segment.add_to(y_TO, x_TI, layer, group)
    return y_TO
