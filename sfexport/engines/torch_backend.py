"""Run the PyTorch model as a backend: the reference that engines are compared with, always in float32.

The only file of engines/ that imports torch and sfexport.model.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.checkpoint.config_fields import ConfigFields
from sfexport.engines.interface import Backend, Cache, DecoderStep, KeyValues
from sfexport.errors import CheckpointError, MissingDependency

if TYPE_CHECKING:
    from sfexport.exporting.dequantize import RoundedMatrix

RUNTIME = "torch"
INSTALL = "pip install 'sfexport[torch]'"


def runtime_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency("torch", "The PyTorch model", INSTALL) from None


def load_model(checkpoint: Path) -> Any:
    """Load the model in float32, in evaluation mode, with the weights that transformers loads from the directory.

    Of config.json only the fields that say what is computed are used: none that names a dtype, an implementation of
    attention or code.

    Raises:
        CheckpointError: tensors are missing or have another shape; transformers would fill in random numbers.
    """
    try:
        import torch
        import transformers

        from sfexport.model import LlavaQwenSlowFastConfig, LlavaQwenSlowFastForCausalLM
    except Exception as error:
        library = (getattr(error, "name", None) or "torch").partition(".")[0]
        raise MissingDependency(library, "The PyTorch model", INSTALL, failure=error) from None
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    opened = Checkpoint.open(checkpoint)
    fields = (n for n in ConfigFields.__struct_fields__ if n in opened.raw_config and n != "quantization_config")
    config = LlavaQwenSlowFastConfig(**{name: opened.raw_config[name] for name in fields})
    config.set_tower(opened.tower)
    state = _plain_state(opened)
    model, found = LlavaQwenSlowFastForCausalLM.from_pretrained(
        checkpoint if state is None else None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        generation_config=transformers.GenerationConfig(),
        output_loading_info=True,
    )
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"PyTorch cannot load {checkpoint}: {len(lacking)} tensors are missing or have another shape, "
            f"{', '.join(lacking[:3])} among them.",
            "Put back the checkpoint that was exported, or export again.",
        )
    return model.eval()


def _plain_state(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Read all weights in float32 where some are stored in 4 bits (GPTQ, AWQ), which transformers reads on a GPU alone.

    None for an ordinary checkpoint. Raises CheckpointError for another method.
    """
    import torch

    from sfexport.checkpoint.gptq_awq import read_prequantized

    plain, prequantized = read_prequantized(checkpoint)
    if not prequantized:
        return None
    ordinary = (name for name in plain.expected_tensors() if name in plain.tensors and name not in prequantized)
    state = {name: torch.from_numpy(plain.tensors[name].rows()) for name in ordinary}
    return state | {name: torch.from_numpy(matrix.weights()) for name, matrix in prequantized.items()}


class _Cache(Cache):
    """A cache in PyTorch's tensors, float32."""

    def __init__(self, tensors: list[Any], lengths: np.ndarray) -> None:
        self.tensors, self.lengths, self.capacity = tensors, lengths, tensors[0].shape[2]

    def append(self, new: KeyValues, row: int | None = None) -> None:
        rows = range(len(self.lengths)) if row is None else [row]
        for tensor, added in zip(self.tensors, new.tensors, strict=True):
            for i, at in enumerate(rows):
                start = int(self.lengths[at])
                tensor[at, :, start : start + new.length] = added[i]
        self.lengths[list(rows)] += new.length

    def resize(self, rows: Sequence[int], capacity: int) -> Cache:
        kept, tensors = min(capacity, self.capacity), []
        for tensor in self.tensors:
            larger = tensor.new_zeros(len(rows), tensor.shape[1], capacity, tensor.shape[3])
            larger[:, :, :kept] = tensor[list(rows), :, :kept]
            tensors.append(larger)
        return _Cache(tensors, self.lengths[list(rows)])


