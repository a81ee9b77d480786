"""LoRA (Hu et al. 2021, arXiv:2106.09685) over the decoder's fused projections.

An adapter is held as the decoder uses it: for each layer and each fused product (qkv, o, gate_up, down) one
stacked A of all its targets and one B per target; with DoRA (Liu et al. 2024, arXiv:2402.09353) one vector of
magnitudes per target, too. `state` and `from_state` speak PEFT's names. This module knows no files, no jobs and no
requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fortwo.errors import InvalidAdapter
from fortwo.kernels.operations import dropout as drop
from fortwo.nn.lora_config import MERGE, LoraConfig
from fortwo.nn.lora_group import LoraGroup, Place
from fortwo.quantization.matmul import frozen_product, product
from fortwo.quantization.tiles import Tiles

if TYPE_CHECKING:
    from fortwo.nn.config import Shape
    from fortwo.quantization.formats import Frozen


MAGNITUDE = "lora_magnitude_vector"  # PEFT's name of DoRA's magnitudes
Seeds = Mapping[tuple[int, str], "int | Tensor"]  # of dropouts, by layer and fused product


class Lora:
    """One adapter's tensors, by layer and fused product."""

    def __init__(self, config: LoraConfig, layers: list[dict[str, LoraGroup]]) -> None:
        self.config = config
        self.layers = layers
        self.flat_N: Tensor | None = None

    @classmethod
    def init(cls, config: LoraConfig, network: Shape, seed: int, device: torch.device | str = "cpu") -> Lora:
        """A as in PEFT (Kaiming uniform, a = sqrt(5)), B zero: at the start the adapter changes nothing, with DoRA as
        soon as `take_magnitudes` was called."""
        generator = torch.Generator().manual_seed(seed)

        def start(places: tuple[Place, ...], inputs: int) -> LoraGroup:
            bound = 1 / math.sqrt(inputs)
            A_RI = torch.empty(places[-1].rows.stop, inputs).uniform_(-bound, bound, generator=generator)
            Bs = [torch.zeros(place.outputs, place.rank, device=device) for place in places]
            scaled = places if config.use_dora else ()
            return LoraGroup(
                places, A_RI.to(device), Bs, [torch.ones(place.outputs, device=device) for place in scaled]
            )

        return cls(
            config,
            [
                {name: start(places, network.in_features(name)) for name, places in groups.items()}
                for groups in _places(config, network)
            ],
        )

    @torch.no_grad()
    def take_magnitudes(self, frozen: Callable[[int, str], Frozen]) -> None:
        """Set DoRA's magnitudes to the norms of the weights as they are with the update, so that nothing is scaled.
        frozen: the network's weight of a layer's fused product."""
        for layer, groups in enumerate(self.layers):
            for name, group in groups.items() if self.config.use_dora else ():
                norms_O = group.norms(frozen(layer, name))
                for place, magnitude_o in zip(group.places, group.magnitudes, strict=True):
                    magnitude_o.copy_(norms_O[place.columns])

    def to(self, device: torch.device) -> Lora:
        """The adapter on `device`: itself if it is there, else a copy."""
        if all(tensor.device == device for tensor in self.parameters()):
            return self
        return Lora(self.config, [{name: group.to(device) for name, group in groups.items()} for groups in self.layers])

    def parameters(self) -> list[Tensor]:
        return [tensor for groups in self.layers for group in groups.values() for tensor in group.tensors]

    def flatten(self) -> Tensor:
        """All parameters end to end (N,), to optimize as one; they become views of it, and their gradients of its: a
        backward adds to these where they are."""
        parameters = self.parameters()
        flat_N = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_(True)
        flat_N.grad = torch.zeros_like(flat_N)
        sizes = [parameter.numel() for parameter in parameters]
        parts = zip(parameters, flat_N.detach().split(sizes), flat_N.grad.split(sizes), strict=True)
        for parameter, part, gradient in parts:
            parameter.data = part.view(parameter.shape)
            parameter.requires_grad_(True).grad = gradient.view(parameter.shape)
        self.flat_N = flat_N
        return flat_N

    def freeze(self) -> None:
        """No gradients from here on, nor memory for them."""
        self.flat_N = None
        for parameter in self.parameters():
            parameter.requires_grad_(False).grad = None

    def seeds(self) -> Seeds:
        """Drawn for the dropout of each product that the adapter changes; none where nothing drops."""
        changed = [(layer, group) for layer, groups in enumerate(self.layers) for group in groups]
        products = changed if self.config.dropout else []
        return dict(zip(products, torch.randint(2**32, (len(products),)).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """PEFT's names and shapes; A tensors are views of the stacked ones."""
        tensors: dict[str, Tensor] = {}
        for group in (group for groups in self.layers for group in groups.values()):
            for at, place in enumerate(group.places):
                found = [group.A_RI[place.rows], group.Bs[at], *group.magnitudes[at : at + 1]]
                tensors |= zip(_names(place), (tensor.detach() for tensor in found), strict=False)
        return tensors

    @classmethod
    def from_state(
        cls,
        config: LoraConfig,
        network: Shape,
        tensors: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
    ) -> Lora:
        """The adapter in PEFT's names, as fp32 on `device`; B tensors that are so already are not copied.

        Raises InvalidAdapter naming the first tensor that is missing, foreign or of the wrong shape.
        """
        check_shapes(config, network, tensors)
        layers = _places(config, network)

        def take(places: tuple[Place, ...]) -> LoraGroup:
            def given(kind: int) -> list[Tensor]:
                return [tensors[_names(place)[kind]].detach().to(device, torch.float32) for place in places]

            return LoraGroup(places, torch.cat(given(0)), given(1), given(2) if config.use_dora else [])

        return cls(
            config,
            [{group: take(places) for group, places in groups.items()} for groups in layers],
        )


class Update(Protocol):
    """What adapters change in some rows of a forward, while serving."""

    def changes(self, layer: int, group: str) -> bool:
        """Whether they change this fused product."""

    def apply(self, y_TO: Tensor, x_TI: Tensor, weight_OI: Frozen, layer: int, group: str) -> None:
        """Change y, the product of x with the frozen weight, in place. No gradients."""


@dataclass(frozen=True)
class Segment:
    """The rows of a forward that one adapter answers for; all of them unless said."""

    lora: Lora
    rows: Tensor | slice = field(default_factory=lambda: slice(None))

    @property
    def everywhere(self) -> bool:
        """Whether all rows are the adapter's."""
        return isinstance(self.rows, slice) and self.rows == slice(None)

    def changes(self, layer: int, group: str) -> bool:
        return group in self.lora.layers[layer]

    def apply(self, y_TO: Tensor, x_TI: Tensor, weight_OI: Frozen, layer: int, group: str) -> None:
        update, rows = self.lora.layers[layer][group], self.rows
        h_TR = product(x_TI[rows], update.A_RI.to(x_TI.dtype))
        for place, B_Or in zip(update.places, update.Bs, strict=True):
            h_Tr, B_Or = h_TR[:, place.rows], B_Or.to(x_TI.dtype)
            if isinstance(rows, slice):
                y_TO[rows, place.columns].addmm_(h_Tr, B_Or.t(), alpha=place.scale)
            else:
                y_TO[rows, place.columns] += place.scale * (h_Tr @ B_Or.t())
        if update.magnitudes:
            y_TO[rows] *= update.output_scale(weight_OI)


def in_training(segments: Sequence[Update]) -> Lora | None:
    """The adapter that gets gradients: the only one, over all rows."""
    if not torch.is_grad_enabled() or len(segments) != 1:
        return None
    (segment,) = segments
    return segment.lora if isinstance(segment, Segment) and segment.everywhere else None


class _LoraProduct(torch.autograd.Function):
    """y = x W' + drop(x) A' (scale B)' for one fused product, with gradients for x, A and every B.

    dropped: (probability, seed) of the dropout, or None. All products are in x's type; the Bs are laid out as one
    matrix (out, all ranks), zero outside their columns, so that each product is one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor | Tiles,
        dropped: tuple[float, int | Tensor] | None,
        places: tuple[Place, ...],
        A_RI: Tensor,
        *Bs: Tensor,
    ) -> Tensor:
        ctx.dtype, A_RI = A_RI.dtype, A_RI.to(x_TI.dtype)
        B_OR = x_TI.new_zeros(weight_OI.shape[0], len(A_RI))
        for place, B_Or in zip(places, Bs, strict=True):
            torch.mul(B_Or, place.scale, out=B_OR[place.columns, place.rows])
        h_TR = product(x_TI if dropped is None else drop(x_TI, *dropped), A_RI)
        y_TO = product(x_TI, weight_OI, (h_TR, B_OR))
        ctx.save_for_backward(x_TI, h_TR, A_RI, B_OR)
        ctx.weight_OI, ctx.dropped, ctx.places = weight_OI, dropped, places
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> Any:
        x_TI, h_TR, A_RI, B_OR = ctx.saved_tensors
        grad_h_TR = product(grad_TO, B_OR.t())
        grad_B_RO = product(h_TR.t(), grad_TO.t(), dtype=ctx.dtype)
        grad_Bs = [grad_B_RO[place.rows, place.columns].mul_(place.scale).t() for place in ctx.places]
        seen_TI = x_TI if ctx.dropped is None else drop(x_TI, *ctx.dropped)
        grad_A_RI = product(grad_h_TR.t(), seen_TI.t(), dtype=ctx.dtype)
        if not ctx.needs_input_grad[0]:
            return (None, None, None, None, grad_A_RI, *grad_Bs)
        if ctx.dropped is None:
            grad_x_TI = product(grad_TO, ctx.weight_OI.t(), (grad_h_TR, A_RI.t()))
        else:
            grad_x_TI = product(grad_TO, ctx.weight_OI.t()).add_(drop(product(grad_h_TR, A_RI.t()), *ctx.dropped))
        return (grad_x_TI, None, None, None, grad_A_RI, *grad_Bs)


class _Dropout(torch.autograd.Function):
    """`kernels.operations.dropout` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int | Tensor) -> Tensor:
        ctx.told = p, seed
        return drop(x, p, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return drop(grad, *ctx.told), None, None


def _dora_product(
    x_TI: Tensor, weight_OI: Frozen, dropped: tuple[float, int | Tensor] | None, update: LoraGroup
) -> Tensor:
    """y = x W' + (c - 1) drop(x) W' + c drop(x) A' (scale B)' as PEFT trains it, c being DoRA's scale of the outputs.
    There are gradients for x, A, every B and the magnitudes."""
    seen_TI: Tensor = x_TI if dropped is None else _Dropout.apply(x_TI, *dropped)  # type: ignore[no-untyped-call]
    y_TO: Tensor = _LoraProduct.apply(seen_TI, weight_OI, None, update.places, update.A_RI, *update.Bs)  # type: ignore[no-untyped-call]
    y_TO = (y_TO * update.output_scale(weight_OI)).to(x_TI.dtype)
    return y_TO if dropped is None else y_TO + frozen_product(x_TI - seen_TI, weight_OI)


def lora_product(
    x_TI: Tensor,
    weight_OI: Frozen,
    layer: int,
    group: str,
    segments: Iterable[Update],
    seed: int | Tensor | None = None,
) -> Tensor:
    """One fused product with the updates of the adapters in `segments`.

    Training (gradients enabled) takes exactly one segment over all rows; serving takes any number. seed: of the
    adapter's dropout, one draw for the fused product; None drops nothing.
    """
    segments = [segment for segment in segments if segment.changes(layer, group)]
    if torch.is_grad_enabled() and segments:
        (segment,) = segments
        assert isinstance(segment, Segment), "only one adapter over all rows has gradients"
        assert segment.everywhere
        update = segment.lora.layers[layer][group]
        drawn = None if seed is None else (segment.lora.config.dropout, seed)
        if update.magnitudes:
            return _dora_product(x_TI, weight_OI, drawn, update)
        y: Tensor = _LoraProduct.apply(x_TI, weight_OI, drawn, update.places, *update.tensors)  # type: ignore[no-untyped-call]
        return y
    y_TO = frozen_product(x_TI, weight_OI)
    for segment in segments:
        segment.apply(y_TO, x_TI, weight_OI, layer, group)
    return y_TO


def _places(config: LoraConfig, network: Shape) -> list[dict[str, tuple[Place, ...]]]:
    """What the adapter changes, by layer and fused product."""
    layers = []
    for index in range(network.layers):
        groups = {}
        for group, names in network.groups.items():
            places, R = [], 0
            for name, module in ((name, network.module_name(index, name)) for name in names):
                if not network.has(index, name) or not config.changes(module):
                    continue
                r, columns = config.rank(module), slice(*network.columns(name))
                places.append(Place(module, slice(R, R + r), columns, config.scale(module)))
                R += r
            if places:
                groups[group] = tuple(places)
        layers.append(groups)
    return layers


def check_shapes(config: LoraConfig, network: Shape, tensors: Mapping[str, Tensor]) -> None:
    """Raises InvalidAdapter naming the first of an adapter's tensors, under PEFT's names, that is missing, foreign or
    of the wrong shape for a base."""
    wanted: dict[str, tuple[int, ...]] = {}
    for groups in _places(config, network):
        for group, places in groups.items():
            for place in places:
                A, B, magnitude = _names(place)
                wanted[A] = (place.rank, network.in_features(group))
                wanted[B] = (place.outputs, place.rank)
                if config.use_dora:
                    wanted[magnitude] = (place.outputs,)
    if not wanted:
        raise _no_module(config, network)
    if foreign := sorted(set(tensors) - set(wanted)):
        raise _foreign(foreign[0], next(iter(wanted)), config.use_dora)
    for name, shape in wanted.items():
        if name not in tensors:
            plain = " If it was trained without DoRA, set use_dora to false." if name.endswith(MAGNITUDE) else ""
            raise InvalidAdapter(
                f"tensor {name!r} is missing from the adapter", hint=f"Save the adapter again with PEFT.{plain}"
            )
        if tensors[name].shape != shape:
            raise InvalidAdapter(
                f"tensor {name!r} is {tuple(tensors[name].shape)}, this base needs {shape}",
                hint="Check that the adapter was trained on this base, and that r is its rank.",
            )


def _no_module(config: LoraConfig, network: Shape) -> InvalidAdapter:
    """What is wrong with a configuration that chooses no module of the base: the option that leaves none."""
    everywhere = replace(config, layers=None)
    if any(_places(everywhere, network)):
        return InvalidAdapter(
            f"layers_to_transform = {list(config.layers or ())} names no layer of this base with such a module",
            param="layers_to_transform",
            hint=f"The layers of this base are 0 to {network.layers - 1}.",
        )
    if any(_places(replace(everywhere, exclude_modules=()), network)):
        return InvalidAdapter(
            f"exclude_modules = {config.exclude_modules!r} excludes all that target_modules names",
            param="exclude_modules",
            hint="Name fewer modules there.",
        )
    names = [name for names in network.groups.values() for name in names]
    known, example = dict.fromkeys(name.rpartition(".")[2] for name in names), network.module_name(0, names[0])
    return InvalidAdapter(
        f"target_modules = {config.target_modules!r} names no module of this base",
        param="target_modules",
        hint=f"Known modules: {', '.join(known)}, by these names or in full, such as {example}.",
    )


def _foreign(name: str, expected: str, use_dora: bool) -> InvalidAdapter:
    """What is wrong with a tensor that the base has no place for. expected: the name of one that it needs."""
    whole = "embed_tokens" in name or "lm_head" in name or ".base_layer." in name or ".modules_to_save." in name
    if whole or ".lora_" not in name or name.endswith(".bias"):
        return InvalidAdapter(
            f"tensor {name!r} is no part of a LoRA update, but an embedding, head, bias or other weight that travels "
            "with the adapter",
            hint=f"{MERGE}.",
        )
    if name.endswith(f".{MAGNITUDE}") and not use_dora:
        return InvalidAdapter(
            f"tensor {name!r} belongs to DoRA, but use_dora is not true in the adapter's configuration",
            param="use_dora",
            hint="Set use_dora to true in its adapter_config.json if it was trained with DoRA.",
        )
    return InvalidAdapter(
        f"tensor {name!r} has no place in this base model, which needs tensors such as {expected!r}",
        hint="Check that the adapter was trained on this base and lists every target module.",
    )


def _names(place: Place) -> tuple[str, str, str]:
    """PEFT's names of a target's A and B, and of DoRA's magnitudes."""
    return f"{place.prefix}lora_A.weight", f"{place.prefix}lora_B.weight", f"{place.prefix}{MAGNITUDE}"
