"""The PyTorch model: the reference that graphs and engines are compared with.

Importing this package registers `llava_qwen_slow_fast` with transformers' AutoConfig and
AutoModelForCausalLM, and `srelu` with its activations. It needs the `torch` extra; only the torch backend,
parity and training import it.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from sfexport.model import activations as _activations  # noqa: F401
from sfexport.model.configuration import LlavaQwenSlowFastConfig
from sfexport.model.modeling import LlavaQwenSlowFastForCausalLM
from sfexport.model.slow_fast_model import LlavaQwenSlowFastModel

__all__ = ["LlavaQwenSlowFastConfig", "LlavaQwenSlowFastForCausalLM", "LlavaQwenSlowFastModel"]

AutoConfig.register(LlavaQwenSlowFastConfig.model_type, LlavaQwenSlowFastConfig, exist_ok=True)
AutoModelForCausalLM.register(LlavaQwenSlowFastConfig, LlavaQwenSlowFastForCausalLM, exist_ok=True)
