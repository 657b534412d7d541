"""What a teacher's server and its clients send each other: safetensors and JSON. Nothing that is received is trusted.

`POST /states`: a request and its states. `GET /info`: `ServedTeacher` as JSON. `GET /head`: the LM head. `GET /tokenizer`: the
tokenizer's files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from oprd.models.fingerprint import Fingerprint
from oprd.models.lm_head import LMHead
from oprd.models.loading import ModelInfo, parse_dtype
from oprd.states.requests import HeadRequest, StateRequest
from oprd.types import States

FORMAT = 1
INFO, STATES, LM_HEAD, TOKENIZER = "/info", "/states", "/head", "/tokenizer"
SHA256, IDENTITY = "x-oprd-sha256", "x-oprd-identity"  # headers of an answer
SAFETENSORS = "application/octet-stream"
HEAD_NAME = "head"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
_METADATA = "oprd"
_HEADER_ROOM = 2**20  # bytes of an answer beside its numbers


@dataclass(frozen=True)
class ServedBridge:
    """The bridge through which a server sends its states: digest of its folder, and its rank."""

    digest: str
    rank: int


@dataclass(frozen=True)
class ServedTeacher:
    """What a server says of its teacher.

    Args:
        info: facts of the model.
        identity: changes when the states change: digest of weights, dtype and bridge.
        fingerprint: of the weights, for a bridge on the client's side.
        dtype: of the states, such as "float32".
        widths: layer → width of its states; with a bridge, student layer → rank.
        head_width: width of what the LM head reads.
        tokenizer: digest of the tokenizer (`oprd.models.fingerprint.tokenizer_digest`).
        most_tokens: most tokens of a request, padding included.
        bridge: None: states are whole.
        software: package → version.
        format: of the wire.
    """

    info: ModelInfo
    identity: str
    fingerprint: Fingerprint
    dtype: str
    widths: dict[int, int]
    head_width: int
    tokenizer: str
    most_tokens: int
    bridge: ServedBridge | None
    software: dict[str, str]
    format: int = FORMAT

    def to_json(self) -> bytes:
        """For `GET /info`."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> ServedTeacher:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else, or of another format.
        """
        try:
            found: ServedTeacher = TypeAdapter(cls).validate_json(content)
        except (ValidationError, RecursionError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deeply"}
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise ValueError(f"{where}: {first['msg']}") from None
        if found.format != FORMAT:
            raise ValueError(f"format: {found.format}, and this oprd speaks {FORMAT}; use the same oprd on both sides")
        parse_dtype(found.dtype)
        return found


def pack_request(request: StateRequest, dtype: str | None) -> bytes:
    """A request as it is sent.

    Args:
        request: what is asked.
        dtype: of the states that come back; None: the teacher's own.
    """
    tensors = {
        "input_ids": request.input_ids, "position_ids": request.position_ids, "flat_index": request.flat_index
    }  # fmt: skip
    if request.attention_mask is not None:
        tensors["attention_mask"] = request.attention_mask
    if request.head is not None:
        tensors["head_index"] = request.head.flat_index
    numbers = {name: tensor.to("cpu", torch.int32).contiguous() for name, tensor in tensors.items()}
    return save(numbers, {_METADATA: json.dumps({"layers": list(request.layers), "dtype": dtype})})


def without_repeated_positions(request: StateRequest) -> tuple[StateRequest, Tensor | None]:
    """The request with each selected position once, and the place of each of its N positions there; None: each is there once.

    Positions inside one token of the teacher are interpolated between the same states, which are sent once.
    """
    once, places_N = request.flat_index.unique(return_inverse=True)
    if len(once) == len(places_N):
        return request, None
    return replace(request, flat_index=once, rollout_index=torch.zeros_like(once)), places_N


def unpack_request(body: bytes, served: ServedTeacher) -> tuple[StateRequest, torch.dtype]:
    """The request of a client, and the dtype that it asks for. Indices of rollouts are not sent: they are 0.

    Raises:
        ValueError: it is no request, or one that the teacher cannot answer; says what and what is allowed.
    """
    tensors = _tensors(body)
    try:
        length = int.from_bytes(body[:8], "little")
        asked = json.loads(json.loads(body[8 : 8 + length])["__metadata__"][_METADATA])
        layers, dtype = tuple(asked["layers"]), asked["dtype"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("the body's metadata do not say which layers to read") from None
    found = {name: tensor.long() for name, tensor in tensors.items() if tensor.dtype == torch.int32}
    _check_shapes(found, layers)
    _check_values(found, layers, served)
    head = None
    if "head_index" in found:
        zeros = torch.zeros_like(found["head_index"])
        head = HeadRequest(found["head_index"], zeros, zeros)
    index = found["flat_index"]
    request = StateRequest(
        found["input_ids"], found.get("attention_mask"), found["position_ids"], index, torch.zeros_like(index), 1, layers, head
    )  # fmt: skip
    return request, parse_dtype(served.dtype if dtype is None else str(dtype))


def _check_shapes(found: Mapping[str, Tensor], layers: tuple[Any, ...]) -> None:
    needed = ("input_ids", "position_ids", "flat_index")
    if lacking := [name for name in needed if name not in found]:
        raise ValueError(f"the body lacks {', '.join(lacking)} (int32)")
    shape = found["input_ids"].shape
    for name in ("position_ids", "attention_mask"):
        if name in found and found[name].shape != shape:
            raise ValueError(f"{name} has shape {list(found[name].shape)}, input_ids {list(shape)}")
    flat = [found[name] for name in ("flat_index", "head_index") if name in found]
    if len(shape) != 2 or not shape.numel() or any(index.ndim != 1 for index in flat):
        raise ValueError("input_ids must be [batch, seq] with at least one token, and indices one-dimensional")
    whole = all(type(layer) is int for layer in layers)
    if not whole or list(layers) != sorted({*layers}) or not (layers or "head_index" in found):
        raise ValueError("layers must be whole numbers, ascending; at least one, or the LM head's input")


def _check_values(found: Mapping[str, Tensor], layers: tuple[int, ...], served: ServedTeacher) -> None:
    tokens = found["input_ids"].numel()
    if tokens > served.most_tokens:
        raise ValueError(
            f"{tokens} tokens, and the server takes {served.most_tokens} (--max-tokens); lower micro_batch_tokens"
        )
    for name in ("flat_index", "head_index"):  # else a small request would have an answer of any size
        if name in found and len(found[name]) > tokens:
            raise ValueError(f"{name} has {len(found[name])} indices for {tokens} tokens; ask for each token once")
    if unknown := [layer for layer in layers if layer not in served.widths]:
        raise ValueError(f"layers: {unknown[0]} is not served; one of {sorted(served.widths)}")
    limits = {
        "input_ids": served.info.embedding_rows, "position_ids": served.info.context_length, "attention_mask": 2,
        "flat_index": tokens, "head_index": tokens,
    }  # fmt: skip
    for name, limit in limits.items():
        values = found.get(name)
        if values is None or not values.numel():
            continue
        least, most = int(values.min()), int(values.max())
        if least < 0 or (limit is not None and most >= limit):
            raise ValueError(f"{name} holds {least if least < 0 else most}; 0 to {limit - 1 if limit else 'any'}")


def pack_states(states: States, dtype: torch.dtype) -> bytes:
    """The teacher's states as they are sent back."""
    found = {str(layer): values for layer, values in zip(states.layers, states.values, strict=True)}
    if states.head_MD is not None:
        found[HEAD_NAME] = states.head_MD
    sent = {name: values.to("cpu", dtype).contiguous() for name, values in found.items()}
    for name, values in sent.items():
        if not values.isfinite().all() and found[name].isfinite().all():
            raise ValueError(f"states at {name} are beyond the range of {dtype}; ask for bfloat16 or float32 (dtype)")
    return save(sent)


