"""A session of ONNX Runtime on a model in memory whose weights lie in a folder, with every version from 1.20 on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

from sfexport.versions import FIRST_WEIGHTS_FOLDER, is_older

FOLDER = "session.model_external_initializers_file_folder_path"


def model_session(
    model: onnx.ModelProto, weights: Path, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """Open a model whose external data lies in the folder `weights`."""
    options, providers = options or onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    if not is_older(onnxruntime.__version__, FIRST_WEIGHTS_FOLDER):
        options.add_session_config_entry(FOLDER, str(weights.resolve()))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    # 1.20 reads external data beside the model's file only; unlike later versions it follows links.
    with tempfile.TemporaryDirectory() as directory:
        for file in weights.resolve().iterdir():
            (Path(directory) / file.name).symlink_to(file)
        path = Path(directory) / "opened-from-memory.onnx"
        path.write_bytes(model.SerializeToString())
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
