"""Loading tokenizers and models: from a local folder or the Hub, with errors that say what to do."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, key: str = "model.base"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a Hub id; a missing pad token becomes its EOS.

    Masks go by position, never by token id, so a pad token that equals EOS changes nothing.

    Raises:
        SFTError: There is none, or the Hub can't be reached or refuses.
    """
    from transformers import AutoTokenizer

    _check_name(name, key)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise SFTError(
            "the folder has no tokenizer (no tokenizer.json)",
            where=f"{key}: {name}",
            fix="copy the tokenizer's files there, or give a tokenizer with model.tokenizer",
        )
    with _loading("tokenizer", name, key):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.eos_token is None:
        raise SFTError(
            "the tokenizer has no EOS token, so no text could end",
            where=f"{key}: {name}",
            fix="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, key: str = "model.base"
) -> PretrainedConfig:
    """The model's configuration; raises as `load_tokenizer` does."""
    from transformers import AutoConfig

    _check_name(name, key)
    with _loading("model configuration", name, key):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None,
    revision: str | None = None,
    quantization: object | None = None,
    trust_remote_code: bool = False,
    key: str = "model.base",
) -> PreTrainedModel:
    """A causal LM in training mode, with its weights as `dtype` (None: as they are stored).

    Raises:
        SFTError: It isn't there, isn't a causal LM, or the Hub can't be reached or refuses.
    """
    from torch.nn import Parameter
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _check_name(name, key)
    logging.disable_progress_bar()
    with _loading("model", name, key):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype is not None else "auto",
            revision=revision,
            quantization_config=quantization,
            trust_remote_code=trust_remote_code,
        )
    if quantization is not None:
        for parameter in model.parameters():
            if type(parameter) is Parameter:  # what isn't quantised would keep the whole file mapped
                parameter.data = parameter.data.clone()
    for module in model.modules():
        # In evaluation bitsandbytes would repack 4-bit weights for such CPUs, round their scales, and train on with
        # these: one validation, and the base is another.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.train()


