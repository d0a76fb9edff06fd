"""Export of the full-size (8.5 B parameters) model: time, memory, bytes written.

    python benchmarks/export_7b.py            a table, with the ordinary torch.onnx.export of a small model beside it
    python benchmarks/export_7b.py --json     seconds, peak_rss_mb, written_mb, torch_imported

The checkpoint is sparse (headers and zeros), because export reads headers only. Each measured export runs in a
process of its own, timed from its start to its end, imports included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import HERE, main_or_child, measure, written_mb

SMALL_LAYERS, SMALL_WIDTH, SMALL_VOCABULARY = 12, 1024, 32768  # the ordinary way's model: 1 GB in float32


def export_with_sfexport(checkpoint: str, out: str) -> dict[str, Any]:
    from sfexport.checkpoint.checkpoint import Checkpoint
    from sfexport.exporting.export import ExportOptions, export

    export(Checkpoint.open(checkpoint), Path(out), ExportOptions(weights="reference"))
    return {"written_mb": written_mb(Path(out)), "torch_imported": "torch" in sys.modules}


def export_with_torch(out: str) -> dict[str, Any]:
    """torch.onnx.export of a small Qwen2 decoder with real float32 weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=SMALL_WIDTH,
        intermediate_size=4 * SMALL_WIDTH,
        num_hidden_layers=SMALL_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=SMALL_VOCABULARY,
    )
    model = Qwen2ForCausalLM(config).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    Path(out).mkdir()
    ids = torch.ones(1, 8, dtype=torch.long)
    shapes = ({0: "batch", 1: "sequence"},)
    with torch.no_grad():
        torch.onnx.export(_LogitsOnly(model), (ids,), f"{out}/model.onnx", dynamo=True, dynamic_shapes=shapes)
    return {"written_mb": written_mb(Path(out)), "weights_mb": round(weights / 1e6, 1)}


def _LogitsOnly(model: Any) -> Any:  # noqa: N802  a module class made where torch is imported
    import torch

    class LogitsOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, use_cache=False).logits

    return LogitsOnly()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document: sfexport's figures only")
    arguments = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    from sparse_checkpoint import write_sparse_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        total = write_sparse_checkpoint(checkpoint)
        ours = measure(__file__, "sfexport", checkpoint, f"{folder}/bundle")
        if arguments.json:
            keys = ("seconds", "peak_rss_mb", "written_mb", "torch_imported")
            print(json.dumps({key: ours[key] for key in keys} | {"weights_mb": round(total / 1e6, 1)}))
            return
        theirs = measure(__file__, "torch", f"{folder}/torch")
    show(ours | {"weights_mb": total / 1e6}, theirs)


def show(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Both side by side, absolute and per GB of weights."""
    print(f"{'':34}{'sfexport, 7B model':>22}{'torch.onnx.export, small':>26}{'ratio':>10}")
    print(f"{'weights':34}{ours['weights_mb'] / 1e3:>19.2f} GB{theirs['weights_mb'] / 1e3:>23.2f} GB")
    for label, key, unit in (
        ("seconds", "seconds", "s"),
        ("peak resident memory", "peak_rss_mb", "MB"),
        ("written", "written_mb", "MB"),
    ):
        print(f"{label:34}{ours[key]:>19.1f} {unit:2}{theirs[key]:>23.1f} {unit:2}")
        per_gb = [side[key] / (side["weights_mb"] / 1e3) for side in (ours, theirs)]
        ratio = f"{per_gb[1] / per_gb[0]:>9.0f}x"
        print(f"{'  per GB of weights':34}{per_gb[0]:>19.2f} {unit:2}{per_gb[1]:>23.1f} {unit:2}{ratio}")
    print(f"{'torch imported':34}{'yes' if ours['torch_imported'] else 'no':>22}{'yes':>26}")


if __name__ == "__main__":
    main_or_child(main, {"sfexport": export_with_sfexport, "torch": export_with_torch})
