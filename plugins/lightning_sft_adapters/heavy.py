"""Types of libraries that take seconds to import, for annotations alone.

To read a class's options jsonargparse runs what its module imports under `if TYPE_CHECKING`; but not what is named
through another module, as `heavy.PreTrainedModel` is.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig as PeftConfig
    from torch import Tensor as Tensor
    from transformers import PreTrainedModel as PreTrainedModel