def load_trained(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    whole_base: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """What a run exported, or any model folder: an adapter on its base, or a whole model; in eval mode.

    Args:
        folder: A folder with `adapter_config.json` (peft) or `config.json` (transformers).
        dtype: Type of the loaded weights; None: as they are stored.
        whole_base: Quantise the base as in training, and then make ordinary weights of what is left of it.
        trust_remote_code: Run model code that comes with the model.

    Raises:
        SFTError: It is neither, or its base can't be loaded.
    """
    if not is_adapter(folder):
        return load_model(str(folder), dtype=dtype, trust_remote_code=trust_remote_code, key="source").eval()
    if not any(folder.glob("adapter_model.*")):
        raise SFTError(
            "the adapter has no weights (no adapter_model.safetensors)",
            where=f"source: {folder}",
            fix=_DAMAGED,
        )
    base, revision = base_of(folder)
    quantization = quantization_of(folder)
    model = load_model(
        base,
        dtype=dtype,
        revision=revision,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
        key=f"the base of {folder}",
    )
    return put_on(_dequantized(model) if whole_base and quantization is not None else model, folder)


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary weights, in layers of the kind that it had before: GPT-2's hold them transposed."""
    from torch.nn import Parameter
    from transformers.pytorch_utils import Conv1D

    transposed = [
        name for name, layer in model.named_modules() if getattr(layer, "source_cls", None) is Conv1D
    ]
    model = model.dequantize()
    for name in transposed:
        linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = Parameter(linear.weight.data.T.contiguous()), linear.bias
        model.set_submodule(name, layer)
    return model


def put_on(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a saved adapter, and those in the folders below it, at work; in eval mode.

    Raises:
        SFTError: One can't be loaded.
    """
    from peft import PeftModel

    from lightning_sft.training.new_tokens import grow_for_adapter

    with _loading("adapter", str(folder), "source"), keeping_compilers():
        grow_for_adapter(model, folder)
        adapted = PeftModel.from_pretrained(model, str(folder))
        if beside := [place for place in sorted(folder.iterdir()) if is_adapter(place)]:
            for place in beside:
                adapted.load_adapter(str(place), adapter_name=place.name)
            adapted.base_model.set_adapter([adapted.active_adapter, *(place.name for place in beside)])
        return adapted.eval()


@contextmanager
def keeping_compilers() -> Iterator[None]:
    """Leave the environment's CC and CXX as they were.

    peft sets both to gcc while it tries to build BOFT's CUDA extension, and leaves them so where that fails: what
    torch.compile links from then on lacks the C++ library.
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)


def save_quantization(quantization: Any, folder: Path) -> None:
    """Note beside an adapter how the base was quantised under it: it belongs to what was trained."""
    (folder / _QUANTIZATION).write_text(json.dumps(quantization.to_dict(), indent=2) + "\n", encoding="utf-8")


def quantization_of(folder: Path) -> object | None:
    """How the base of an adapter was quantised when it was trained, or None.

    Raises:
        SFTError: It can't be read, or what it needs isn't installed.
    """
    path = folder / _QUANTIZATION
    if not path.is_file():
        return None
    from transformers.quantizers import AutoQuantizationConfig

    with _loading("quantisation", str(folder), "source"):
        return AutoQuantizationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def base_of(folder: Path) -> tuple[str, str | None]:
    """The folder or Hub id of the base that an adapter belongs to, and its revision.

    Raises:
        SFTError: The adapter doesn't say.
    """
    from peft import PeftConfig

    with _loading("adapter's configuration", str(folder), "source"):
        config = PeftConfig.from_pretrained(str(folder))
        base = config.base_model_name_or_path
    if base is None:
        raise SFTError("the adapter doesn't say which base it belongs to", where=str(folder / ADAPTER_CONFIG))
    return str(base), config.revision


def load_checkpoint(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """A checkpoint of a run, mapped to memory, not read.

    Raises:
        SFTError: It is no checkpoint, damaged, or holds Python objects and `weights_only` is set.
    """
    import torch

    where, fix = f"checkpoint {path}", "give another; runs keep theirs in checkpoints/"
    if not zipfile.is_zipfile(path):
        raise SFTError("this is no checkpoint, or a damaged one", where=where, fix=fix)
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise SFTError(
            "the checkpoint holds Python objects, which could run code when they are loaded",
            where=where,
            fix="only if you trust its origin, let `fit` load it with --weights_only false",
        ) from error
    except RuntimeError as error:
        raise SFTError(f"the checkpoint can't be read: {error}", where=where, fix=fix) from error
    if not isinstance(saved, dict) or not {"state_dict", "loops"} <= saved.keys():
        raise SFTError("this is no checkpoint of a run", where=where, fix=fix)
    return saved


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a peft adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


_QUANTIZATION = "quantization_config.json"
ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens the model can take at once; None where neither configuration nor tokenizer says."""
    text = config.get_text_config()
    known = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length")]
    lengths = [length for length in known if isinstance(length, int) and length > 0]
    if not lengths and tokenizer.model_max_length < 10**9:  # transformers' "unknown" is 1e30
        lengths.append(
            int(tokenizer.model_max_length)
        )  # often out of date, so only where the model doesn't say
    return min(lengths, default=None)


_DAMAGED = "check that the folder is complete and undamaged; else copy or download it again"


def absolute(name: str) -> str:
    """`name` as an absolute path if it is a local folder, so that exports can be loaded from anywhere."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _check_name(name: str, key: str) -> None:
    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise SFTError("this is a file, not a model folder", where=f"{key}: {name}", fix="give the folder")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise SFTError("no such folder", where=f"{key}: {name}", fix="give a local model folder or a Hub id")


@contextmanager
def _loading(what: str, name: str, key: str) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from safetensors import SafetensorError

    where = f"{key}: {name}"
    local = Path(name).is_dir()
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        SafetensorError,
        HfHubHTTPError,
    ) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        first_line = next(
            (line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__
        )
        if "ignore_mismatched_sizes" in first_line:
            first_line = "its weights have other shapes than its configuration says (listed above)"
        if "out of memory" in first_line:
            fix = "use a smaller or quantized model, or free the device"
            raise SFTError(f"the {what} can't be loaded: {first_line}", where=where, fix=fix) from error
        if local:
            fix = "install it" if isinstance(error, ImportError) else _DAMAGED
            raise SFTError(f"the {what} can't be loaded: {first_line}", where=where, fix=fix) from error
        if any(isinstance(link, GatedRepoError) for link in chain):
            problem, fix = (
                "the repository is gated",
                "ask for access on its page, then set HF_TOKEN to your token",
            )
        elif any(isinstance(link, RepositoryNotFoundError) for link in chain):
            problem = "no such repository on the Hub, or it is private"
            fix = "check the id; for a private one set HF_TOKEN to your token"
        else:
            problem = f"neither a local folder nor reachable on the Hub ({first_line})"
            fix = (
                "give the path of a local model folder; or check the network, HF_HUB_OFFLINE and, for gated "
                "or private repositories, HF_TOKEN"
            )
        raise SFTError(f"the {what} can't be loaded: {problem}", where=where, fix=fix) from error