def unpack_states(body: bytes, request: StateRequest, served: ServedTeacher, dtype: torch.dtype) -> States:
    """The states that a server sends for a request, on the request's device.

    Raises:
        ValueError: they are not those that were asked for; says how they differ.
    """
    found, device = _tensors(body), request.input_ids.device
    shapes = {str(layer): [len(request.flat_index), served.widths[layer]] for layer in request.layers}
    if request.head is not None:
        shapes[HEAD_NAME] = [len(request.head.flat_index), served.head_width]
    received = {name: list(found[name].shape) if name in found else "nothing" for name in shapes}
    differing = [name for name in shapes if received[name] != shapes[name]]
    if differing or found.keys() != shapes.keys():
        first = differing[0] if differing else sorted(found.keys() - shapes.keys())[0][:20]
        raise ValueError(
            f"layer {first!r} is {received.get(first, 'extra')}, and {shapes.get(first, 'nothing')} was asked for"
        )
    other = {str(tensor.dtype) for tensor in found.values()} - {str(dtype)}
    if other:
        raise ValueError(f"states are {', '.join(sorted(other))}, and {dtype} was asked for")
    values = tuple(found[str(layer)].to(device) for layer in request.layers)
    head = found[HEAD_NAME].to(device) if request.head is not None else None
    return States(request.layers, values, request.rollout_index, request.num_rollouts, head)


def largest_states(request: StateRequest, served: ServedTeacher, dtype: torch.dtype) -> int:
    """Most bytes of the answer to a request."""
    numbers = len(request.flat_index) * sum(served.widths[layer] for layer in request.layers)
    if request.head is not None:
        numbers += len(request.head.flat_index) * served.head_width
    return numbers * dtype.itemsize + _HEADER_ROOM


def pack_head(head: LMHead) -> bytes:
    """The LM head as it is sent: weight and bias in their own dtype, and how logits are scaled."""
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    numbers = torch.tensor([head.scale, float("inf") if head.softcap is None else head.softcap], dtype=torch.float64)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save({**whole, "scale_softcap": numbers})


def unpack_head(body: bytes, served: ServedTeacher) -> LMHead:
    """The LM head that a server sends.

    Raises:
        ValueError: it has another form.
    """
    found = _tensors(body)
    weight, bias, numbers = (found.get(name) for name in ("weight", "bias", "scale_softcap"))
    if weight is None or weight.ndim != 2 or weight.shape[1] != served.head_width or not weight.is_floating_point():
        raise ValueError(f"the LM head has no weight [vocabulary, {served.head_width}]")
    if numbers is None or numbers.shape != (2,) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError("the LM head has no scale, or a bias of another shape")
    scale, softcap = numbers.tolist()
    return LMHead(weight, bias, None if softcap == float("inf") else softcap, scale)


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Small files as they are sent."""
    return save(
        {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items() if content}
    )


def unpack_files(body: bytes) -> dict[str, bytes]:
    """A tokenizer's files.

    Raises:
        ValueError: a name that is no file of a tokenizer, or content that is no bytes.
    """
    found = _tensors(body)
    if unknown := [name for name in found if name not in TOKENIZER_FILES]:
        raise ValueError(f"{unknown[0][:40]!r} is no file of a tokenizer")
    if other := [name for name, tensor in found.items() if tensor.dtype != torch.uint8 or tensor.ndim != 1]:
        raise ValueError(f"{other[0]!r} is not sent as bytes")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def digest(body: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def _tensors(body: bytes) -> dict[str, Tensor]:
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"the body is not safetensors that can be read ({type(error).__name__})") from None
