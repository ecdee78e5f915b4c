"""Models on the Hub, planned before anything is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from offload.checkpoint.bundles import mapped_group
from offload.checkpoint.decoded import decoded_tensors, decoding_nbytes
from offload.checkpoint.dtypes import TAGS, TORCH_DTYPES
from offload.checkpoint.experts import map_checkpoint
from offload.checkpoint.quantised import take_encoding
from offload.checkpoint.remote import remote_checkpoint
from offload.hf.dtypes import FORMAT_OF_DTYPE, resolve_dtype
from offload.hf.quantise import linears_to_quantise, readable_alone
from offload.hf.skeleton import config_dtype, make_skeleton, read_config
from offload.hf.spec import build_spec, measured_once
from offload.quantisation import Quantisation
from placement.model_spec import ModelSpec


@dataclass(frozen=True)
class RemoteModel:
    """What the Hub says of a model.

    Attributes:
        specs: its sizes, as loading it would find them: in each of the formats that it may be in, the most precise
            first; one where none is left open.
        commit: of the repository.
        download_nbytes: bytes of its weights.
    """

    specs: tuple[ModelSpec, ...]
    commit: str
    download_nbytes: int


def read_remote(
    repository: str,
    quantisation: Quantisation,
    *,
    context_tokens: int,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RemoteModel:
    """The record of a model from its config and the headers of its weights, by range requests.

    Args:
        repository: "owner/name" on the Hub.
        quantisation: packed formats, or that they are left open.
        context_tokens: longest sequence.
        dtype: in which to compute, "auto" for the checkpoint's own.
        revision: branch, tag or commit.
        trust_remote_code: allow modeling code from the repository, which is fetched then.

    Raises:
        HubUnreachableError, InvalidArgumentError, CheckpointError: see `remote_checkpoint`.
        UnsupportedModelError: not a causal language model, or experts that cannot be offloaded.
    """
    with remote_checkpoint(repository, revision=revision, with_code=trust_remote_code) as remote:
        config = read_config(remote.directory, trust_remote_code=trust_remote_code)
        encoding = take_encoding(config, f"config.json of {repository}")
        largest = max(remote.tensors.values(), key=lambda span: span.nbytes)
        stored = TORCH_DTYPES[largest.dtype] if encoding is None else torch.bfloat16
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        skeleton = make_skeleton(config, resolve_dtype(dtype, config_dtype(config), stored), **options)
        compute = skeleton.dtype
        tensors = remote.tensors
        if encoding is not None:
            tensors = decoded_tensors(tensors, encoding, TAGS[compute])
        mapped = map_checkpoint(skeleton, tensors)
        measured = measured_once(skeleton)

        def in_formats(one: Quantisation) -> ModelSpec:
            format = one.experts or FORMAT_OF_DTYPE[compute]
            formats = linears_to_quantise(skeleton, one)
            return build_spec(
                skeleton,
                [mapped_group(experts, format) for experts in mapped.experts],
                measured(),
                name=repository,
                context_tokens=context_tokens,
                casts=any(TORCH_DTYPES[layer.stored_dtype] is not compute for layer in mapped.experts),
                formats=formats,
                alone=readable_alone(skeleton, formats, mapped.renamed),
                quantisation=one,
                decoding_nbytes=decoding_nbytes(mapped.dense),
            )

        own = None if encoding is None else encoding.packed_format
        specs = tuple(in_formats(one) for one in quantisation.candidates(own))
        return RemoteModel(specs, remote.commit, remote.nbytes)
