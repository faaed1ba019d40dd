"""QLoRA: LoRA over a base that is kept in 4 or 8 bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from lightning_sft import SFTError
from lightning_sft_adapters import heavy
from lightning_sft_adapters.lora import LoRA


class QLoRA(LoRA):
    """LoRA over a base that is quantised when it is loaded (Dettmers et al., 2023), through bitsandbytes.

    Args:
        quant_type: `nf4` (4 bits, with levels for normally distributed weights), `fp4` or `int8`.
        double_quantization: Quantise the scales of 4-bit weights, too: 0.4 bits less per weight.
        compute_dtype: Type in which 4-bit layers compute; packed weights are stored in it as well, so that they can
            be sharded. `int8` computes in float16.
        **lora: The options of LoRA.
    """

    def __init__(
        self,
        quant_type: Literal["nf4", "fp4", "int8"] = "nf4",
        double_quantization: bool = True,
        compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        **lora: Any,
    ) -> None:
        super().__init__(**lora)
        self.quant_type = quant_type
        self.double_quantization = double_quantization
        self.compute_dtype = compute_dtype

    def quantization(self) -> object:
        """The bitsandbytes configuration.

        Raises:
            SFTError: bitsandbytes isn't installed.
        """
        if find_spec("bitsandbytes") is None:
            raise SFTError(
                "QLoRA needs bitsandbytes",
                where="model.adapter (QLoRA)",
                fix='pip install "lightning-sft[qlora]"',
            )
        from transformers import BitsAndBytesConfig

        if self.quant_type == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=self.compute_dtype,
            bnb_4bit_quant_storage=self.compute_dtype,
        )

    def prepare(self, model: heavy.PreTrainedModel) -> heavy.PreTrainedModel:
        """The quantised model with adapters; norms, embeddings and head are float32, as peft prepares them.

        Raises:
            SFTError: The options don't fit each other or the model.
        """
        from peft import prepare_model_for_kbit_training

        return super().prepare(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
