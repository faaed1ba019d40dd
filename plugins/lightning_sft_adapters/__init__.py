"""First-party adapters for lightning-sft."""
