"""First-party losses for lightning-sft."""
