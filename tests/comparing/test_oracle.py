"""What the PyTorch side of parity reads: the user's own checkpoint, and no name in it that leads to code."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from helpers import FIRST, assert_says, change_tensors, document, refusal, set_fields, sfexport

from sfexport.artifacts.bundle import Bundle
from sfexport.checkpoint.checkpoint import Checkpoint
from sfexport.demo.run import DemoPaths as Tree
from sfexport.engines.build import build
from sfexport.errors import CheckpointError
from sfexport.exporting.export import ExportOptions, export
from sfexport.testing.random_checkpoint import write_random_checkpoint

torch = pytest.importorskip("torch")

from sfexport.engines.torch_backend import load_model  # noqa: E402

PARITY = ("--frames", 2, "--max-new-tokens", 2)


@pytest.fixture
def own(tmp_path: Path, tree: Tree) -> Tree:
    """A checkpoint, a bundle with a copy of its weights, and engines."""
    made = Tree(tmp_path)
    shutil.copytree(tree.checkpoint, made.checkpoint)
    export(Checkpoint.open(made.checkpoint), made.bundle, ExportOptions(weights="copy"))
    build(Bundle.open(made.bundle), made.engines, "onnxruntime")
    return made


def test_parity_reads_the_exported_checkpoint_and_says_so(own: Tree) -> None:
    report = document(sfexport("parity", own.engines, *PARITY, "--json"))
    assert report["passed"] and report["checkpoint"] == str(own.checkpoint.resolve()) and not report["is_copy"]
    # Other weights than those that were exported: a comparison with the copy would pass.
    shutil.rmtree(own.checkpoint)
    write_random_checkpoint(own.checkpoint, seed=1)
    result = sfexport("parity", own.engines, *PARITY)
    assert result.exit_code == 1
    assert_says(result.stdout, "parity FAILED", f"PyTorch read the checkpoint {own.checkpoint.resolve()}")


def test_parity_reads_the_copy_where_the_checkpoint_is_gone(own: Tree) -> None:
    shutil.rmtree(own.checkpoint)
    result = sfexport("parity", own.engines, *PARITY)
    assert result.exit_code == 0, result.output
    assert_says(result.stdout, "parity passed", "own copy of the weights", own.bundle.resolve(), "is gone")
    report = document(sfexport("parity", own.engines, *PARITY, "--json"))
    assert report["is_copy"]


def test_the_recorded_place_comes_before_a_neighbour_of_the_same_name(own: Tree, tmp_path: Path) -> None:
    """A bundle moved beside another checkpoint still belongs to its own."""
    moved = Path(shutil.copytree(own.bundle, tmp_path / "elsewhere" / "bundle"))
    write_random_checkpoint(tmp_path / "elsewhere" / "checkpoint", seed=1)
    assert Bundle.open(moved).original_checkpoint == own.checkpoint.resolve()
    shutil.rmtree(own.checkpoint)
    assert Bundle.open(moved).original_checkpoint == (tmp_path / "elsewhere" / "checkpoint").resolve()


def test_parity_refuses_a_checkpoint_that_lacks_tensors(own: Tree) -> None:
    change_tensors(own.checkpoint / FIRST, lambda tensors: tensors.pop("model.norm.weight", None))
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(own.checkpoint / FIRST, lambda tensors: tensors.pop(name, None))
    paragraph = refusal(own.root, "parity", own.engines, *PARITY, after_steps=True)
    assert_says(paragraph, "tensors are missing", own.checkpoint.resolve())


HOSTILE = {
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "kernels-community/flash-attn",
    "torch_dtype": "bfloat16",
    "dtype": "no-such-dtype",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "someone/evil--evil.Model"},
    "experts_implementation": "someone/experts",
    "id2label": "not a table",
    "return_dict": False,
    "output_attentions": True,
    "is_encoder_decoder": True,
}


def test_no_name_in_a_checkpoint_makes_pytorch_look_for_code(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(copy / "config.json", **HOSTILE)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (copy / "evil.py").write_text(trap)
    (copy / "custom_generate").mkdir()
    (copy / "custom_generate" / "generate.py").write_text(trap)
    (copy / "generation_config.json").write_text('{"temperature": "hot", "num_beams": -1}')

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a look-up in the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = load_model(copy)
    assert not (tmp_path / "ran").exists()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = load_model(tree.checkpoint)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_stored_head_is_used_where_the_configuration_ties_it(tree: Tree, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tree.checkpoint, tmp_path / "checkpoint"))
    set_fields(copy / "config.json", tie_word_embeddings=True)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        both = [load_model(path)(ids).logits for path in (copy, tree.checkpoint)]
    assert torch.equal(*both)
    for shard in copy.glob("*.safetensors"):
        change_tensors(shard, lambda tensors: tensors.pop("lm_head.weight", None))
    tied = load_model(copy)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert np.array_equal(again.lm_head.weight.detach(), tied.lm_head.weight.detach())


def test_another_kind_of_rope_is_refused(tree: Tree, tmp_path: Path) -> None:
    for number, changes in enumerate(
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            {"partial_rotary_factor": 0.5},
        )
    ):
        copy = Path(shutil.copytree(tree.checkpoint, tmp_path / str(number)))
        set_fields(copy / "config.json", **changes)
        with pytest.raises(CheckpointError, match="rope_|rotary"):
            load_model(copy)
        with pytest.raises(CheckpointError, match="rope_|rotary"):
            _ = Checkpoint.open(copy).config


def test_another_attention_is_not_taken_in_silence(tree: Tree, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tree.checkpoint, attn_implementation="someone/kernel")
    assert "'someone/kernel' is not used" in caplog.text
