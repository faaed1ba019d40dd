"""First-party filters for lightning-sft."""
