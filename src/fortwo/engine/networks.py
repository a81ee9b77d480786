"""The network of a prepared base, read from its folder."""

from __future__ import annotations

import torch

from fortwo.errors import UnsupportedModel
from fortwo.execution.autotuning import Run, all_blocks, serving, serving_generic
from fortwo.hub import weights
from fortwo.hub.identity import read_config
from fortwo.hub.prepared import ModelInfo
from fortwo.nn.config import DecoderConfig
from fortwo.nn.network import Network
from fortwo.quantization.selection import Measurements


def read_network(
    info: ModelInfo,
    device: torch.device,
    setting: str,
    threads: int | None,
    measurements: Measurements,
    run: Run,
) -> Network:
    """The own decoder where it knows the configuration, else what transformers makes of the directory. setting and the
    arguments behind it: as in `execution.autotuning.serving`. Raises UnsupportedModel, and InvalidRequest for a format
    that the base cannot have."""
    directory = info.directory
    described = read_config(directory)
    try:
        config = DecoderConfig.from_hf(described)
    except UnsupportedModel as error:
        try:
            return serving_generic(info.id, directory, info.parameters, device, setting)
        except UnsupportedModel as generic:
            generic.message = f"{generic.message}; fortwo's own decoder: {error.message}"
            raise
    tensors = weights.open_tensors(directory)
    blocks = weights.QuantisedTensors(directory) if all_blocks(config, weights.block_types(directory)) else None
    return serving(info.id, config, tensors, device, setting, threads, measurements, run, blocks)
