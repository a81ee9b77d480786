"""Any causal language model that transformers builds, as a network that the backends compute like the decoder.

transformers defines the layers; only its attention function, the linear modules of its layers and its head are
replaced. They call the backend's `attend`, add the adapters' updates and multiply with frozen weights in any format.
Packed rows, prefixes, mixed adapters and training therefore work as they do for the decoder. Shape suffixes as in
`decoder`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fortwo.errors import UnsupportedModel
from fortwo.nn.decoder import Angles, Attend, Hold, Operations
from fortwo.nn.generic_config import (
    FAILURES,
    NOT_ADAPTED,
    PROBE,
    config_of,
    layers_of,
    probe,
    uniform,
    unsupported,
)
from fortwo.nn.generic_modules import ATTENTION, HiddenStates, Key, OutputHead, Pass, Projection, carry_state
from fortwo.nn.head import Head
from fortwo.nn.lora import Seeds, Update, in_training
from fortwo.nn.packing import PackedAttention, pack
from fortwo.nn.rows import Rows
from fortwo.quantization.formats import Frozen, Weight, bytes_to_train, to_train
from fortwo.quantization.matmul import frozen_product

log = logging.getLogger(__name__)
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # the largest relative difference to transformers' own logits
PROBES = [PROBE, [*PROBE[:3], *PROBE[:4]]]  # rows of the comparison with transformers, which begin alike


class _HeadFunction:
    """A head whose logits are not a product alone, such as one with a bias or a soft cap: from hidden states (N, D) to
    logits (N, V)."""

    def __init__(self, network: GenericDecoder) -> None:
        self._network = network
        self.dtype = network.dtype
        self.shape = (network.config.vocabulary, network.config.hidden)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return self._network.logits(hidden_ND)


class GenericDecoder:
    """A frozen causal language model of transformers, with the interface of `Decoder`.

    hold: as in `Decoder`. The layers compute in fp32 between the products. Raises UnsupportedModel for a network that
    cannot be computed token by token through one attention function, and for one whose logits then differ from those
    of transformers.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str = "cpu", hold: Hold | None = None) -> None:
        self.device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self.device)
        with torch.no_grad():
            wanted_TV = torch.cat([_plain_logits(model, row) for row in PROBES])
        self._now = now = Pass()
        self._rows: Rows | None = None
        self._backbone = model.get_submodule(model.base_model_prefix)
        path, layers = layers_of(model)
        self._layers, self._forwards = layers, [layer.forward for layer in layers]
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.current_pass = now
        self._recurrent = {number for number, layer in enumerate(layers) if carry_state(layer, now)}
        model.set_attn_implementation(ATTENTION)
        attention, rows, state_bytes = probe(model, layers, now, self._recurrent)
        now.attentions = {layer: place for place, layer in enumerate(sorted(attention))}
        modules, lacking = uniform(layers, rows, NOT_ADAPTED.get(model.config.model_type, ()))
        self.weights: dict[Key, Frozen] = {}
        for number, layer in enumerate(layers):
            for name in modules:
                if (number, name) in lacking:
                    continue
                linear = layer.get_submodule(name)
                assert isinstance(linear, nn.Linear | Conv1D)
                weight_OI = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
                self.weights[number, name] = weight_OI.detach()
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, Projection(now, (number, name), linear.bias))
        output = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        assert output is not None
        tied = output.weight is embedding.weight
        self.head: Frozen = output.weight.detach()
        model.set_output_embeddings(OutputHead(now, output.bias))
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        self._with_head = copy(model)
        self._with_head._modules = {**model._modules, model.base_model_prefix: HiddenStates(now, self._backbone)}
        self._embedding = embedding
        self._any_token = torch.tensor([PROBE[:1]], device=self.device)
        self.config = config_of(
            model,
            [attention[layer] for layer in sorted(attention)],
            modules,
            lacking,
            path,
            tied,
            self._rest() + _numel(self._multiplied(), tied),
            state_bytes,
        )
        self._check(wanted_TV)
        if hold is not None:
            for key, weight in self.weights.items():
                self.weights[key] = hold(weight, False)
            self.head = hold(self.head, True)

    # ------------------------------------------------------------ what Decoder offers

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    @property
    def parameters(self) -> int:
        return self.config.parameters

    @property
    def bytes(self) -> int:
        """Memory held by the weights."""
        held = [*self.weights.values(), *([] if self.config.tied and isinstance(self.head, Tensor) else [self.head])]
        return 4 * self._rest() + sum(weight.nbytes for weight in held)

    @property
    def head_VD(self) -> Head:
        """The head of a network to train on. Raises TypeError for one that is held in formats."""
        if isinstance(self.head, Weight):
            raise TypeError("train on in_fp32() or in_bf16(): these weights are held to serve")
        return self.head if self._plain_head else _HeadFunction(self)

    def with_operations(self, operations: Operations) -> GenericDecoder:
        """The network itself: transformers defines its small operations."""
        del operations
        return self

    def with_rows(self, rows: Rows) -> GenericDecoder:
        other = copy(self)
        other._rows = rows
        return other

    def beginning(self, layers: int) -> GenericDecoder:
        """The network itself: transformers' layers cannot be left out."""
        del layers
        return self

    def frozen(self, layer: int, group: str) -> Frozen:
        return self.weights[layer, group]

    def in_fp32(self) -> GenericDecoder:
        return self._with(to_train(torch.float32))

    def in_bf16(self) -> GenericDecoder:
        return self._with(to_train(torch.bfloat16))

    def bytes_to_train(self, bf16: bool) -> int:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return sum(bytes_to_train(weight, dtype) for weight in self._multiplied())

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        segments: Sequence[Update] = (),
        dropout: bool = False,
        checkpointing: bool = False,
    ) -> Tensor:
        lora = in_training(segments)
        seeds: Seeds = lora.seeds() if lora is not None and dropout else {}
        return self.through_layers(
            self.embed(tokens_T), self.angles(positions_T), attend, segments, seeds, checkpointing
        )

    def embed(self, tokens_T: Tensor) -> Tensor:
        embedded: Tensor = self._embedding(tokens_T)
        return embedded

    def angles(self, positions_T: Tensor) -> list[Angles | None]:
        """The positions: transformers computes the angles."""
        return [(positions_T, positions_T)]

    def norm(self, x_TD: Tensor) -> Tensor:
        """Nothing more: transformers' layers end with the norm."""
        return x_TD

    def through_layers(
        self,
        x_TD: Tensor,
        angles: Sequence[Angles | None],
        attend: Attend,
        segments: Sequence[Update] = (),
        seeds: Seeds = MappingProxyType({}),
        checkpointing: bool = False,
    ) -> Tensor:
        """Carry what the first layer reads (T, D) to what comes after the final norm (T, D)."""
        now = self._now
        assert angles[0] is not None
        positions_T, _ = angles[0]
        now.attend, now.segments, now.seeds, now.weights = attend, segments, seeds, self.weights
        now.rows = self._rows
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            vars(layer)["forward"] = again if checkpointing else forward
        hidden: Tensor = self._backbone(
            inputs_embeds=x_TD[None], position_ids=positions_T[None], use_cache=False
        ).last_hidden_state
        return hidden[0]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V), as transformers makes them of the head's product."""
        self._now.head, self._now.hidden_TD = self.head, hidden_TD
        logits: Tensor = self._with_head(self._any_token).logits
        return logits[0].float()

    # ------------------------------------------------------------ inside

    def _multiplied(self) -> list[Frozen]:
        return [*self.weights.values(), self.head]

    def _rest(self) -> int:
        """Numbers of the embedding, norms and whatever else stays in transformers' modules."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def _with(self, change: Hold) -> GenericDecoder:
        other = copy(self)
        other.weights = {key: change(weight, False) for key, weight in self.weights.items()}
        other.head = change(self.head, True)
        return other

    @torch.no_grad()
    def _check(self, wanted_TV: Tensor) -> None:
        """Compare packed rows, and of layers with a state the parts of one row, with transformers' own logits of each
        row. Raises UnsupportedModel where they differ."""
        packed = pack(PROBES, self.device)
        network = self.with_rows(Rows(packed.lengths, packed.prefix))
        hidden_TD = network.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, self.config))
        places = [packed.place(row, position) for row, tokens in enumerate(PROBES) for position in range(len(tokens))]
        found_TV = self.logits(hidden_TD[places])
        if (off := _difference(found_TV, wanted_TV)) > CLOSE[self.dtype]:
            what = (
                "packed rows of it are not each row alone" if self._recurrent else "its attention is not plain causal"
            )
            raise unsupported(self.config.architecture, f"{what} (its logits are off by {off:.1e})")
        if self._recurrent:
            try:
                found_PV = self.logits(self._in_parts(PROBE, (5, 7)))
            except FAILURES as error:
                raise unsupported(
                    self.config.architecture, f"transformers cannot continue a sequence from its state ({error})"
                ) from None
            if (off := _difference(found_PV, wanted_TV[: len(PROBE)])) > CLOSE[self.dtype]:
                raise unsupported(
                    self.config.architecture,
                    f"the state of its layers does not continue a sequence (its logits are off by {off:.1e})",
                )
        product_TV = frozen_product(hidden_TD[places], self.head).float()
        self._plain_head = bool(torch.allclose(found_TV, product_TV, rtol=1e-4, atol=1e-4))

    def _in_parts(self, tokens: list[int], cuts: Sequence[int]) -> Tensor:
        """Hidden states of one row (T, D), computed in parts that end at `cuts` and at the last token."""
        hidden, rows = [], Rows([0], states=[{}])
        read: dict[int, list[Tensor]] = {}
        for first, last in pairwise((0, *cuts, len(tokens))):
            attention = PackedAttention(pack([tokens[:last]], self.device, prefix=0), self.config)

            def attend(layer: int, qkv_TNE: Tensor, attention: PackedAttention = attention) -> Tensor:
                read.setdefault(layer, []).append(qkv_TNE)
                return attention(layer, torch.cat(read[layer]))[-len(qkv_TNE) :]

            rows = Rows([last - first], states=rows.after)
            positions_T = torch.arange(first, last, device=self.device)
            tokens_T = torch.tensor(tokens[first:last], device=self.device)
            hidden.append(self.with_rows(rows).forward(tokens_T, positions_T, attend))
        return torch.cat(hidden)


def load(directory: Path, device: torch.device | str, hold: Hold | None, dtype: torch.dtype) -> GenericDecoder:
    """Read a model directory in transformers' layout. dtype: in which the weights are read. Of a model with a tower for
    pictures the text part is read, where transformers has a class for it. No code of the directory is run, and no
    pickle is read. Raises UnsupportedModel."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        towers = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
        text_alone = bool(towers) and _has_text_class(config)
        if text_alone:
            log.warning("The text part of %s is served; %s is left out.", type(config).__name__, " and ".join(towers))
        elif towers:
            raise unsupported(type(config).__name__, f"it has a tower that is not for text ({', '.join(towers)})")
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            raise unsupported(type(config).__name__, f"its weights are quantised ({quantised.get('quant_method')})")
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except UnsupportedModel:
        raise
    except Exception as error:  # transformers raises whatever a configuration that it does not expect leads to
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedModel(
            f"transformers cannot load the model: {first}",
            param="architectures",
            hint="fortwo serves causal language models that transformers itself knows; it never runs a model's code.",
        ) from None
    architecture, named = type(model).__name__, config.architectures or ["?"]
    if architecture not in named and not text_alone:
        raise unsupported(named[0], f"its model_type {config.model_type!r} means {architecture}")
    for what, names in (
        ("lacks", "missing_keys"),
        ("has a foreign", "unexpected_keys"),
        ("has in another shape", "mismatched_keys"),
    ):
        if wrong := sorted(map(str, found[names])):
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise unsupported(architecture, f"the file {what} tensor {wrong[0]}{more}")
    return GenericDecoder(model, device, hold)


def _has_text_class(config: PreTrainedConfig) -> bool:
    """Whether transformers has a class for the text part of this model, which knows what to leave out."""
    text, mapping = config.sub_configs.get("text_config"), AutoModelForCausalLM._model_mapping
    return text is not None and type(config) in mapping and mapping[type(config)].config_class is text


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The relative one; infinite where there are numbers that are none."""
    off = float((found - wanted).norm() / wanted.norm())
    return off if math.isfinite(off) else math.inf


def _plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """transformers' own logits (T, V)."""
    logits: Tensor = model(torch.tensor([tokens], device=model.device), use_cache=False).logits
    return logits[0].float()


def _numel(weights: Sequence[Frozen], tied: bool) -> int:
    held = weights[:-1] if tied else weights
    return sum(math.prod(weight.shape) for weight in held)