class TorchBackend(Backend):
    """Runs the PyTorch model.

    Args:
        checkpoint: the checkpoint's directory.
    """

    name = RUNTIME

    def __init__(self, checkpoint: Path) -> None:
        self.lm = load_model(checkpoint)
        self.config = self.lm.config.model_config

    def use_rounded(self, matrices: Iterable[RoundedMatrix]) -> None:
        """Compute with these matrices in place of the checkpoint's own."""
        import torch

        head, table = self.lm.lm_head, self.lm.model.embed_tokens
        with torch.no_grad():
            for matrix in matrices:
                is_head = matrix.name in ("lm_head.weight", "model.embed_tokens.weight")
                if is_head and head.weight is table.weight:  # tied: only the head is rounded
                    head.weight = torch.nn.Parameter(table.weight.clone())
                place = head.weight if is_head else self.lm.get_parameter(matrix.name)
                place[matrix.first : matrix.first + len(matrix.weights)] = torch.from_numpy(matrix.weights)

    def encode_frames(self, pixel_values: np.ndarray, single_image: bool) -> np.ndarray:
        import torch

        from sfexport.model.compressor import pool_cells

        model = self.lm.model
        with torch.inference_mode():
            projected = model.mm_projector(model.vision_tower(torch.from_numpy(pixel_values)))
            stride = 1 if single_image else self.config.slow_fast.video_pooling_stride
            return pool_cells(projected, stride).numpy()

    def compress(self, slow_tokens: np.ndarray) -> tuple[np.ndarray, KeyValues | None]:
        import torch

        from sfexport.model.compressor import fast_tokens

        slow = torch.from_numpy(slow_tokens)
        with torch.inference_mode():
            fast = fast_tokens(slow, self.config.slow_fast.fast).numpy()
            if not self.config.slow_fast.hybrid_layers:
                return fast, None
            flat = slow.flatten(0, 1)
            key_values = self.lm.model.slow_key_values(flat[None])
        tensors = tuple(x for layer in key_values.unbind(1) for x in layer.unbind(1))
        return fast, KeyValues(tensors, len(flat))

    def decode(self, step: DecoderStep) -> tuple[np.ndarray, KeyValues]:
        """Compute one row after the other, over K/V that are concatenated anew."""
        import torch

        rows = [self._decode_row(step, row) for row in range(step.rows)]
        new = tuple(torch.cat(pieces) for pieces in zip(*(pieces for _, pieces in rows), strict=True))
        return np.stack([logits for logits, _ in rows]), KeyValues(new, step.inputs_embeds.shape[1])

    def _decode_row(self, step: DecoderStep, row: int) -> tuple[np.ndarray, tuple[Any, ...]]:
        import torch
        from transformers import DynamicCache

        past = self._past(step, row)
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)] if past else None)
        with torch.inference_mode():
            out = self.lm(
                inputs_embeds=torch.from_numpy(step.inputs_embeds[row : row + 1]),
                position_ids=torch.from_numpy(step.positions[row : row + 1]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **self._slow(step),
            )
        layers: Any = cache.layers
        count = step.inputs_embeds.shape[1]
        new = tuple(x[:, :, -count:] for layer in layers for x in (layer.keys, layer.values))
        return out.logits[0, -1].float().numpy(), new

    def _past(self, step: DecoderStep, row: int) -> list[Any]:
        """Put together the K/V before a row's positions; none if there are no such positions."""
        import torch

        prefix = step.prefix.tensors if step.prefix else ()
        if not isinstance(step.cache, _Cache):
            return list(prefix)
        length = int(step.lengths[row])
        own = [tensor[row : row + 1, :, :length] for tensor in step.cache.tensors]
        return [torch.cat(pair, dim=2) for pair in zip(prefix, own, strict=True)] if prefix else own

    def join(self, parts: Sequence[KeyValues]) -> KeyValues:
        import torch

        joined = tuple(torch.cat(pieces, dim=2) for pieces in zip(*(part.tensors for part in parts), strict=True))
        return KeyValues(joined, sum(part.length for part in parts))

    def new_cache(self, rows: int, capacity: int) -> Cache:
        import torch

        text = self.config.text
        shape = (rows, text.num_kv_heads, capacity, text.head_dim)
        return _Cache([torch.zeros(shape) for _ in range(2 * text.num_layers)], np.zeros(rows, np.int64))

    def _slow(self, step: DecoderStep) -> dict[str, Any]:
        import torch

        if step.slow is None or not step.slow_attends.any():
            return {}
        keys, values = step.slow.tensors[::2], step.slow.tensors[1::2]
        stacked = torch.stack([torch.stack(pair, dim=1) for pair in zip(keys, values, strict=True)], dim=1)
        return {
            "slow_key_values": stacked,
            "slow_attends": torch.from_numpy(step.slow_attends)[None],
            "slow_mask": torch.ones(1, step.slow.length, dtype=torch.bool),
        }

    def to_numpy(self, tensors: KeyValues) -> list[np.ndarray]:
        return [t.numpy() for t in tensors.tensors]

    def from_numpy(self, arrays: list[np.ndarray]) -> KeyValues:
        import torch

        return KeyValues(tuple(torch.from_numpy(a) for a in arrays), arrays[0].shape[2])
