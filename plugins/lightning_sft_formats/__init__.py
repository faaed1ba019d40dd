"""First-party formats for lightning-sft."""
