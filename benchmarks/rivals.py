"""Export of a 0.5 B model by sfexport, by torch.onnx.export(dynamo=True) and by optimum: time, memory, bytes.

    python benchmarks/rivals.py --optimum ENV/bin/python      a table; needs 8 GB of memory, 12 GB of disk
    ... --json                                                one JSON document

optimum's exporter (optimum-onnx) wants an older transformers than sfexport, so it lives in an environment of its own:

    python -m venv ENV && ENV/bin/pip install torch optimum-onnx==0.1.0 onnxruntime

All read the same weights, bfloat16 shards of a random model as large as Qwen2-0.5B. sfexport writes its three graphs.
torch.onnx.export writes the language model as PyTorch runs it, hybrid layers and slow tokens included. optimum does not
know such a model and writes the Qwen2 decoder in it. Each runs in a process of its own, from start to end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from measuring import HERE, main_or_child, measure, run, written_mb

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
TOKENS, SLOW = 8, 16


def with_sfexport(checkpoint: str, out: str, precision: str) -> dict[str, Any]:
    from sfexport.checkpoint.checkpoint import Checkpoint
    from sfexport.exporting.export import ExportOptions, export

    export(Checkpoint.open(checkpoint), Path(out), ExportOptions(precision=precision, weights="reference"))
    return {"written_mb": written_mb(Path(out))}


def with_torch(checkpoint: str, out: str, precision: str) -> dict[str, Any]:
    import torch

    from sfexport.model import LlavaQwenSlowFastForCausalLM

    dtype = getattr(torch, PRECISIONS[precision])
    model = LlavaQwenSlowFastForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    text, layers = model.config.model_config.text, len(model.config.model_config.slow_fast.hybrid_layers)
    embeds = torch.zeros(1, TOKENS, text.hidden_size, dtype=dtype)
    key_values = torch.zeros(1, layers, 2, text.num_kv_heads, SLOW, text.head_dim, dtype=dtype)
    positions = torch.arange(TOKENS)[None]
    attends = torch.ones(1, TOKENS, dtype=torch.bool)
    mask = torch.ones(1, SLOW, dtype=torch.bool)
    sequence, slow = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    shapes = ({1: sequence}, {1: sequence}, {4: slow}, {1: sequence}, {1: slow})
    Path(out).mkdir()
    with torch.no_grad():
        inputs = (embeds, positions, key_values, attends, mask)
        torch.onnx.export(_decoder(model), inputs, f"{out}/model.onnx", dynamo=True, dynamic_shapes=shapes)
    return {"written_mb": written_mb(Path(out))}


def _decoder(model: Any) -> Any:
    import torch

    class Decoder(torch.nn.Module):
        """Logits of a prompt, without a cache."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, embeds: Any, positions: Any, key_values: Any, attends: Any, mask: Any) -> Any:
            slow = {"slow_key_values": key_values, "slow_attends": attends, "slow_mask": mask}
            return self.model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **slow).logits

    return Decoder()


def with_optimum(checkpoint: str, out: str, precision: str) -> dict[str, Any]:
    from optimum.exporters.onnx import main_export

    task, dtype = "text-generation-with-past", PRECISIONS[precision]
    # Its own comparison with PyTorch is switched off: the others make none either.
    main_export(checkpoint, output=out, task=task, dtype=dtype.replace("bfloat", "bf"), do_validation=False)
    return {"written_mb": written_mb(Path(out))}


def as_qwen2(checkpoint: Path, out: Path) -> Path:
    """The same weights as a checkpoint of a plain Qwen2: links, and a configuration that says so."""
    out.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (out / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (out / "config.json").write_text(json.dumps(config))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum", help="a Python that has optimum-onnx; left out without")
    parser.add_argument("--folder", type=Path, help="where to work; the checkpoint there is kept")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        checkpoint = (options.folder or folder) / "checkpoint-0.5b"
        if not checkpoint.exists():
            run([sys.executable, HERE / "random_checkpoint.py", "0.5b", checkpoint])
        results = compare(checkpoint, folder, options.optimum)
    print(json.dumps(results)) if options.json else show(results)


def compare(checkpoint: Path, folder: Path, optimum: str | None) -> list[dict[str, Any]]:
    sides = {"sfexport": (sys.executable, checkpoint), "torch": (sys.executable, checkpoint)}
    if optimum:
        sides["optimum"] = (optimum, as_qwen2(checkpoint, folder / "qwen2"))
    rows = []
    for precision in PRECISIONS:
        for name, (python, source) in sides.items():
            out = folder / "out"
            try:
                found = measure(__file__, name, source, out, precision, python=python)
            except CalledProcessError as error:
                found = {"failed": error.returncode}
            rows.append({"exporter": name, "precision": precision, **found})
            shutil.rmtree(out, ignore_errors=True)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Absolute, and as multiples of sfexport's."""
    keys = ("seconds", "peak_rss_mb", "written_mb")
    print(f"{'':20}{'seconds':>20}{'peak MB':>20}{'written MB':>20}")
    for row in rows:
        ours = next(r for r in rows if r["exporter"] == "sfexport" and r["precision"] == row["precision"])
        cells = [f"{row[key]:,.1f} ({row[key] / ours[key]:,.0f}x)" if key in row else "failed" for key in keys]
        print(f"{row['exporter'] + ' ' + row['precision']:20}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main_or_child(main, {"sfexport": with_sfexport, "torch": with_torch, "optimum": with_optimum})
